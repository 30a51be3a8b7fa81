//! A folder that one process at a time writes to, on any file system that several hosts share.
//!
//! The lock is a file in the folder, [`LOCK`], made by a hard link of a file with a name of its own: that either happens or
//! finds the name taken, on NFS too, where `flock` may be missing or may forget. Its owner writes to it every 10 s. From the
//! same machine an owner is looked up among the processes, so that its lock dies with it. From another machine a lock is
//! dead that was not renewed for 60 s: by the file server's clock (what was written last, the lock or a file made now?) and,
//! since servers and hosts disagree about clocks, by watching it for two renewals as well.
//!
//! A dead lock is replaced by who wins the right to do that, which is a lock of its own whose name has the dead one's
//! token: of any number of processes that find the same lock dead, one takes it. An owner that was stopped for longer than
//! a minute finds at its next renewal, and before each iteration, that the lock is another's, and ends.

use std::{
    fs::{self, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        mpsc::{channel, RecvTimeoutError, Sender},
        Arc, Mutex, MutexGuard, Weak,
    },
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{anyhow, bail, Context, Result};

use super::{
    contents::LOCK,
    lock_file::{acquire, link_new, read, Found, Times, TIMES},
    owner::Owner,
};
use crate::{
    cannot_write::{CannotWrite, OfRanks},
    comm::{end_world, Communicator},
};

/// Holds a folder until it is dropped. Folders that were made for it are removed again where nothing came into them.
pub struct FolderLock {
    held: Arc<Mutex<Held>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Held {
    folder: PathBuf,
    owner: Owner,
    /// Folders that were made on the way, the outermost first.
    made: Vec<PathBuf>,
    renewed: Instant,
    /// The lock says of what is left in the folder that a process was killed there.
    stays: bool,
}

/// All that this process holds, for the ways out that drop nothing.
static ALL: Mutex<Vec<Weak<Mutex<Held>>>> = Mutex::new(Vec::new());

/// Lets go of everything: the process is about to end.
pub fn release_all() {
    // whoever holds one of these locks just now may be what the process ends for: nothing is worth waiting for it
    let Ok(all) = ALL.try_lock() else { return };
    for held in all.iter().filter_map(Weak::upgrade) {
        if let Ok(held) = held.try_lock() {
            if !held.stays {
                held.release();
            }
        }
    }
}

fn of<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl FolderLock {
    /// Rank 0 holds `folder` for the command after `check` has found nothing against it; the others learn how that went.
    /// A collective call.
    ///
    /// # Errors
    /// The same on all ranks: what `check` says, who holds the folder, or [`CannotWrite`].
    pub fn hold(
        comm: &dyn Communicator,
        folder: &Path,
        command: &str,
        check: impl FnOnce() -> Result<()>,
    ) -> Result<Option<Self>> {
        let mine = match comm.rank() {
            0 => check().and_then(|()| Self::take(folder, command)).map(Some),
            _ => Ok(None),
        };
        let failure = mine.as_ref().err().map(|e| (CannotWrite::caused(e), format!("{e:#}")));
        let mut bytes = serde_json::to_vec(&failure)?;
        comm.broadcast_bytes(&mut bytes, 0)?;
        match serde_json::from_slice::<Option<(bool, String)>>(&bytes)? {
            None => mine,
            Some((of_writing, text)) => Err(OfRanks { text, of_writing }.into()),
        }
    }

    /// Holds `folder`, which is made where there is none.
    ///
    /// # Errors
    /// Another process holds it, or the file system does not let it be written ([`CannotWrite`]).
    pub fn take(folder: &Path, command: &str) -> Result<Self> {
        Self::take_within(folder, command, &TIMES)
    }

    fn take_within(folder: &Path, command: &str, times: &'static Times) -> Result<Self> {
        let owner = Owner::this_process(command);
        for attempt in 0.. {
            let mut made = Vec::new();
            let taken = make(folder, &mut made)
                .with_context(|| format!("cannot create {}", folder.display()))
                .and_then(|()| Ok(fs::canonicalize(folder)?))
                .and_then(|real| acquire(&real.join(LOCK), &owner, times).map(|holder| (real, holder)));
            match taken {
                Ok((real, None)) => {
                    return Self::start(
                        Held { folder: real, owner, made, renewed: Instant::now(), stays: false },
                        times,
                    )
                }
                Ok((_, Some(holder))) => {
                    remove_empty(&made);
                    bail!("{} is in use: {holder}", folder.display());
                }
                Err(e) => {
                    remove_empty(&made);
                    let vanished = e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == ErrorKind::NotFound);
                    // somebody else has just removed a folder that he had made
                    if vanished && attempt < 5 {
                        continue;
                    }
                    if e.downcast_ref::<io::Error>().is_none() {
                        return Err(e);
                    }
                    return Err(e.context(CannotWrite::file(folder)));
                }
            }
        }
        unreachable!("the loop ends by returning")
    }

    fn start(held: Held, times: &'static Times) -> Result<Self> {
        let held = Arc::new(Mutex::new(held));
        let mut all = of(&ALL);
        all.retain(|held| held.strong_count() > 0);
        all.push(Arc::downgrade(&held));
        drop(all);
        let (stop, stopped) = channel();
        let renewed = held.clone();
        let renew = move || {
            while stopped.recv_timeout(times.renewal) == Err(RecvTimeoutError::Timeout) {
                let lost = of(&renewed).renew();
                if let Err(e) = lost {
                    // nobody is left to tell if it fails
                    let _ = io::stderr().write_all(format!("error: {e:#}\n").as_bytes());
                    end_world(1);
                }
            }
        };
        let thread = std::thread::Builder::new().name("folder".into()).spawn(renew).context("cannot start a thread")?;
        Ok(FolderLock { held, stop: Some(stop), thread: Some(thread) })
    }

    /// # Errors
    /// The folder is not this process's any more: it was stopped for so long that its lock was taken for dead.
    pub fn check(&self) -> Result<()> {
        let held = of(&self.held);
        match read(&held.lock())? {
            Found::Owner(owner) if owner.token != held.owner.token => Err(held.lost(&owner)),
            // what has been deleted by hand comes back with the next renewal
            _ => Ok(()),
        }
    }

    /// Where the process ends without dropping this, the lock stays for others to see that it is dead.
    pub fn stay(&self) {
        of(&self.held).stays = true;
    }

    /// Gives the folder another name, under which it is held.
    pub fn rename(&self, to: &Path) -> io::Result<()> {
        let mut held = of(&self.held);
        fs::rename(&held.folder, to)?;
        held.folder = fs::canonicalize(to)?;
        // it stays, however little is in it
        held.made.clear();
        Ok(())
    }

    /// Gives what is in the folder the name `NAME.1`, or the next that is free, and holds a new one in its place.
    pub fn set_aside(&mut self) -> Result<()> {
        let (folder, command) = {
            let held = of(&self.held);
            (held.folder.clone(), held.owner.command.clone())
        };
        let name = folder.file_name().with_context(|| format!("{} cannot be set aside", folder.display()))?;
        let mut n = 1;
        let target = loop {
            let mut numbered = name.to_owned();
            numbered.push(format!(".{n}"));
            let target = folder.with_file_name(numbered);
            // an empty folder of one's own: nothing that another makes at this moment is replaced
            match fs::create_dir(&target) {
                Ok(()) => break target,
                Err(e) if e.kind() == ErrorKind::AlreadyExists => n += 1,
                Err(e) => return Err(e).with_context(|| format!("cannot create {}", target.display())),
            }
        };
        if let Err(e) = self.rename(&target) {
            let _ = fs::remove_dir(&target);
            return Err(e).with_context(|| format!("cannot move {} aside", folder.display()));
        }
        *self = FolderLock::take(&folder, &command)?;
        log::info!("what an earlier run left in {} is now in {}", folder.display(), target.display());
        Ok(())
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // a panic of the thread has ended the process
            let _ = thread.join();
        }
        of(&self.held).release();
    }
}

