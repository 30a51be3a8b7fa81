//! [`super::protocol`] over a pair of streams: the pipes of a process or a socket.

use std::{
    io::{BufRead, BufReader, Read, Write},
    sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, Context, Result};

use super::protocol::{ensure_ready, Link, MAX_ANSWER};
use crate::signals;

/// Between two looks for a signal while a program is waited for.
const LOOK: Duration = Duration::from_millis(100);

/// A program at the other end of streams.
pub trait Streams {
    fn lines(&mut self) -> &mut Lines;
    /// As [`Link::give_up`].
    fn give_up(&mut self);
    /// Why there are no more lines.
    fn ending(&mut self) -> String;
}

impl<S: Streams> Link for S {
    fn send(&mut self, request: &[u8], _timeout: Duration) {
        if let Some(requests) = &self.lines().requests {
            // where the writer is gone the program is too, which the answer shows
            let _ = requests.send(request.to_vec());
        }
    }

    fn receive(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        line(self, timeout)
    }

    fn give_up(&mut self) {
        Streams::give_up(self);
    }
}

/// Requests to a program and lines from it, each through a thread of its own.
pub struct Lines {
    requests: Option<Sender<Vec<u8>>>,
    lines: Receiver<Result<Vec<u8>>>,
}

impl Lines {
    /// Starts the threads; they end when what they write to or read from does.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn new(to: impl Write + Send + 'static, from: impl Read + Send + 'static) -> Result<Lines> {
        let (requests, queue) = channel();
        let (answers, lines) = channel();
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        thread("requests").spawn(move || write_requests(to, queue)).context("cannot start a thread")?;
        thread("answers").spawn(move || read_lines(from, answers)).context("cannot start a thread")?;
        Ok(Lines { requests: Some(requests), lines })
    }

    /// Ends the writer, which closes the program's input.
    pub fn close(&mut self) {
        self.requests = None;
    }
}

/// Waits for the next line; a signal ends the waiting where what is under way can be dropped.
fn line(program: &mut impl Streams, timeout: Duration) -> Result<Vec<u8>> {
    let started = Instant::now();
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        match program.lines().lines.recv_timeout(left.min(LOOK)) {
            Ok(line) => return line,
            Err(RecvTimeoutError::Timeout) if left > LOOK => signals::check()?,
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {} s", timeout.as_secs_f64()),
            Err(RecvTimeoutError::Disconnected) => bail!("{}", program.ending()),
        }
    }
}

/// Waits for the line by which a program says that it is ready.
pub fn wait_until_ready(program: &mut impl Streams, timeout: Duration) -> Result<()> {
    ensure_ready(&line(program, timeout)?)
}

fn write_requests(mut to: impl Write, queue: Receiver<Vec<u8>>) {
    for request in queue {
        if to.write_all(&request).and_then(|()| to.flush()).is_err() {
            // the program is gone; whoever waits for its answer learns that
            return;
        }
    }
}

/// Sends every line on, until the output ends or a line is too long.
fn read_lines(from: impl Read, answers: Sender<Result<Vec<u8>>>) {
    let mut reader = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        let read = reader.by_ref().take(MAX_ANSWER).read_until(b'\n', &mut line);
        let answer = match read {
            Ok(0) => return,
            Ok(_) if line.ends_with(b"\n") => Ok(line),
            Ok(length) if length as u64 == MAX_ANSWER => Err(anyhow!("an answer of more than {MAX_ANSWER} bytes")),
            Ok(_) => Err(anyhow!("its output ended within a line")),
            Err(e) => Err(anyhow!("its output cannot be read: {e}")),
        };
        let last = answer.is_err();
        if answers.send(answer).is_err() || last {
            return;
        }
    }
}
