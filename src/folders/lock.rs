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
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        mpsc::{channel, RecvTimeoutError, Sender},
        Arc, Mutex, MutexGuard, Weak,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, Context, Result};

use super::{
    contents::LOCK,
    owner::{Owner, Process},
};
use crate::{
    cannot_write::{CannotWrite, OfRanks},
    comm::{end_world, Communicator},
    signals,
};

/// How long things take.
struct Times {
    /// Between two renewals.
    renewal: Duration,
    /// A lock that was not renewed for so long is dead, where its owner cannot be looked up.
    dead: Duration,
    /// So long one is watched that seems dead by the file server's clock.
    watched: Duration,
    /// One that is older is not watched any more.
    forgotten: Duration,
    /// So long a job waits for a lock of an earlier start of itself.
    own_job: Duration,
    /// Between two looks.
    look: Duration,
}

const TIMES: Times = Times {
    renewal: Duration::from_secs(10),
    dead: Duration::from_secs(60),
    watched: Duration::from_secs(21),
    forgotten: Duration::from_secs(86_400),
    own_job: Duration::from_secs(90),
    look: Duration::from_millis(500),
};

/// By so much the file server's clock may run back between two files.
const SKEW: f64 = -5.0;

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

/// What lies at a lock's path.
enum Found {
    Nothing,
    Owner(Owner),
    /// No lock, or half of one.
    Other,
}

