//! [`super::protocol`] by HTTP/1.1: an address `http://HOST:PORT/PATH`, for a reward behind a web framework or a load
//! balancer.
//!
//! ```text
//! GET PATH    200, body {"rldiff_reward": 1}, once the server is ready; 503 while it is not
//! POST PATH   body: the batch's JSON line and the pictures; 200, body {"batch": 7, "scores": [0.25, null]}
//! ```
//! Connections are kept open between batches. Redirects and proxies of the environment are not followed.

use std::{
    io::Read,
    sync::mpsc::{channel, Receiver},
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, Context, Result};
use ureq::{http::Response, Agent, Body, Error};

use super::{
    protocol::{ensure_ready, Link, MAX_ANSWER},
    server::insist,
};
use crate::excerpt::escaped;

/// Longest that one question whether the server is ready may take.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// A rank's client.
pub struct Http {
    agent: Agent,
    url: String,
    /// Of the exchange that is under way.
    answer: Option<Receiver<Result<Vec<u8>>>>,
}

/// What a question whether the server is ready came to.
enum Refused {
    /// Nobody listens, or it is not ready yet.
    NotYet(anyhow::Error),
    Never(anyhow::Error),
}

impl Http {
    /// Waits until the server says that it is ready.
    ///
    /// # Errors
    /// It does not within `patience`; it says something else.
    pub fn open(url: &str, patience: Duration) -> Result<Http> {
        let agent = Agent::config_builder().http_status_as_error(false).max_redirects(0).proxy(None).build().into();
        let http = Http { agent, url: url.to_string(), answer: None };
        let asked = insist(Instant::now() + patience, || match http.ready(patience.min(READY_TIMEOUT)) {
            Ok(()) => Ok(Ok(())),
            Err(Refused::Never(e)) => Ok(Err(e)),
            Err(Refused::NotYet(e)) => Err(e),
        });
        asked.map_err(|e| anyhow!("not ready within {} s: {e}", patience.as_secs_f64()))??;
        Ok(http)
    }

    fn ready(&self, timeout: Duration) -> Result<(), Refused> {
        let sent = self.agent.get(&self.url).config().timeout_global(Some(timeout)).build().call();
        let response = sent.map_err(|e| Refused::NotYet(explained(e, timeout)))?;
        let waiting = response.status() == 503;
        match body(response, timeout).and_then(|answer| ensure_ready(&answer)) {
            Ok(()) => Ok(()),
            Err(e) if waiting => Err(Refused::NotYet(e)),
            Err(e) => Err(Refused::Never(e)),
        }
    }
}

impl Link for Http {
    /// The exchange has a thread of its own.
    fn send(&mut self, request: &[u8], timeout: Duration) {
        let (done, answer) = channel();
        let (agent, url, request) = (self.agent.clone(), self.url.clone(), request.to_vec());
        std::thread::spawn(move || {
            let post = agent.post(&url).content_type("application/octet-stream");
            let sent = post.config().timeout_global(Some(timeout)).build().send(&request[..]);
            // nobody waits any more where the run has ended
            let _ = done.send(sent.map_err(|e| explained(e, timeout)).and_then(|response| body(response, timeout)));
        });
        self.answer = Some(answer);
    }

    fn receive(&mut self, _timeout: Duration) -> Result<Vec<u8>> {
        let answer = self.answer.take().context("nothing was asked")?;
        // the exchange has its own time limit
        answer.recv().context("the thread of the exchange has ended")?
    }

    /// A failed exchange's connection is not used again.
    fn give_up(&mut self) {
        self.answer = None;
    }
}

/// The body of an answer with status 200.
fn body(mut response: Response<Body>, timeout: Duration) -> Result<Vec<u8>> {
    let status = response.status();
    let mut answer = Vec::new();
    let read = response.body_mut().as_reader().take(MAX_ANSWER + 1).read_to_end(&mut answer);
    if status != 200 {
        bail!("it answered with HTTP status {status}, whose body begins {}", escaped(&answer));
    }
    read.map_err(|e| explained(Error::from(e), timeout))?;
    if answer.len() as u64 > MAX_ANSWER {
        bail!("an answer of more than {MAX_ANSWER} bytes");
    }
    Ok(answer)
}

