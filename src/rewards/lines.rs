//! [`super::protocol`] over a pair of streams: the pipes of a process or a socket.

use std::{
    io::{BufRead, BufReader, Read, Write},
    sync::{
        mpsc::{channel, Receiver, RecvTimeoutError, Sender},
        Arc, Mutex,
    },
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, Context, Result};

use super::protocol::{ensure_ready, Link, MAX_ANSWER, READY};
use crate::{excerpt::escaped, signals};

/// Between two looks for a signal while a program is waited for.
const LOOK: Duration = Duration::from_millis(100);

/// A program at the other end of streams.
pub trait Streams {
    fn lines(&mut self) -> &mut Lines;
    /// As [`Link::give_up`].
    fn give_up(&mut self);
    /// Why there are no more lines.
    fn ending(&mut self) -> String;
    /// As [`Link::remarks`].
    fn remarks(&mut self) -> String {
        String::new()
    }
}

impl<S: Streams> Link for S {
    fn send(&mut self, request: &[u8], _timeout: Duration) {
        if let Some(requests) = &self.lines().requests {
            // where the writer is gone the program is too, which the answer shows
            let _ = requests.send(request.to_vec());
        }
    }

    fn receive(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        line(self, timeout, "answer")
    }

    fn unasked(&mut self) -> Option<Result<Vec<u8>>> {
        let line = self.lines().lines.try_recv().ok()?;
        Some(whole(line, self))
    }

    fn remarks(&mut self) -> String {
        Streams::remarks(self)
    }

    fn give_up(&mut self) {
        Streams::give_up(self);
    }
}

/// Requests to a program and lines from it, each through a thread of its own.
pub struct Lines {
    requests: Option<Sender<Vec<u8>>>,
    lines: Receiver<Result<Vec<u8>, Broken>>,
    /// The beginning of a line whose end has not come.
    begun: Arc<Mutex<Vec<u8>>>,
}

/// Why a line is none.
enum Broken {
    TooLong,
    /// The output ended within it.
    Within(Vec<u8>),
    Unreadable(std::io::Error),
}

impl Lines {
    /// Starts the threads; they end when what they write to or read from does.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn new(to: impl Write + Send + 'static, from: impl Read + Send + 'static) -> Result<Lines> {
        let (requests, queue) = channel();
        let (answers, lines) = channel();
        let begun = Arc::new(Mutex::new(Vec::new()));
        let shared = begun.clone();
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        thread("requests").spawn(move || write_requests(to, queue)).context("cannot start a thread")?;
        thread("answers").spawn(move || read_lines(from, &shared, answers)).context("cannot start a thread")?;
        Ok(Lines { requests: Some(requests), lines, begun })
    }

    /// Ends the writer, which closes the program's input.
    pub fn close(&mut self) {
        self.requests = None;
    }

    /// What has come of a line, where `wanted` has not.
    fn so_far(&self) -> String {
        let begun = self.begun.lock().expect("no thread panics while it holds this");
        match begun.is_empty() {
            true => {
                "nothing came; is what it writes flushed (Python: print(…, flush=True), or python3 -u)?".to_string()
            }
            false => format!("{} came, without the end of a line", escaped(&begun)),
        }
    }
}

/// Waits for the next line; `wanted` is what it should be. A signal ends the waiting where what is under way can be dropped.
fn line(program: &mut impl Streams, timeout: Duration, wanted: &str) -> Result<Vec<u8>> {
    let started = Instant::now();
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        match program.lines().lines.recv_timeout(left.min(LOOK)) {
            Ok(line) => return whole(line, program),
            Err(RecvTimeoutError::Timeout) if left > LOOK => signals::check()?,
            Err(RecvTimeoutError::Timeout) => {
                bail!("no {wanted} within {} s: {}", timeout.as_secs_f64(), program.lines().so_far())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("{}", program.ending()),
        }
    }
}

fn whole(line: Result<Vec<u8>, Broken>, program: &mut impl Streams) -> Result<Vec<u8>> {
    line.map_err(|broken| match broken {
        Broken::TooLong => anyhow!("an answer of more than {MAX_ANSWER} bytes"),
        Broken::Within(begun) => anyhow!("its output ended within the line {}: {}", escaped(&begun), program.ending()),
        Broken::Unreadable(e) => anyhow!("its output cannot be read: {e}"),
    })
}

/// Waits for the line by which a program says that it is ready; `advice` is for one that says something else.
pub fn wait_until_ready(program: &mut impl Streams, timeout: Duration, advice: &str) -> Result<()> {
    let line = line(program, timeout, &format!("ready line {READY}"))?;
    ensure_ready(&line).map_err(|e| anyhow!("{e}{advice}"))
}

fn write_requests(mut to: impl Write, queue: Receiver<Vec<u8>>) {
    for request in queue {
        if to.write_all(&request).and_then(|()| to.flush()).is_err() {
            // the program is gone; whoever waits for its answer learns that
            return;
        }
    }
}

/// Sends every line on, until the output ends or a line is too long. `begun` holds the one that is being read.
fn read_lines(from: impl Read, begun: &Mutex<Vec<u8>>, answers: Sender<Result<Vec<u8>, Broken>>) {
    let mut reader = BufReader::new(from);
    loop {
        let (used, answer) = match reader.fill_buf() {
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => (0, Some(Err(Broken::Unreadable(e)))),
            Ok(come) => {
                let mut line = begun.lock().expect("no thread panics while it holds this");
                let end = come.iter().position(|&byte| byte == b'\n');
                line.extend(&come[..end.map_or(come.len(), |end| end + 1)]);
                match (come.len(), end) {
                    (0, _) if line.is_empty() => return,
                    (0, _) => (0, Some(Err(Broken::Within(std::mem::take(&mut *line))))),
                    _ if line.len() as u64 > MAX_ANSWER => (0, Some(Err(Broken::TooLong))),
                    (_, Some(end)) => (end + 1, Some(Ok(std::mem::take(&mut *line)))),
                    (all, None) => (all, None),
                }
            }
        };
        reader.consume(used);
        let Some(answer) = answer else { continue };
        let last = answer.is_err();
        if answers.send(answer).is_err() || last {
            return;
        }
    }
}
