//! Any program as a reward: a process per rank, started with the run, that scores batches sent to its standard input by
//! [`super::protocol`].
//!
//! Its standard output is for the protocol's lines alone; what it writes to standard error appears on rldiff's.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{anyhow, Context, Result};

use super::{
    lines::{wait_until_ready, Lines, Streams},
    protocol::{External, Link, Program},
    stderr::StandardError,
};
use crate::{config::CommandReward as Settings, excerpt::escaped};

/// How long a process may take to end after its input did.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module.
pub type CommandReward = External<Settings>;

impl Program for Settings {
    type Link = Process;
    const NAME: &'static str = "command";

    fn shown(&self) -> String {
        format!("reward command {}", escaped(self.command.join(" ").as_bytes()))
    }

    const ADVICE: &'static str =
        ": its standard output is for the lines of the protocol alone, what it prints must go to \
                                  standard error (Python: print(…, file=sys.stderr))";

    fn start_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.start_timeout_seconds)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }

    fn restarts(&self) -> usize {
        self.restarts
    }

    fn open(&self) -> Result<Process> {
        let mut process = Process::start(self)?;
        match wait_until_ready(&mut process, self.start_timeout(), Self::ADVICE) {
            Ok(()) => Ok(process),
            Err(e) => {
                Link::give_up(&mut process);
                Err(self.failed_at_start(e, &Link::remarks(&mut process)))
            }
        }
    }
}

/// A running program.
pub struct Process {
    /// It in messages.
    shown: String,
    /// Its file, as it was given.
    program: String,
    child: Child,
    standard_error: StandardError,
    lines: Lines,
    /// How long it may take to end once its input did: nothing after a failure.
    patience: Duration,
}

impl Process {
    fn start(settings: &Settings) -> Result<Process> {
        let (program, arguments) = settings.command.split_first().context("the reward's command is empty")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // its own group, so that what it started is ended with it
            .process_group(0)
            .spawn()
            .map_err(|e| anyhow!("cannot start {}: {}", settings.shown(), why_not(program, &e)))?;
        let lines = Lines::new(child.stdin.take().expect("piped"), child.stdout.take().expect("piped"))?;
        let standard_error = StandardError::new(child.stderr.take().expect("piped"))?;
        let (shown, program) = (settings.shown(), program.clone());
        Ok(Process { shown, program, child, standard_error, lines, patience: FAREWELL })
    }

    fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
                _ => return None,
            }
        }
    }
}

impl Streams for Process {
    fn lines(&mut self) -> &mut Lines {
        &mut self.lines
    }

    fn give_up(&mut self) {
        self.patience = Duration::ZERO;
    }

    /// How a process that closed its output ended.
    fn ending(&mut self) -> String {
        match self.wait(FAREWELL) {
            Some(status) => format!("it has ended: {}{}", how(status), self.of_shell(status)),
            None => "its standard output is closed, but it still runs".to_string(),
        }
    }

    fn remarks(&mut self) -> String {
        self.standard_error.finish();
        self.standard_error.last_lines()
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "in an unknown way".to_string(),
    }
}

impl Process {
    /// What the codes mean by which `env` and shells say that they cannot start something.
    fn of_shell(&self, status: ExitStatus) -> &'static str {
        match status.code() {
            Some(126 | 127) if first_line(&self.program).is_some_and(|line| line.ends_with('\r')) => {
                " (its first line ends with a carriage return: save the file with Unix line ends)"
            }
            Some(126) => " (something is there that cannot be executed)",
            Some(127) => " (a program was not found)",
            _ => "",
        }
    }
}

/// Why a program cannot be started, and what to do about it.
fn why_not(program: &str, error: &io::Error) -> String {
    let file = Path::new(program);
    let more = match error.kind() {
        _ if file.is_dir() => ": it is a folder".to_string(),
        ErrorKind::NotFound if program.contains('/') && file.exists() => match first_line(program) {
            Some(line) if line.ends_with('\r') => {
                format!(": its first line is {}: save the file with Unix line ends", escaped(line.as_bytes()))
            }
            Some(line) => format!(": the interpreter of its first line, {}, is not there", escaped(line.as_bytes())),
            None => String::new(),
        },
        ErrorKind::NotFound if !program.contains('/') => ": no program of this name is in the PATH".to_string(),
        ErrorKind::PermissionDenied => {
            ": it is not executable (chmod +x), or its interpreter should come first (command = [\"python3\", …])"
                .to_string()
        }
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => {
            ": it is no program, and no script whose first line begins with #!".to_string()
        }
        _ => String::new(),
    };
    format!("{error}{more}")
}

