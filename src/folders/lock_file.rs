//! The file that is a folder's lock: how it is made, read and judged, and how a dead one is replaced.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{bail, Context, Result};

use super::{
    contents::LOCK,
    owner::{Owner, Process},
};
use crate::signals;

/// How long things take.
pub(super) struct Times {
    /// Between two renewals.
    pub renewal: Duration,
    /// A lock that was not renewed for so long is dead, where its owner cannot be looked up.
    pub dead: Duration,
    /// So long one is watched that seems dead by the file server's clock.
    pub watched: Duration,
    /// One that is older is not watched any more.
    pub forgotten: Duration,
    /// So long a job waits for a lock of an earlier start of itself.
    pub own_job: Duration,
    /// Between two looks.
    pub look: Duration,
}

pub(super) const TIMES: Times = Times {
    renewal: Duration::from_secs(10),
    dead: Duration::from_secs(60),
    watched: Duration::from_secs(21),
    forgotten: Duration::from_secs(86_400),
    own_job: Duration::from_secs(90),
    look: Duration::from_millis(500),
};

/// By so much the file server's clock may run back between two files.
const SKEW: f64 = -5.0;

/// What lies at a lock's path.
pub(super) enum Found {
    Nothing,
    Owner(Owner),
    /// No lock, or half of one.
    Other,
}

/// Reads a lock; a renewal under way is waited for.
pub(super) fn read(path: &Path) -> io::Result<Found> {
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
pub(super) fn link_new(path: &Path, owner: &Owner) -> io::Result<Option<Owner>> {
    if Beside::new(path, owner)?.link(path)? {
        return Ok(None);
    }
    Ok(match read(path)? {
        Found::Owner(other) if other.token != owner.token => Some(other),
        _ => None,
    })
}

/// Makes the lock at `path` `owner`'s. Gives who has it where that is somebody who lives.
pub(super) fn acquire(path: &Path, owner: &Owner, times: &Times) -> Result<Option<Owner>> {
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
