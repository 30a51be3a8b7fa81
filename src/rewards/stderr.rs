//! The standard error of a reward program: passed on to rldiff's as it comes, its last lines kept for messages.

use std::{
    io::{Read, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::excerpt::escaped;

/// Bytes that are kept.
const KEPT: usize = 4 << 10;
/// Lines that a message shows.
const SHOWN: usize = 3;
/// How long the rest is waited for when the program has ended; what it started itself may hold the stream for longer.
const REST: Duration = Duration::from_millis(200);

/// See the module.
pub struct StandardError {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    tail: Vec<u8>,
    ended: bool,
}

impl StandardError {
    /// Starts the thread that reads; it ends with the stream.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn new(mut from: impl Read + Send + 'static) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        let thread = std::thread::Builder::new().name("standard error".into());
        let copy = move || {
            let mut buffer = [0; 4096];
            loop {
                let read = match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => read,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                // nobody has to read rldiff's own
                let _ = std::io::stderr().write_all(&buffer[..read]);
                let mut state = shared.lock().expect("no thread panics while it holds this");
                state.tail.extend(&buffer[..read]);
                let surplus = state.tail.len().saturating_sub(KEPT);
                state.tail.drain(..surplus);
            }
            shared.lock().expect("no thread panics while it holds this").ended = true;
        };
        thread.spawn(copy).context("cannot start a thread")?;
        Ok(StandardError { state })
    }

    /// Waits a moment for what a program that has ended wrote last.
    pub fn finish(&self) {
        let until = Instant::now() + REST;
        while Instant::now() < until && !self.state.lock().expect("no thread panics while it holds this").ended {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The last lines that are not blank, for a message; empty where there are none.
    pub fn last_lines(&self) -> String {
        let state = self.state.lock().expect("no thread panics while it holds this");
        let lines = state.tail.split(|&byte| byte == b'\n' || byte == b'\r');
        let lines: Vec<&[u8]> = lines.filter(|line| !line.trim_ascii().is_empty()).collect();
        let last = &lines[lines.len().saturating_sub(SHOWN)..];
        if last.is_empty() {
            return String::new();
        }
        let last: Vec<String> = last.iter().map(|line| escaped(line.trim_ascii())).collect();
        format!("; last on its standard error: {}", last.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let of = |bytes: Vec<u8>| {
            let error = StandardError::new(std::io::Cursor::new(bytes)).unwrap();
            error.finish();
            error.last_lines()
        };
        assert_eq!(of(b"\n \n".to_vec()), "");
        let long = [b"x".repeat(9000).as_slice(), b"\na\nb\r\n\nModuleNotFoundError: no 'torch'\n"].concat();
        assert_eq!(of(long), "; last on its standard error: \"a\", \"b\", \"ModuleNotFoundError: no 'torch'\"");
    }
}
