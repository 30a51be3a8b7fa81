//! Any program as a reward: a process per rank, started with the run, that scores batches sent to its standard input by
//! [`super::protocol`].
//!
//! Its standard output is for the protocol's lines alone; what it writes to standard error appears on rldiff's.

use std::{
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    lines::{wait_until_ready, Lines, Streams},
    protocol::{External, Link, Program},
};
use crate::config::CommandReward as Settings;

/// How long a process may take to end after its input did.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module.
pub type CommandReward = External<Settings>;

impl Program for Settings {
    type Link = Process;
    const NAME: &'static str = "command";

    fn shown(&self) -> String {
        format!("reward command {:?}", self.command.join(" "))
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout_seconds)
    }

    fn restarts(&self) -> usize {
        self.restarts
    }

    fn open(&self) -> Result<Process> {
        let mut process = Process::start(self)?;
        let ready = wait_until_ready(&mut process, Duration::from_secs_f64(self.start_timeout_seconds));
        if ready.is_err() {
            Link::give_up(&mut process);
        }
        ready.with_context(|| self.shown()).map(|()| process)
    }
}

/// A running program.
pub struct Process {
    child: Child,
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
            // its own group, so that what it started is ended with it
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", settings.shown()))?;
        let lines = Lines::new(child.stdin.take().expect("piped"), child.stdout.take().expect("piped"))?;
        Ok(Process { child, lines, patience: FAREWELL })
    }

    fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
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
        let how = match self.wait(FAREWELL) {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "in an unknown way".to_string(),
            },
            None => "its output is closed, but it still runs".to_string(),
        };
        format!("it has ended: {how}")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.lines.close();
        // an idle program ends by itself; a busy or hung one is not waited for longer
        if self.wait(self.patience).is_none() {
            // SAFETY: a plain system call; the group is the one made in `start`, and its leader is not reaped yet
            unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
            let _ = self.child.wait();
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
            (r#"read x; echo '{"batch": 1, "scores": [1]}'; sleep 60"#, "1 scores for 2 pictures"),
            (
                r#"read x; echo '{"batch": 9, "scores": [1, 2]}'; sleep 60"#,
                "an answer to batch 9 where batch 1 was asked",
            ),
            (r#"read x; echo '{"batch": 1, "scores": [1, NaN]}'; sleep 60"#, "NaN and Infinity are not JSON"),
            (r#"read x; echo '{"batch": 1, "scores": [1, 1e300]}'; sleep 60"#, "is beyond f32"),
            ("read x; echo loading; sleep 60", "begins \"loading\\n\""),
            ("read x; printf '{\"batch\"'", "ended within a line"),
            ("head -c 1000000000 /dev/zero", "more than 4194304 bytes"),
        ] {
            let started = Instant::now();
            let e = format!("{:#}", score(&shell(script, 0)).unwrap_err());
            assert!(e.contains(wanted) && e.contains("reward command \"sh -c") && !e.contains('\n'), "{script}: {e}");
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
            (&["sleep", "60"], "no answer within 0.3 s"),
            (&["echo", "hello"], "first line must be {\"rldiff_reward\": 1}, not \"hello\\n\""),
            (&["echo", "{\"rldiff_reward\": 2}"], "version 2"),
            (&["false"], "it has ended: exit code 1"),
            (&[], "command is empty"),
        ] {
            let e = format!("{:#}", CommandReward::start(settings(command)).err().unwrap());
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
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
        assert!(e.contains("after 1 restarts") && e.contains("no answer within 1 s"), "{e}");
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
