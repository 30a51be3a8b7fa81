//! Standard output and standard error, whose readers may go away at any time: `| head`, a full disk, a terminal that is
//! closed.
//!
//! Commands print with `say!`, which cannot fail and stops at the first error; `cli::main` asks [`outcome`] at the end. So
//! a command finishes the files it makes whether or not anybody reads what it prints, a reader that has seen enough ends
//! nothing, and a disk that is full under standard output is an error. A training does not ask: it outlives both streams.
//!
//! Nothing is buffered here. A stream that was closed when the program started is `/dev/null`: Rust's runtime sees to
//! that, so that no file of ours gets the number 1 or 2.

use std::{
    fmt,
    fs::File,
    io::{self, ErrorKind, Write},
    mem::ManuallyDrop,
    os::fd::{FromRawFd, RawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result};

use crate::{cannot_write::CannotWrite, telemetry::suspended};

/// Prints a line on standard output, as `println!` does.
macro_rules! say {
    () => { $crate::streams::print(format_args!("\n")) };
    ($($text:tt)*) => { $crate::streams::print(format_args!("{}\n", format_args!($($text)*))) };
}

/// Why standard output takes nothing any more.
static GONE: Mutex<Option<io::Error>> = Mutex::new(None);

fn gone() -> MutexGuard<'static, Option<io::Error>> {
    GONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints on standard output, unless that has failed before.
pub fn print(text: fmt::Arguments) {
    let mut gone = gone();
    if gone.is_none() {
        *gone = suspended(|| Stream::out().write_all(text.to_string().as_bytes())).err();
    }
}

/// Whether further printing is in vain.
pub fn is_gone() -> bool {
    gone().is_some()
}

/// An error if standard output could not take what was printed; a reader that closed it has seen enough.
pub fn outcome() -> Result<()> {
    match gone().take() {
        Some(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context(CannotWrite::new("standard output")),
        _ => Ok(()),
    }
}

/// Prints on standard error, where nobody is left to tell if that fails. One write, so that the lines of several ranks
/// and threads stay whole.
pub fn complain(text: &str) {
    let _ = Stream::err().write_all(text.as_bytes());
}

/// One of the two, without a buffer.
pub struct Stream(RawFd);

impl Stream {
    pub fn out() -> Self {
        Stream(libc::STDOUT_FILENO)
    }

    pub fn err() -> Self {
        Stream(libc::STDERR_FILENO)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: both are open as long as the process lives, and this does not close them.
        let mut file = ManuallyDrop::new(unsafe { File::from_raw_fd(self.0) });
        loop {
            match file.write(bytes) {
                // whoever shares the pipe or terminal with us has made it non-blocking
                Err(e) if e.kind() == ErrorKind::WouldBlock => wait_for_room(self.0),
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns when the stream takes bytes again, or never will.
fn wait_for_room(stream: RawFd) {
    let mut wanted = libc::pollfd { fd: stream, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd. Where poll fails the caller writes again and sees why.
    unsafe { libc::poll(&mut wanted, 1, 1000) };
}

/// Lets a write beyond the limit on file sizes (`ulimit -f`) be an error, as on a full disk, not the end of the process.
pub fn outlive_size_limits() {
    // SAFETY: sets the disposition of a signal before there are threads.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}