/// The first line of a script, without its LF.
fn first_line(program: &str) -> Option<String> {
    let mut start = Vec::new();
    File::open(program).ok()?.take(256).read_to_end(&mut start).ok()?;
    let line = start.split(|&byte| byte == b'\n').next().filter(|line| line.starts_with(b"#!"))?;
    Some(String::from_utf8_lossy(line).into_owned())
}

impl Drop for Process {
    fn drop(&mut self) {
        self.lines.close();
        // an idle program ends by itself; a busy or hung one is not waited for longer
        let (shown, given_up) = (&self.shown.clone(), self.patience.is_zero());
        match self.wait(self.patience) {
            Some(status) if !given_up && !status.success() => {
                self.standard_error.finish();
                let last = self.standard_error.last_lines();
                log::warn!("{shown}: at its end, when its input was closed: {}{last}", how(status));
            }
            Some(_) => self.standard_error.finish(),
            None => {
                if !given_up {
                    let limit = FAREWELL.as_secs_f64();
                    log::info!(
                        "{shown}: at its end: it still runs {limit} s after its input was closed, and is killed"
                    );
                }
                // SAFETY: a plain system call; the group is the one made in `start`, and its leader is not reaped yet
                unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
                let _ = self.child.wait();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::{prompts::Prompt, rewards::Reward};

    /// A shell that says it is ready and then runs `script`.
    fn shell(script: &str, restarts: usize) -> Settings {
        let script = format!("echo '{{\"rldiff_reward\": 1}}'; {script}");
        let command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        Settings { command, timeout_seconds: 1.0, start_timeout_seconds: 5.0, restarts }
    }

    fn score(settings: &Settings) -> Result<Vec<f32>> {
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        Ok(CommandReward::start(settings.clone())?.score(&images, &vec![Prompt::default(); 2])?.rewards)
    }

    #[test]
    fn scores_come_back_in_order() {
        assert_eq!(score(&shell(r#"read x; echo '{"batch": 1, "scores": [0.5, -2]}'"#, 0)).unwrap(), [0.5, -2.0]);
        let scores = score(&shell(r#"read x; echo '{"batch": 1, "scores": [null, 3]}'"#, 0)).unwrap();
        assert!(scores[0].is_nan() && scores[1] == 3.0);
    }

    /// What the program sees: the header's line and the bytes after it.
    #[test]
    fn the_program_gets_prompts_ids_and_pixels() {
        let folder = tempfile::tempdir().unwrap();
        let pixels: Vec<f32> = (0..24).map(|i| i as f32 / 255.0).collect();
        let images = Tensor::from_slice(&pixels).view([2, 3, 2, 2]);
        let prompts = ["a cat", "a \"dog\"\n"].map(|t| Prompt { text: t.into(), objects: vec!["o".into()] });
        let header = "{\"batch\":1,\"count\":2,\"height\":2,\"width\":2,\"ids\":[\"t-1\",\"t-2\"],\"prompts\":\
                      [{\"text\":\"a cat\",\"objects\":[\"o\"]},{\"text\":\"a \\\"dog\\\"\\n\",\"objects\":[\"o\"]}]}\n";
        let (copy, length) = (folder.path().join("request"), header.len() + 24);
        let answer = r#"{"batch": 1, "scores": [1, 2]}"#;
        let script = format!("head -c {length} > {}; echo '{answer}'; cat > /dev/null", copy.display());
        let mut reward = CommandReward::start(shell(&script, 0)).unwrap();
        reward.score_with_ids(&images, &prompts, &["t-1".into(), "t-2".into()]).unwrap();
        let request = std::fs::read(&copy).unwrap();
        assert_eq!(&request[..header.len()], header.as_bytes());
        assert_eq!(request[header.len()..][..12], [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
    }

    /// The program has judged before anybody waits for it; the same for the parts of a sum.
    #[test]
    fn a_batch_is_judged_while_something_else_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let judged = ["a", "b"].map(|name| folder.path().join(name));
        let program = |done: &std::path::PathBuf| {
            let script = format!(r#"read x; echo '{{"batch": 1, "scores": [1, 2]}}'; touch {}; cat"#, done.display());
            Box::new(CommandReward::start(shell(&script, 0)).unwrap()) as Box<dyn Reward>
        };
        let parts = judged.iter().map(|done| (0.5, "part".to_string(), program(done))).collect();
        let mut reward = crate::rewards::sum::Sum::new(parts, false);
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        let ids = ["x", "y"].map(String::from);
        let pending = reward.begin(&images, &vec![Prompt::default(); 2], &ids).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while !judged.iter().all(|done| done.exists()) {
            assert!(Instant::now() < until, "nobody has judged");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(reward.collect(pending).unwrap().rewards, [1.0, 2.0]);
    }

    #[test]
    fn every_misbehaviour_has_one_clear_message() {
        for (script, wanted) in [
            ("sleep 60", "no answer within 1 s"),
            ("read x; exit 3", "it has ended: exit code 3"),
            ("kill -9 $$", "it has ended: signal 9"),
            ("read x; echo 'no GPU' >&2; exit 3", "exit code 3; last on its standard error: \"no GPU\""),
            ("read x; exec no-such-program", "exit code 127 (a program was not found)"),
            (r#"read x; echo '{"batch": 1, "scores": [1]}'; sleep 60"#, "1 number for 2 pictures"),
            (
                r#"read x; echo '{"batch": 9, "scores": [1, 2]}'; sleep 60"#,
                "an answer to batch 9 where batch 1 was asked",
            ),
            (r#"read x; echo '{"batch": 1, "scores": [1, NaN]}'; sleep 60"#, "NaN and Infinity are not JSON"),
            (r#"read x; echo '{"batch": 1, "scores": [1, 1e300]}'; sleep 60"#, "is beyond f32"),
            ("read x; echo loading; sleep 60", "was expected it wrote \"loading\": expected value"),
            ("read x; echo loading; sleep 60", "standard output is for the lines of the protocol alone"),
            ("read x; printf '{\"batch\"'", "ended within the line \"{\\\"batch\\\"\": it has ended: exit code 0"),
            ("read x; printf '{\"batch\"'; sleep 60", "\"{\\\"batch\\\"\" came, without the end of a line"),
            ("read x; sleep 60", "no answer within 1 s: nothing came; is what it writes flushed"),
            (r#"read x; echo '{"rldiff_reward": 1}'; sleep 60"#, "it said once more that it is ready"),
            (r#"read x; echo '{"score": 1}'; sleep 60"#, "wrote \"{\\\"score\\\": 1}\": missing field `batch`"),
            ("head -c 1000000000 /dev/zero", "more than 4194304 bytes"),
        ] {
            let started = Instant::now();
            let e = format!("{:#}", score(&shell(script, 0)).unwrap_err());
            assert!(e.contains(wanted) && e.contains("reward command \"sh -c") && !e.contains('\n'), "{script}: {e}");
            assert!(e.contains(": in batch 1 (timeout_seconds = 1): "), "{script}: {e}");
            assert!(started.elapsed() < Duration::from_secs(20), "{script}: {:?}", started.elapsed());
        }
    }

    #[test]
    fn a_program_that_does_not_get_ready() {
        let settings = |command: &[&str]| Settings {
            command: command.iter().map(|&c| c.to_owned()).collect(),
            timeout_seconds: 1.0,
            start_timeout_seconds: 0.3,
            restarts: 5,
        };
        for (command, wanted) in [
            (&["/no/such/program"][..], "cannot start reward command \"/no/such/program\""),
            (&["no-such-program"], "no program of this name is in the PATH"),
            (&["/"], "it is a folder"),
            (&["/etc/passwd"], "it is not executable (chmod +x)"),
            (
                &["sleep", "60"],
                "at its start (start_timeout_seconds = 0.3): no ready line {\"rldiff_reward\": 1} within 0.3 s",
            ),
            (
                &["echo", "hello"],
                "first line must be {\"rldiff_reward\": 1}, not \"hello\": its standard output is for",
            ),
            (&["sh", "-c", "echo broken >&2; exit 1"], "exit code 1; last on its standard error: \"broken\""),
            (&["echo", "{\"rldiff_reward\": 2}"], "version 2"),
            (&["false"], "it has ended: exit code 1"),
            (&[], "command is empty"),
        ] {
            let e = format!("{:#}", CommandReward::start(settings(command)).err().unwrap());
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn scripts_that_cannot_be_started_are_explained() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text, wanted) in [
            ("crlf", "#!/bin/sh\r\necho\r\n", "save the file with Unix line ends"),
            ("env", "#!/usr/bin/env sh\r\necho\r\n", "save the file with Unix line ends"),
            (
                "none",
                "#!/no/such/interpreter\n",
                "the interpreter of its first line, \"#!/no/such/interpreter\", is not",
            ),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let command = vec![path.display().to_string()];
            let settings = Settings { command, timeout_seconds: 1.0, start_timeout_seconds: 5.0, restarts: 0 };
            let e = format!("{:#}", CommandReward::start(settings).err().unwrap());
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
    }

    /// What is on its way when a batch is sent is no answer to it.
    #[test]
    fn what_nobody_asked_for_is_no_answer() {
        let answer = r#"echo '{"batch": 1, "scores": [1, 2]}'"#;
        let mut reward = CommandReward::start(shell(&format!("{answer}; sleep 60"), 0)).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        let e = format!("{:#}", reward.score(&images, &vec![Prompt::default(); 2]).unwrap_err());
        assert!(e.contains("behind its ready line, before the first batch was sent, it wrote"), "{e}");
        let script = format!("read x; {answer}; echo noise; sleep 60");
        let mut reward = CommandReward::start(shell(&script, 0)).unwrap();
        assert_eq!(reward.score(&images, &vec![Prompt::default(); 2]).unwrap().rewards, [1.0, 2.0]);
        std::thread::sleep(Duration::from_millis(300));
        let e = format!("{:#}", reward.score(&images, &vec![Prompt::default(); 2]).unwrap_err());
        assert!(e.contains("behind its answer to batch 1, before the next one was sent, it wrote \"noise\""), "{e}");
    }

    /// The first two processes fail, one by a late answer, the third one answers.
    #[test]
    fn a_failed_process_is_started_again_and_gets_the_batch_anew() {
        let folder = tempfile::tempdir().unwrap();
        let count = folder.path().join("count");
        let script = format!(
            "echo x >> {0}; read x; case $(wc -l < {0}) in 1) exit 1;; 2) sleep 1.5;; esac; \
             echo '{{\"batch\": 1, \"scores\": [4, 5]}}'; cat > /dev/null",
            count.display()
        );
        assert_eq!(score(&shell(&script, 2)).unwrap(), [4.0, 5.0]);
        assert_eq!(std::fs::read_to_string(&count).unwrap().lines().count(), 3);
        std::fs::remove_file(&count).unwrap();
        let e = format!("{:#}", score(&shell(&script, 1)).unwrap_err());
        assert!(e.contains("after 1 restart (restarts = 1)") && e.contains("no answer within 1 s"), "{e}");
    }

    #[test]
    fn broken_pictures_are_bad_samples_and_not_sent() {
        let mut reward =
            CommandReward::start(shell(r#"read x; echo '{"batch": 1, "scores": [7]}'; cat > /dev/null"#, 0)).unwrap();
        let good = Tensor::full([1, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        let images = Tensor::cat(&[&good * f64::NAN, good.shallow_clone()], 0);
        let scores = reward.score(&images, &vec![Prompt::default(); 2]).unwrap().rewards;
        assert!(scores[0].is_nan() && scores[1] == 7.0);
        let none = reward.score(&(good * f64::INFINITY), &[Prompt::default()]).unwrap().rewards;
        assert!(none[0].is_nan());
    }
}
