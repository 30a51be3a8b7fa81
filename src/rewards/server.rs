//! A reward server: [`super::protocol`] over a TCP or local socket, or by HTTP ([`super::http`]), for a program that several
//! ranks share, or that runs on another machine.
//!
//! On a socket every rank has a connection of its own. The server greets each with the protocol's first line and then
//! answers its batches in order; connections may be served at the same time or in turn. What is sent is not encrypted: use
//! it within a machine or a closed network.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream, ToSocketAddrs},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use anyhow::{anyhow, Result};

use super::{
    http::Http,
    lines::{wait_until_ready, Lines, Streams},
    protocol::{External, Link, Program},
};
use crate::{config::ServerReward as Settings, signals};

/// How often a server that does not listen yet is tried.
const PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub type ServerReward = External<Settings>;

impl Program for Settings {
    type Link = Connection;
    const NAME: &'static str = "server";

    fn shown(&self) -> String {
        format!("reward server {}", self.address)
    }

    const ADVICE: &'static str = "";

    fn start_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.start_timeout_seconds)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }

    fn restarts(&self) -> usize {
        self.restarts
    }

    /// A server that does not listen yet is waited for.
    fn open(&self) -> Result<Connection> {
        let patience = self.start_timeout();
        let opened = match self.address.starts_with("http://") {
            true => Http::open(&self.address, patience).map(Connection::Http),
            false => Stream::open(&self.address, patience).map(Connection::Stream),
        };
        opened.map_err(|e| self.failed_at_start(e, ""))
    }
}