impl Held {
    fn lock(&self) -> PathBuf {
        self.folder.join(LOCK)
    }

    fn lost(&self, to: &Owner) -> anyhow::Error {
        let (folder, seconds) = (self.folder.display(), self.renewed.elapsed().as_secs());
        anyhow!(
            "{folder} was taken over while this run stood still for {seconds} s; it ends and writes nothing more: {to}"
        )
    }

    /// Says that the owner is still there.
    ///
    /// # Errors
    /// Another process has taken the folder.
    fn renew(&mut self) -> Result<()> {
        self.owner.renewals += 1;
        let path = self.lock();
        let written = (|| -> io::Result<Option<Owner>> {
            // a new one where somebody has deleted it
            let Found::Owner(found) = read(&path)? else { return link_new(&path, &self.owner) };
            if found.token != self.owner.token {
                return Ok(Some(found));
            }
            // in place: a lock that is replaced at this moment keeps its new content, since that is another file
            let file = OpenOptions::new().write(true).open(&path)?;
            let bytes = serde_json::to_vec(&self.owner).map_err(io::Error::other)?;
            file.write_all_at(&bytes, 0)?;
            Ok(None)
        })();
        match written {
            Ok(Some(other)) => return Err(self.lost(&other)),
            Ok(None) => self.renewed = Instant::now(),
            // the file system may be back at the next time; whoever writes results finds out by himself
            Err(e) => log::warn!("{}: the lock cannot be renewed: {e}", path.display()),
        }
        Ok(())
    }

    fn release(&self) {
        let path = self.lock();
        if matches!(read(&path), Ok(Found::Owner(owner)) if owner.token == self.owner.token) {
            let _ = fs::remove_file(&path);
        }
        remove_empty(&self.made);
    }
}

/// Makes a folder and those above it that are missing; `made` gets what was made.
fn make(folder: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make(parent, made)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => made.push(folder.to_path_buf()),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && folder.is_dir() => {}
        Err(e) => return Err(e),
    }
    Ok(())
}

fn remove_empty(made: &[PathBuf]) {
    // one that is not empty stays, and so do those above it
    made.iter().rev().all(|folder| fs::remove_dir(folder).is_ok());
}

#[cfg(test)]
#[path = "lock_tests.rs"]
mod tests;
