//! Signals that ask a run to stop: SIGTERM, SIGUSR1, SIGUSR2 (what Slurm and launchers send before they take a job away),
//! SIGINT (Ctrl-C) and SIGHUP (the terminal is gone).
//!
//! The handler stores the signal's number and wakes a thread of rank 0, so a signal may come at any moment, to any number
//! of ranks, any number of times: inside a collective, inside a save, twice at once. The thread says at once what becomes
//! of what is under way. A second Ctrl-C ends the program on the spot.
//!
//! What becomes of it: work says by a [`Scope`] whether it can be dropped. In such a scope the next [`check`] gives the
//! error [`Interrupted`] (before each denoising step, each batch of a reward, each part of the loading), which leaves
//! the loop like any other error, up to whoever can save. An asked rank rings the others, so that they come to the same
//! at their next check; and ranks that work by themselves [`meet`] afterwards: either all have their work or all have
//! dropped it.
//!
//! What is not dropped is an iteration that has changed the weights. The state before it is gone (a copy of weights and
//! moments would be needed), and the state within it is also every latent of the iteration's trajectories (6.8 GB for
//! 2,048 samples of 51 latents of 64 KiB). So it is finished; the paper's takes 43 s on its machine, and the batch
//! scripts ask Slurm for a warning of 120 s. A smaller machine needs a warning of one iteration, or loses what it did
//! since the last checkpoint.

use std::{
    fmt,
    io::{self, Read},
    os::{fd::IntoRawFd, unix::net::UnixStream},
    sync::{
        atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering},
        Mutex, MutexGuard,
    },
};

use anyhow::{Context, Error, Result};

use crate::comm::{agree, ring, Communicator};

const OF_LAUNCHERS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];
/// Left alone where whoever started the program has them ignored: nohup, a script's background.
const OF_TERMINALS: [libc::c_int; 2] = [libc::SIGINT, libc::SIGHUP];

/// Milliseconds after the first SIGINT in which another one is the same Ctrl-C, forwarded by a launcher.
const SAME_KEYSTROKE: i64 = 500;

/// The last signal that came, 0 for none.
static ASKED_TO_STOP: AtomicI32 = AtomicI32::new(0);
/// Another rank has been asked.
static ASKED_ELSEWHERE: AtomicBool = AtomicBool::new(false);
/// Where the handler wakes the thread; −1 where there is none.
static WAKE: AtomicI32 = AtomicI32::new(-1);
/// When the first SIGINT came, in milliseconds; 0 for not yet.
static FIRST_INT: AtomicI64 = AtomicI64::new(0);
/// Bits of the signals of terminals that were ignored when the program was started.
static IGNORED: AtomicI32 = AtomicI32::new(0);
static ACKNOWLEDGED: AtomicBool = AtomicBool::new(false);
static SCOPES: Mutex<Vec<(u64, Kind, String)>> = Mutex::new(Vec::new());

/// Some rank was asked to stop, and this rank has dropped what it was at. In the end the error of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("interrupted by a signal")
    }
}

impl std::error::Error for Interrupted {}

/// Whether an error comes from a signal.
pub fn is_interruption(error: &Error) -> bool {
    error.is::<Interrupted>()
}

extern "C" fn remember(signal: libc::c_int) {
    ASKED_TO_STOP.store(signal, Ordering::SeqCst);
    // SAFETY: clock_gettime, sigaction, raise and write may be called in a handler; errno is put back.
    unsafe {
        let errno = *libc::__errno_location();
        if signal == libc::SIGINT {
            let mut now: libc::timespec = std::mem::zeroed();
            libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now);
            let now = now.tv_sec as i64 * 1000 + now.tv_nsec as i64 / 1_000_000;
            let first = FIRST_INT.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
            if first.is_err_and(|first| now - first > SAME_KEYSTROKE) {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(libc::SIGINT, &action, std::ptr::null_mut());
                // takes effect when this handler returns
                libc::raise(libc::SIGINT);
            }
        }
        let wake = WAKE.load(Ordering::SeqCst);
        if wake >= 0 {
            libc::write(wake, [0u8].as_ptr().cast(), 1);
        }
        *libc::__errno_location() = errno;
    }
}

/// Notes which signals whoever started the program has ignored. It runs before the libraries are set up (main.rs has it
/// in `.preinit_array`): UCX, which MPICH brings along, takes SIGHUP for itself then.
pub extern "C" fn note_ignored() {
    for signal in OF_TERMINALS {
        // SAFETY: the struct is plain data; nothing is changed.
        let ignored = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
        };
        if ignored {
            IGNORED.fetch_or(1 << signal, Ordering::SeqCst);
        }
    }
}

/// Installs the handlers; a second call changes nothing, unless a library has installed its own in between.
pub fn install() -> Result<()> {
    set_handlers(remember as extern "C" fn(libc::c_int) as libc::sighandler_t)
}

/// Gives the signals their usual effect back; one that came since [`install`] has it now.
pub fn release() -> Result<()> {
    set_handlers(libc::SIG_DFL)?;
    match ASKED_TO_STOP.load(Ordering::SeqCst) {
        0 => {}
        // SAFETY: raising a signal whose effect is the default one.
        signal => unsafe {
            libc::raise(signal);
        },
    }
    Ok(())
}