/// Reads a lock; a renewal under way is waited for.
fn read(path: &Path) -> io::Result<Found> {
    for attempt in 0..5 {
        if attempt > 0 {
            std::thread::sleep(Duration::from_millis(20));
        }
        match fs::read(path) {
            Ok(bytes) => {
                if let Some(owner) = Owner::parse(&bytes) {
                    return Ok(Found::Owner(owner));
                }
            }
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
            // a file that was replaced while it was read
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Found::Other)
}

/// A file of a name of its own beside a lock, removed when dropped.
struct Beside {
    path: PathBuf,
    file: File,
}

impl Beside {
    fn new(lock: &Path, owner: &Owner) -> io::Result<Self> {
        let unique = Owner::this_process("").token;
        let path = lock.with_file_name(format!(".{LOCK}.{unique}"));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let beside = Beside { path, file };
        beside.file.write_all_at(&serde_json::to_vec(owner).map_err(io::Error::other)?, 0)?;
        // so that the file system's "no space" comes now and the server has it
        beside.file.sync_all()?;
        Ok(beside)
    }

    /// Gives the file the name `path` too; false where that is taken.
    fn link(&self, path: &Path) -> io::Result<bool> {
        match fs::hard_link(&self.path, path) {
            Ok(()) => Ok(true),
            // an answer that was lost on the way makes NFS ask again, and find its own link
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(fs::metadata(&self.path)?.nlink() == 2),
            Err(e) if no_hard_links(&e) => match OpenOptions::new().write(true).create_new(true).open(path) {
                Ok(mut file) => file.write_all(&fs::read(&self.path)?).and_then(|()| file.sync_all()).map(|()| true),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// How much later than `path` this file was written, in seconds of the file system's clock, if it were now.
    fn age_of(&self, path: &Path) -> io::Result<f64> {
        // at its end, so that it stays what it is
        let length = self.file.metadata()?.len();
        self.file.write_all_at(b"\n", length)?;
        self.file.sync_all()?;
        // opening it asks the server, not the cache
        let (own, other) = (self.file.metadata()?.modified()?, File::open(path)?.metadata()?.modified()?);
        Ok(match own.duration_since(other) {
            Ok(later) => later.as_secs_f64(),
            Err(earlier) => -earlier.duration().as_secs_f64(),
        })
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn no_hard_links(error: &io::Error) -> bool {
    [libc::EPERM, libc::EOPNOTSUPP, libc::ENOSYS, libc::EMLINK].map(Some).contains(&error.raw_os_error())
}

/// Puts a lock that is missing back; who has it, where another was faster.
fn link_new(path: &Path, owner: &Owner) -> io::Result<Option<Owner>> {
    if Beside::new(path, owner)?.link(path)? {
        return Ok(None);
    }
    Ok(match read(path)? {
        Found::Owner(other) if other.token != owner.token => Some(other),
        _ => None,
    })
}

/// Makes the lock at `path` `owner`'s. Gives who has it where that is somebody who lives.
fn acquire(path: &Path, owner: &Owner, times: &Times) -> Result<Option<Owner>> {
    let beside = Beside::new(path, owner).with_context(|| format!("cannot write {}", path.display()))?;
    let cannot = || format!("cannot write {}", path.display());
    loop {
        if beside.link(path).with_context(cannot)? {
            return Ok(None);
        }
        let holder = match read(path).with_context(cannot)? {
            Found::Nothing => continue,
            Found::Owner(holder) => holder,
            Found::Other => bail!("{} is there and is no lock that rldiff can read", path.display()),
        };
        match judge(path, &holder, &beside, times).with_context(cannot)? {
            Verdict::Gone => continue,
            Verdict::Alive(holder) => return Ok(Some(holder)),
            Verdict::Dead => {}
        }
        // the right to replace this very lock
        let right = path.with_file_name(format!(".{LOCK}.after-{}", holder.token));
        let rival = acquire(&right, &Owner { token: Owner::this_process("").token, ..owner.clone() }, times)?;
        if let Some(rival) = rival {
            // it is about to become the holder, or to find that it cannot; who is asked later sees which
            std::thread::sleep(times.look / 10);
            if matches!(read(path).with_context(cannot)?, Found::Owner(now) if now.token == holder.token) {
                return Ok(Some(rival));
            }
            continue;
        }
        let unchanged = matches!(read(path).with_context(cannot)?, Found::Owner(now) if now == holder);
        let replaced = if unchanged { replace(path, owner) } else { Ok(()) };
        let _ = fs::remove_file(&right);
        replaced.with_context(cannot)?;
        if unchanged {
            log::info!("{}: taken over from one that is gone: {holder}", path.display());
            return Ok(None);
        }
    }
}

fn replace(path: &Path, owner: &Owner) -> io::Result<()> {
    let own = Beside::new(path, owner)?;
    fs::rename(&own.path, path)
}

enum Verdict {
    Alive(Owner),
    Dead,
    /// Released or replaced meanwhile.
    Gone,
}

/// Does the holder of the lock at `path` live? Waits where the holder is an earlier start of this very job, and watches
/// where the clock alone says that it is dead.
fn judge(path: &Path, holder: &Owner, beside: &Beside, times: &Times) -> io::Result<Verdict> {
    let own_job = holder.is_of_this_job();
    let (began, mut seen, mut changed, mut told) = (Instant::now(), holder.clone(), Instant::now(), false);
    loop {
        match holder.process() {
            Process::Gone => return Ok(Verdict::Dead),
            Process::Lives if own_job => {}
            Process::Lives => return Ok(Verdict::Alive(seen)),
            Process::OutOfSight => {
                let age = match beside.age_of(path) {
                    Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Verdict::Gone),
                    age => age?,
                };
                let (dead, quiet) = (age > times.dead.as_secs_f64(), changed.elapsed());
                if age > times.forgotten.as_secs_f64() || quiet >= times.dead || dead && quiet >= times.watched {
                    return Ok(Verdict::Dead);
                }
                if !own_job && !dead && age > SKEW {
                    return Ok(Verdict::Alive(seen));
                }
            }
        }
        if began.elapsed() > if own_job { times.own_job } else { 2 * times.dead } {
            return Ok(Verdict::Alive(seen));
        }
        if !told {
            told = true;
            let folder = path.parent().unwrap_or(path).display();
            if own_job {
                log::info!("{folder} is held by an earlier start of this job ({holder}); waiting for its end");
                // nothing is there to be saved: a signal ends the process
                signals::release().map_err(io::Error::other)?;
            } else {
                log::info!("{folder}: its lock was not renewed lately ({holder}); watching whether it will be");
            }
        }
        std::thread::sleep(times.look);
        match read(path)? {
            Found::Owner(now) if now.token != holder.token => return Ok(Verdict::Gone),
            Found::Owner(now) if now.renewals != seen.renewals => {
                if !own_job {
                    return Ok(Verdict::Alive(now));
                }
                (seen, changed) = (now, Instant::now());
            }
            Found::Owner(_) | Found::Other => {}
            Found::Nothing => return Ok(Verdict::Gone),
        }
    }
}

#[cfg(test)]
#[path = "lock_tests.rs"]
mod tests;