/// Asks `attempt` until it succeeds or `until` is over; its last error. A signal ends it.
pub(super) fn insist<T>(until: Instant, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match attempt() {
            Err(_) if Instant::now() + PAUSE < until => {
                signals::check()?;
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}

/// A rank's way to the server.
pub enum Connection {
    Stream(Stream),
    Http(Http),
}

impl Link for Connection {
    fn send(&mut self, request: &[u8], timeout: Duration) {
        match self {
            Connection::Stream(stream) => stream.send(request, timeout),
            Connection::Http(http) => http.send(request, timeout),
        }
    }

    fn receive(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        match self {
            Connection::Stream(stream) => stream.receive(timeout),
            Connection::Http(http) => http.receive(timeout),
        }
    }

    fn give_up(&mut self) {
        match self {
            Connection::Stream(stream) => Link::give_up(stream),
            Connection::Http(http) => http.give_up(),
        }
    }
}

enum Socket {
    Tcp(TcpStream),
    Local(UnixStream),
}

impl Socket {
    fn connect(address: &str, until: Instant) -> io::Result<Socket> {
        if let Some(path) = address.strip_prefix("unix:") {
            return UnixStream::connect(path).map(Socket::Local);
        }
        let patience = until.saturating_duration_since(Instant::now()).max(PAUSE);
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for host in address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&host, patience) {
                Ok(stream) => {
                    // a batch is one write, its answer one line: nothing is gained by waiting for more
                    stream.set_nodelay(true)?;
                    return Ok(Socket::Tcp(stream));
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn try_clone(&self) -> io::Result<Socket> {
        match self {
            Socket::Tcp(stream) => stream.try_clone().map(Socket::Tcp),
            Socket::Local(stream) => stream.try_clone().map(Socket::Local),
        }
    }

    fn shutdown(&self) {
        // fails only where the other side was faster
        let _ = match self {
            Socket::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Socket::Local(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.read(buffer),
            Socket::Local(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.write(buffer),
            Socket::Local(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.flush(),
            Socket::Local(stream) => stream.flush(),
        }
    }
}

/// A connection on a socket.
pub struct Stream {
    lines: Lines,
    socket: Socket,
}

impl Stream {
    fn open(address: &str, patience: Duration) -> Result<Stream> {
        let until = Instant::now() + patience;
        let socket = insist(until, || Ok(Socket::connect(address, until)?))
            .map_err(|e| anyhow!("cannot connect within {} s: {e}", patience.as_secs_f64()))?;
        let (to, from) = (socket.try_clone()?, socket.try_clone()?);
        let mut stream = Stream { lines: Lines::new(to, from)?, socket };
        wait_until_ready(&mut stream, until.saturating_duration_since(Instant::now()), "")?;
        Ok(stream)
    }
}

impl Streams for Stream {
    fn lines(&mut self) -> &mut Lines {
        &mut self.lines
    }

    fn give_up(&mut self) {
        self.socket.shutdown();
    }

    fn ending(&mut self) -> String {
        "it has closed the connection".to_string()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // ends both threads, whatever they wait for
        self.socket.shutdown();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        net::TcpListener,
        os::unix::net::UnixListener,
    };

    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{prompts::Prompt, rewards::Reward};

    fn settings(address: &str, restarts: usize) -> Settings {
        Settings { address: address.into(), timeout_seconds: 1.0, start_timeout_seconds: 2.0, restarts }
    }

    /// A server that treats its connections one after the other by `each`, given their number.
    fn server(each: impl Fn(usize, TcpStream) + Send + 'static) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                each(number, stream.unwrap());
            }
        });
        address
    }

    /// Greets, reads one batch of two pictures of 2 × 2, and writes `answer`.
    fn answer(mut stream: impl Read + Write, answer: &[u8]) {
        stream.write_all(b"{\"rldiff_reward\": 1}\n").unwrap();
        let mut reader = BufReader::new(&mut stream);
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap_or(0) == 0 {
            return;
        }
        assert!(header.contains("\"count\":2") && header.ends_with('\n'), "{header}");
        reader.read_exact(&mut [0; 24]).unwrap();
        // the client may have gone
        let _ = stream.write_all(answer);
    }

    fn score(settings: &Settings) -> Result<Vec<f32>> {
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        Ok(ServerReward::start(settings.clone())?.score(&images, &vec![Prompt::default(); 2])?.rewards)
    }

    #[test]
    fn scores_over_both_kinds_of_sockets() {
        let address = server(|_, stream| answer(stream, b"{\"batch\": 1, \"scores\": [0.5, null]}\n"));
        let scores = score(&settings(&address, 0)).unwrap();
        assert!(scores[0] == 0.5 && scores[1].is_nan());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || answer(listener.accept().unwrap().0, b"{\"batch\": 1, \"scores\": [1, -2]}\n"));
        assert_eq!(score(&settings(&format!("unix:{}", path.display()), 0)).unwrap(), [1.0, -2.0]);
    }

    #[test]
    fn every_misbehaviour_has_one_clear_message() {
        let long = vec![b'x'; 8 << 20];
        for (said, wanted) in [
            (&b""[..], "it has closed the connection"),
            (b"{\"batch\"", "ended within the line \"{\\\"batch\\\"\": it has closed"),
            (b"{\"batch\": 1, \"scores\": [1]}\n", "1 number for 2 pictures"),
            (b"{\"batch\": 2, \"scores\": [1, 2]}\n", "an answer to batch 2 where batch 1 was asked"),
            (b"{\"batch\": 1, \"scores\": [1, NaN]}\n", "NaN and Infinity are not JSON"),
            (b"{\"batch\": 1, \"scores\": [1, 1e300]}\n", "is beyond f32"),
            (&long, "more than 4194304 bytes"),
        ] {
            let said = said.to_vec();
            let address = server(move |_, stream| answer(stream, &said));
            let e = format!("{:#}", score(&settings(&address, 0)).unwrap_err());
            assert!(e.contains(wanted) && e.contains("reward server 127.0.0.1:") && !e.contains('\n'), "{e}");
        }
        let hangs = server(|_, mut stream| {
            stream.write_all(b"{\"rldiff_reward\": 1}\n").unwrap();
            std::thread::sleep(Duration::from_secs(5));
        });
        assert!(format!("{:#}", score(&settings(&hangs, 0)).unwrap_err()).contains("no answer within 1 s"));
        let foreign = server(|_, mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap());
        let e = format!("{:#}", score(&settings(&foreign, 0)).unwrap_err());
        assert!(e.contains("first line must be {\"rldiff_reward\": 1}, not \"HTTP/1.1 400"), "{e}");
    }

    #[test]
    fn nobody_listens() {
        let short = |address: &str| Settings { start_timeout_seconds: 0.3, ..settings(address, 5) };
        // a port that was free a moment ago
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for address in [port.to_string().as_str(), "unix:/no/such/socket"] {
            let e = format!("{:#}", score(&short(address)).unwrap_err());
            let wanted =
                format!("reward server {address}: at its start (start_timeout_seconds = 0.3): cannot connect within");
            assert!(e.contains(&wanted), "{e}");
            assert!(!e.contains('\n'));
        }
    }

    /// The first connection is closed, the second answers late, the third one answers.
    #[test]
    fn a_lost_connection_is_made_again_and_gets_the_batch_anew() {
        let behaviour = |number: usize, mut stream: TcpStream| match number {
            0 => drop(stream.write_all(b"{\"rldiff_reward\": 1}\n")),
            1 => {
                let _ = stream.write_all(b"{\"rldiff_reward\": 1}\n");
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_secs(3));
                    drop(stream);
                });
            }
            _ => answer(stream, b"{\"batch\": 1, \"scores\": [4, 5]}\n"),
        };
        assert_eq!(score(&settings(&server(behaviour), 2)).unwrap(), [4.0, 5.0]);
        let e = format!("{:#}", score(&settings(&server(behaviour), 1)).unwrap_err());
        assert!(e.contains("after 1 restart (restarts = 1)") && e.contains("no answer within 1 s"), "{e}");
    }
}