/// From now on signals are acknowledged, in the log of rank 0. Installs the handlers again: MPI may have taken some.
pub fn listen(rank: usize) -> Result<()> {
    install()?;
    if rank != 0 || WAKE.load(Ordering::SeqCst) >= 0 {
        return Ok(());
    }
    let (mut woken, wake) = UnixStream::pair().context("cannot listen for signals")?;
    wake.set_nonblocking(true).context("cannot listen for signals")?;
    let thread = move || {
        let mut byte = [0];
        // the other end stays open as long as the process lives
        while woken.read_exact(&mut byte).is_ok() {
            acknowledge();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(thread).context("cannot start a thread")?;
    WAKE.store(wake.into_raw_fd(), Ordering::SeqCst);
    if ASKED_TO_STOP.load(Ordering::SeqCst) != 0 {
        acknowledge();
    }
    Ok(())
}

fn set_handlers(handler: libc::sighandler_t) -> Result<()> {
    for signal in OF_LAUNCHERS.into_iter().chain(OF_TERMINALS) {
        // SAFETY: the structs are plain data; our handler does only what is allowed in one.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let ignored = IGNORED.load(Ordering::SeqCst) & (1 << signal) != 0;
            action.sa_sigaction = if ignored { libc::SIG_IGN } else { handler };
            // reads and writes under way go on instead of failing with EINTR
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if installed != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cannot handle signal {signal}"));
        }
    }
    Ok(())
}

/// What a signal does to the work in a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Dropped,
    Finished,
}

/// Ends the scope when dropped.
#[must_use]
pub struct Scope(u64);

/// From here to the end of the scope a signal drops what is under way, at the next [`check`]; `words` say so, to whoever
/// has sent it. The innermost scope counts.
pub fn droppable(words: impl Into<String>) -> Scope {
    enter(Kind::Dropped, words.into())
}

/// From here to the end of the scope a signal changes nothing: what is under way is finished first, as `words` say.
pub fn finishing(words: impl Into<String>) -> Scope {
    enter(Kind::Finished, words.into())
}

fn enter(kind: Kind, words: String) -> Scope {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    scopes().push((id, kind, words));
    Scope(id)
}

impl Drop for Scope {
    fn drop(&mut self) {
        scopes().retain(|(id, ..)| *id != self.0);
    }
}

fn scopes() -> MutexGuard<'static, Vec<(u64, Kind, String)>> {
    SCOPES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn name(signal: libc::c_int) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGUSR1 => "SIGUSR1",
        libc::SIGUSR2 => "SIGUSR2",
        libc::SIGINT => "SIGINT (Ctrl-C again ends at once)",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Says, once and on rank 0, what becomes of what is under way.
fn acknowledge() {
    if WAKE.load(Ordering::SeqCst) < 0 || ACKNOWLEDGED.swap(true, Ordering::SeqCst) {
        return;
    }
    let words = scopes().last().map_or("stopping".to_string(), |(_, _, words)| words.clone());
    match ASKED_TO_STOP.load(Ordering::SeqCst) {
        0 => log::info!("another rank was asked to stop: {words}"),
        signal => log::info!("{}: {words}", name(signal)),
    }
}

/// This rank has heard of a signal to another one.
pub(crate) fn asked_elsewhere() {
    ASKED_ELSEWHERE.store(true, Ordering::SeqCst);
    acknowledge();
}

/// Work may go on, as far as this rank knows: nobody was asked to stop, or what is under way is finished first. The first
/// check of an asked rank tells the other ranks. From the thread of the communicator; costs nothing worth mentioning.
///
/// # Errors
/// [`Interrupted`], in scopes whose work can be dropped.
pub fn check() -> Result<(), Interrupted> {
    let mine = ASKED_TO_STOP.load(Ordering::SeqCst) != 0;
    if ring(mine) {
        asked_elsewhere();
    }
    if !mine && !ASKED_ELSEWHERE.load(Ordering::SeqCst) {
        return Ok(());
    }
    acknowledge();
    match scopes().last() {
        Some((_, Kind::Dropped, _)) => Err(Interrupted),
        _ => Ok(()),
    }
}

/// This rank's work where all ranks have theirs, and none of them has heard of a signal until now: otherwise
/// [`Interrupted`] on all of them. A collective call, but for failures, which are this rank's own. A failure after a
/// signal is none: programs that judge get signals, too.
pub fn meet<T>(comm: &dyn Communicator, mine: Result<T>) -> Result<T> {
    let mine = check().map_err(Error::from).and(mine);
    match &mine {
        Err(e) if !is_interruption(e) => return mine,
        Err(_) => agree(comm, Err(Interrupted.into()))?,
        Ok(_) => agree(comm, Ok(()))?,
    }
    mine
}

/// The place between two parts of the work where all ranks leave together if one was asked to. A collective call.
///
/// # Errors
/// [`Interrupted`], on all ranks.
pub fn stop_here(comm: &dyn Communicator) -> Result<()> {
    meet(comm, Ok(()))
}