/// An error of the library in one line of this program's words.
fn explained(error: Error, timeout: Duration) -> anyhow::Error {
    match error {
        Error::Timeout(_) => anyhow!("no answer within {} s", timeout.as_secs_f64()),
        other => anyhow!("{other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        net::{TcpListener, TcpStream},
    };

    use super::*;
    use crate::{
        config::ServerReward as Settings,
        prompts::Prompt,
        rewards::{server::ServerReward, Reward},
    };
    use tch::{Device, Kind, Tensor};

    /// Reads one request; its first line and its body.
    fn request(reader: &mut BufReader<TcpStream>) -> Option<(String, Vec<u8>)> {
        let (mut first, mut length) = (String::new(), 0);
        if reader.read_line(&mut first).unwrap_or(0) == 0 {
            return None;
        }
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        Some((first, body))
    }

    fn ok(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    const READY: &str = "{\"rldiff_reward\": 1}";

    /// A server that answers every connection's requests by `answer`, given the request's first line and body; None hangs.
    fn server(answer: impl Fn(&str, &[u8]) -> Option<Vec<u8>> + Send + Sync + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some((first, body)) = request(&mut reader) {
                    match answer(&first, &body) {
                        // the client may have gone
                        Some(answer) => drop((&stream).write_all(&answer)),
                        None => std::thread::sleep(Duration::from_secs(3)),
                    }
                    if !first.starts_with("GET")
                        && answer(&first, &body).is_some_and(|a| !a.starts_with(b"HTTP/1.1 200"))
                    {
                        break;
                    }
                }
            }
        });
        format!("http://{address}/score")
    }

    fn score(address: &str, start_timeout_seconds: f64) -> Result<Vec<f32>> {
        let settings = Settings { address: address.into(), timeout_seconds: 1.0, start_timeout_seconds, restarts: 0 };
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        Ok(ServerReward::start(settings)?.score(&images, &vec![Prompt::default(); 2])?.rewards)
    }

    fn answering(post: Vec<u8>) -> String {
        server(move |first, body| match first.starts_with("GET /score ") {
            true => Some(ok(READY)),
            false => {
                assert!(first.starts_with("POST /score "), "{first}");
                let line = body.iter().position(|&b| b == b'\n').unwrap();
                assert_eq!(body.len() - line - 1, 2 * 2 * 2 * 3);
                Some(post.clone())
            }
        })
    }

    #[test]
    fn scores_with_both_kinds_of_lengths() {
        let plain = ok("{\"batch\": 1, \"scores\": [0.5, null]}\n");
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n{\"batch\": 1, \"score\r\n\
            10\r\ns\": [0.5, null]}\r\n0\r\n\r\n";
        for answer in [plain, chunked.to_vec()] {
            let scores = score(&answering(answer), 2.0).unwrap();
            assert!(scores[0] == 0.5 && scores[1].is_nan());
        }
    }

    #[test]
    fn a_connection_is_used_again() {
        let settings =
            |address: String| Settings { address, timeout_seconds: 1.0, start_timeout_seconds: 2.0, restarts: 0 };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/", listener.local_addr().unwrap());
        // one connection only
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            for answer in [READY, "{\"batch\": 1, \"scores\": [1, 2]}", "{\"batch\": 2, \"scores\": [3, 4]}"] {
                request(&mut reader).unwrap();
                (&stream).write_all(&ok(answer)).unwrap();
            }
        });
        let mut reward = ServerReward::start(settings(address)).unwrap();
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        for expected in [[1.0, 2.0], [3.0, 4.0]] {
            assert_eq!(reward.score(&images, &vec![Prompt::default(); 2]).unwrap().rewards, expected);
        }
    }

    #[test]
    fn every_misbehaviour_has_one_clear_message() {
        let long = ok(&"x".repeat(5 << 20));
        for (answer, wanted) in [
            (b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nhelp".to_vec(), "HTTP status 500"),
            (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n".to_vec(), "HTTP status 302"),
            (ok(""), "was expected it wrote \"\": EOF"),
            (ok("{\"batch\": 1, \"scores\": [1]}"), "1 number for 2 pictures"),
            (ok("{\"batch\": 2, \"scores\": [1, 2]}"), "an answer to batch 2 where batch 1 was asked"),
            (ok("{\"batch\": 1, \"scores\": [1, NaN]}"), "NaN and Infinity are not JSON"),
            (long, "more than 4194304 bytes"),
            (b"nonsense\r\n\r\n".to_vec(), "http"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{\"batch\"".to_vec(), "no answer within 1 s"),
        ] {
            let e = format!("{:#}", score(&answering(answer), 2.0).unwrap_err());
            assert!(e.contains(wanted) && e.contains("reward server http://127.0.0.1:") && !e.contains('\n'), "{e}");
        }
        let hangs = server(|first, _| first.starts_with("GET").then(|| ok(READY)));
        assert!(format!("{:#}", score(&hangs, 2.0).unwrap_err()).contains("no answer within 1 s"));
    }

    #[test]
    fn the_server_must_be_ready() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let e = format!("{:#}", score(&format!("http://{port}/"), 0.3).unwrap_err());
        assert!(e.contains("not ready within 0.3 s") && e.contains("refused") && !e.contains('\n'), "{e}");
        let foreign = server(|_, _| Some(ok("<html>")));
        let e = format!("{:#}", score(&foreign, 2.0).unwrap_err());
        assert!(e.contains("first line must be {\"rldiff_reward\": 1}, not \"<html>\""), "{e}");
        let absent = server(|_, _| Some(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec()));
        let e = format!("{:#}", score(&absent, 2.0).unwrap_err());
        assert!(e.contains("HTTP status 404"), "{e}");
        // 503 while it loads its model
        let asked = std::sync::atomic::AtomicUsize::new(0);
        let slow = server(move |first, _| match first.starts_with("GET") {
            true if asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) < 3 => {
                Some(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n".to_vec())
            }
            true => Some(ok(READY)),
            false => Some(ok("{\"batch\": 1, \"scores\": [1, 2]}")),
        });
        assert_eq!(score(&slow, 2.0).unwrap(), [1.0, 2.0]);
    }
}
