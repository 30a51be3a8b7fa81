//! Who holds a folder: a process, in words and as other processes can find it.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::host;

/// First field of a lock.
const FORMAT: &str = "rldiff lock 1";

/// A process that holds a folder, as its lock says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    pub(super) format: String,
    /// Which command: `train`, `eval`, …
    pub command: String,
    pub host: String,
    pub pid: i32,
    /// When the process started, in clock ticks after the machine did: another process of the same number has another.
    pub started: u64,
    /// Of the kernel that runs now: it tells machines of one name apart, and a machine from itself before it was rebooted.
    pub boot: String,
    /// Numbers of processes mean something in the same one only.
    pub pid_namespace: String,
    /// Slurm's; empty outside of a job.
    pub job: String,
    /// Seconds since 1970, by the owner's clock; for people.
    pub since: u64,
    /// Of this lock alone.
    pub token: String,
    /// How often the owner has said that it is still there.
    pub renewals: u64,
}

/// What can be said of an owner's process from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Process {
    Lives,
    Gone,
    /// On another machine, or in a container of its own.
    OutOfSight,
}

impl Owner {
    /// This process, doing `command`.
    pub(super) fn this_process(command: &str) -> Self {
        let pid = std::process::id() as i32;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Owner {
            format: FORMAT.to_owned(),
            command: command.to_owned(),
            host: host::name().unwrap_or_else(|| "an unknown host".to_owned()),
            pid,
            started: start_of(pid).unwrap_or(0),
            boot: line_of("/proc/sys/kernel/random/boot_id"),
            pid_namespace: fs::read_link("/proc/self/ns/pid").unwrap_or_default().display().to_string(),
            job: std::env::var("SLURM_JOB_ID").unwrap_or_default(),
            since: now.as_secs(),
            token: token(now),
            renewals: 0,
        }
    }

    /// The lock in `bytes`; None where they are something else, or not yet all of it.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let owner: Owner = serde_json::from_slice(bytes).ok()?;
        (owner.format == FORMAT && !owner.token.is_empty() && owner.token.bytes().all(|b| b.is_ascii_alphanumeric()))
            .then_some(owner)
    }

    pub(super) fn process(&self) -> Process {
        let here = Owner::this_process("");
        if self.boot.is_empty() || (&self.boot, &self.pid_namespace) != (&here.boot, &here.pid_namespace) {
            return Process::OutOfSight;
        }
        // SAFETY: signal 0 is none; it asks whether there is such a process.
        let asked = unsafe { libc::kill(self.pid, 0) };
        if asked != 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH) {
            return Process::Gone;
        }
        match start_of(self.pid) {
            Some(started) if started == self.started => Process::Lives,
            Some(_) => Process::Gone,
            // a system that hides the processes of other users
            None if asked != 0 => Process::Lives,
            None => Process::Gone,
        }
    }

    /// Was it started by the Slurm job that this process belongs to?
    pub(super) fn is_of_this_job(&self) -> bool {
        !self.job.is_empty() && std::env::var("SLURM_JOB_ID").is_ok_and(|job| job == self.job)
    }
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Owner { command, pid, host, job, .. } = self;
        write!(f, "rldiff {command}, process {pid} on {host}, since {}", local_time(self.since))?;
        if job.is_empty() {
            return Ok(());
        }
        write!(f, ", Slurm job {job}")
    }
}

/// When a process started, in ticks after the machine did; None where there is none that still works.
fn start_of(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // "pid (name) state …"; the name may hold anything
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // the dead wait for somebody to ask how they ended
    (!["Z", "X"].contains(fields.first()?)).then(|| fields.get(19)?.parse().ok())?
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Another one every time, on every host.
fn token(now: std::time::Duration) -> String {
    let random = line_of("/proc/sys/kernel/random/uuid").replace('-', "");
    if random.is_empty() {
        format!("{:x}p{:x}", now.as_nanos(), std::process::id())
    } else {
        random
    }
}

fn local_time(seconds: u64) -> String {
    let mut text = [0u8; 32];
    let seconds = seconds as libc::time_t;
    // SAFETY: both buffers outlive the calls and are as long as said.
    let length = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        libc::localtime_r(&seconds, &mut time);
        libc::strftime(text.as_mut_ptr().cast(), text.len(), c"%F %T".as_ptr(), &time)
    };
    String::from_utf8_lossy(&text[..length]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_its_start() {
        let mine = Owner::this_process("train");
        assert_eq!(mine.process(), Process::Lives);
        let recycled = Owner { started: mine.started + 1, ..mine.clone() };
        assert_eq!(recycled.process(), Process::Gone);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        // ended and not waited for: a zombie
        while start_of(pid).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let ended = Owner { pid, ..mine.clone() };
        assert_eq!(ended.process(), Process::Gone);
        child.wait().unwrap();
        assert_eq!(ended.process(), Process::Gone);
        for elsewhere in
            [Owner { boot: "x".into(), ..mine.clone() }, Owner { pid_namespace: "x".into(), ..mine.clone() }]
        {
            assert_eq!(elsewhere.process(), Process::OutOfSight);
        }
    }

    #[test]
    fn a_lock_comes_back_and_nothing_else_is_one() {
        let mine = Owner::this_process("train");
        let bytes = serde_json::to_vec(&mine).unwrap();
        assert_eq!(Owner::parse(&bytes), Some(mine));
        for other in [&b""[..], b"{}", &bytes[..bytes.len() / 2], b"{\"format\": \"rldiff lock 1\"}", b"my own notes"] {
            assert_eq!(Owner::parse(other), None);
        }
        assert_ne!(Owner::this_process("").token, Owner::this_process("").token);
    }
}
