//! Who may write on the terminal, and when: log records, plain lines and the bar share one screen.
//!
//! The bar is redrawn in place. A line written under it by anyone else would be torn or overdrawn, so every writer
//! goes through [`suspended`], which takes the bar away for the moment of writing.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use indicatif::{MultiProgress, ProgressDrawTarget, TermLike};

use crate::streams::Stream;

/// How rank 0 shows its progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Screen {
    /// A bar, redrawn in place.
    Bar,
    /// One aligned line per iteration.
    Lines,
}

impl Screen {
    /// `RLDIFF_PROGRESS=bar` or `lines` decides; without it there is a bar where standard output and error are both a
    /// terminal. The variable is needed under `mpirun`, whose ranks write into pipes even when those end on a
    /// terminal; COLUMNS then says how wide that is (80 if it does not).
    pub fn detect() -> Self {
        let on_terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self::choose(std::env::var("RLDIFF_PROGRESS").ok().as_deref(), on_terminal)
    }

    fn choose(wish: Option<&str>, on_terminal: bool) -> Self {
        match wish {
            Some("bar") => Screen::Bar,
            Some("lines") => Screen::Lines,
            _ if on_terminal => Screen::Bar,
            _ => Screen::Lines,
        }
    }
}

/// Starts env_logger on standard error (on standard output, in front of the bar, once there is one): `info` and above from rank 0, warnings and errors (with the rank) from the
/// others; RUST_LOG overrules. Records never tear the progress bar. A second call does nothing.
pub fn init_logger(rank: usize) {
    let default_level = if rank == 0 { "info" } else { "warn" };
    let environment = env_logger::Env::default().default_filter_or(default_level);
    let logger = env_logger::Builder::from_env(environment)
        .format(move |out, record| {
            let rank = if rank == 0 { String::new() } else { format!("rank {rank}: ") };
            match record.level() {
                log::Level::Info => writeln!(out, "{rank}{}", record.args()),
                level => writeln!(out, "{}: {rank}{}", level.as_str().to_lowercase(), record.args()),
            }
        })
        .target(env_logger::Target::Pipe(Box::new(Records)))
        .try_init();
    if let Err(error) = logger {
        log::debug!("a logger is already in place: {error}");
    }
}

/// The bars on the screen; exists once a bar has been shown.
static BARS: OnceLock<MultiProgress> = OnceLock::new();

/// Whether bars may have several lines.
pub(super) fn knows_its_width() -> bool {
    std::io::stdout().is_terminal()
}

/// Runs `write` while no bar is on the screen.
pub(crate) fn suspended<T>(write: impl FnOnce() -> T) -> T {
    match BARS.get() {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
}

/// The bars of this process, drawn on standard output.
pub(super) fn bars() -> &'static MultiProgress {
    BARS.get_or_init(|| {
        let per_second = if knows_its_width() { 20 } else { 4 };
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(Terminal::default()), per_second);
        MultiProgress::with_draw_target(target)
    })
}

/// Where env_logger writes, one whole record per write. With a bar on the screen its own stream is the only one that
/// keeps the order: a launcher forwards standard output and error independently.
struct Records;

impl Write for Records {
    fn write(&mut self, record: &[u8]) -> std::io::Result<usize> {
        match BARS.get() {
            Some(bars) => bars.suspend(|| Stream::out().write_all(record)),
            None => Stream::err().write_all(record),
        }
        .map(|()| record.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Standard output as a terminal, or with one at its far end (`mpirun`'s), which cannot be asked for its width but obeys
/// ANSI sequences. Bars must keep to one line there, for indicatif starts a second one by filling the first to its exact
/// width.
///
/// It never fails: indicatif panics where a terminal does, and a run outlives its screen.
#[derive(Debug, Default)]
struct Terminal {
    /// What is written at the next flush, in one piece.
    pending: Mutex<String>,
}

impl Terminal {
    fn pending(&self) -> MutexGuard<'_, String> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, text: &str) -> std::io::Result<()> {
        self.pending().push_str(text);
        Ok(())
    }

    fn move_cursor(&self, count: usize, direction: char) -> std::io::Result<()> {
        // a count of 0 would move by 1
        if count == 0 {
            return Ok(());
        }
        self.put(&format!("\x1b[{count}{direction}"))
    }
}

/// Columns of the terminal that is standard output.
fn columns() -> Option<u16> {
    // SAFETY: plain data that the kernel fills; zeros where it does not.
    let size = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size);
        size
    };
    Some(size.ws_col).filter(|&columns| columns > 0)
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        let told = || std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        columns().or_else(told).unwrap_or(80).max(20)
    }

    fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
        self.move_cursor(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
        self.move_cursor(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> std::io::Result<()> {
        self.move_cursor(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> std::io::Result<()> {
        self.move_cursor(n, 'D')
    }

    fn write_line(&self, text: &str) -> std::io::Result<()> {
        self.put(&format!("{text}\n"))
    }

    fn write_str(&self, text: &str) -> std::io::Result<()> {
        self.put(text)
    }

    fn clear_line(&self) -> std::io::Result<()> {
        self.put("\r\x1b[2K")
    }

    fn flush(&self) -> std::io::Result<()> {
        let text = std::mem::take(&mut *self.pending());
        // nobody is left to tell if the screen is gone
        let _ = Stream::out().write_all(text.as_bytes());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wish_goes_before_the_terminal() {
        assert_eq!(Screen::choose(None, true), Screen::Bar);
        assert_eq!(Screen::choose(None, false), Screen::Lines);
        assert_eq!(Screen::choose(Some("bar"), false), Screen::Bar);
        assert_eq!(Screen::choose(Some("lines"), true), Screen::Lines);
        assert_eq!(Screen::choose(Some("rainbow"), false), Screen::Lines);
    }
}
