//! Any program as a reward: a process per rank, started with the run, that scores batches sent to its standard input.
//!
//! The program first writes the line `{"rldiff_reward": 1}` (the version of this protocol) once it is ready. Then, for
//! every batch, it reads one JSON line and after it the pictures,
//! ```text
//! {"batch": 7, "count": 2, "height": 512, "width": 512, "ids": ["…", "…"], "prompts": [{"text": "…", "objects": []}, …]}
//! count · height · width · 3 bytes: RGB, rows from the top, picture after picture
//! ```
//! and answers with one line, `{"batch": 7, "scores": [0.25, null]}`: a number for every picture, or null where it
//! cannot judge one (a bad sample, left out of statistics and update). It ends when its input ends. Its standard output
//! is for these lines alone; what it writes to standard error appears on rldiff's. Ids are stable: task, iteration and
//! global sample index.
//!
//! A process that hangs, dies, or answers anything else is ended and started again, and gets the batch anew; after
//! `restarts` of these the run stops.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{check_batch, rgb_bytes, Reward, Scores};
use crate::{config::CommandReward as Settings, prompts::Prompt};

/// A longer answer is not read.
const MAX_ANSWER: u64 = 4 << 20;
const PROTOCOL: u32 = 1;
/// How long a process may take to end after its input did.
const FAREWELL: Duration = Duration::from_secs(2);

/// See the module.
pub struct CommandReward {
    settings: Settings,
    process: Process,
    restarts: usize,
    batch: u64,
}

impl CommandReward {
    /// Starts the process and waits until it is ready.
    ///
    /// # Errors
    /// A program that cannot be started, or does not get ready in time.
    pub fn start(settings: &Settings) -> Result<Self> {
        Ok(CommandReward { process: Process::start(settings)?, settings: settings.clone(), restarts: 0, batch: 0 })
    }

    fn ask(&mut self, request: &[u8], count: usize) -> Result<Vec<Option<f32>>> {
        loop {
            let timeout = Duration::from_secs_f64(self.settings.timeout_seconds);
            let answer = self.process.ask(request.to_vec(), timeout);
            let error = match answer.and_then(|line| parse_answer(&line, self.batch, count)) {
                Ok(scores) => return Ok(scores),
                Err(e) => e.context(self.settings.shown()),
            };
            self.process.patience = Duration::ZERO;
            if self.restarts == self.settings.restarts {
                return Err(error.context(format!("after {} restarts", self.restarts)));
            }
            self.restarts += 1;
            log::warn!("{error:#}; started again ({} of {})", self.restarts, self.settings.restarts);
            self.process = Process::start(&self.settings)?;
        }
    }
}

impl Settings {
    /// The command in messages.
    fn shown(&self) -> String {
        format!("reward command {:?}", self.command.join(" "))
    }
}

#[derive(Serialize)]
struct Header<'a> {
    batch: u64,
    count: usize,
    height: usize,
    width: usize,
    ids: Vec<&'a str>,
    prompts: Vec<&'a Prompt>,
}

impl Reward for CommandReward {
    fn name(&self) -> &str {
        "command"
    }

    /// With the numbers of the pictures as ids.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let ids: Vec<String> = (0..prompts.len()).map(|i| i.to_string()).collect();
        self.score_with_ids(images, prompts, &ids)
    }

    /// Pictures with a value that is not finite are bad samples and not sent.
    fn score_with_ids(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Scores> {
        let n = check_batch(images, prompts)?;
        ensure!(ids.len() == n, "{} ids for {n} pictures", ids.len());
        let pictures = rgb_bytes(images)?;
        let sent: Vec<usize> = (0..n).filter(|&i| pictures.rgb[i].is_some()).collect();
        let mut rewards = vec![f32::NAN; n];
        if sent.is_empty() {
            return Ok(Scores { rewards, ..Scores::default() });
        }
        self.batch += 1;
        let header = Header {
            batch: self.batch,
            count: sent.len(),
            height: pictures.height,
            width: pictures.width,
            ids: sent.iter().map(|&i| ids[i].as_str()).collect(),
            prompts: sent.iter().map(|&i| &prompts[i]).collect(),
        };
        let mut request = serde_json::to_vec(&header)?;
        request.push(b'\n');
        pictures.rgb.iter().flatten().for_each(|rgb| request.extend(rgb));
        let scores = self.ask(&request, sent.len())?;
        for (&i, score) in sent.iter().zip(scores) {
            match score {
                Some(score) => rewards[i] = score,
                None => log::warn!("{} gives no score for {}", self.settings.shown(), ids[i]),
            }
        }
        Ok(Scores { rewards, ..Scores::default() })
    }
}

#[derive(Deserialize)]
struct Answer {
    batch: u64,
    scores: Vec<Option<f64>>,
}

/// Scores of a line of the process.
///
/// # Errors
/// Anything but `count` numbers or nulls for `batch`.
fn parse_answer(line: &[u8], batch: u64, count: usize) -> Result<Vec<Option<f32>>> {
    let answer: Answer = serde_json::from_slice(line).map_err(|e| {
        let start = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
        let nan = ["NaN", "Infinity"].iter().any(|word| String::from_utf8_lossy(line).contains(word));
        let hint = if nan { " (NaN and Infinity are not JSON: null is for a picture without a score)" } else { "" };
        anyhow!("the answer that begins {start:?} is not as it should be: {e}{hint}")
    })?;
    ensure!(answer.batch == batch, "an answer to batch {} where batch {batch} was asked", answer.batch);
    ensure!(answer.scores.len() == count, "{} scores for {count} pictures", answer.scores.len());
    let in_range = |score: f64| {
        let value = score as f32;
        ensure!(value.is_finite(), "the score {score:e} is beyond f32");
        Ok(value)
    };
    answer.scores.into_iter().map(|score| score.map(in_range).transpose()).collect()
}

/// A running program with the threads that write to it and read from it.
struct Process {
    child: Child,
    requests: Option<Sender<Vec<u8>>>,
    lines: Receiver<Result<Vec<u8>>>,
    /// How long it may take to end once its input did: nothing after a failure.
    patience: Duration,
}

#[derive(Deserialize)]
struct Ready {
    rldiff_reward: u32,
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
        let (requests, queue) = channel();
        let (answers, lines) = channel();
        let (stdin, stdout) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut process = Process { child, requests: Some(requests), lines, patience: FAREWELL };
        std::thread::spawn(move || write_requests(stdin, queue));
        std::thread::spawn(move || read_lines(stdout, answers));

        let mut ready = || -> Result<()> {
            let line = process.line(Duration::from_secs_f64(settings.start_timeout_seconds))?;
            let ready: Ready = serde_json::from_slice(&line).map_err(|_| {
                let start = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
                anyhow!("its first line must be {{\"rldiff_reward\": {PROTOCOL}}}, not {start:?}")
            })?;
            ensure!(ready.rldiff_reward == PROTOCOL, "it speaks version {} of the protocol", ready.rldiff_reward);
            Ok(())
        };
        let ready = ready().with_context(|| settings.shown());
        if ready.is_err() {
            process.patience = Duration::ZERO;
        }
        ready.map(|()| process)
    }

    fn ask(&mut self, request: Vec<u8>, timeout: Duration) -> Result<Vec<u8>> {
        if let Some(requests) = &self.requests {
            // where the writer is gone the process is too, which the answer shows
            let _ = requests.send(request);
        }
        self.line(timeout)
    }

    fn line(&mut self, timeout: Duration) -> Result<Vec<u8>> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => bail!("no answer within {} s", timeout.as_secs_f64()),
            Err(RecvTimeoutError::Disconnected) => bail!("it has ended: {}", self.status()),
        }
    }

    /// How a process that closed its output ended.
    fn status(&mut self) -> String {
        match self.wait(FAREWELL) {
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("exit code {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "in an unknown way".to_string(),
            },
            None => "its output is closed, but it still runs".to_string(),
        }
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

impl Drop for Process {
    fn drop(&mut self) {
        // ends the writer, which closes the program's input
        self.requests = None;
        // an idle program ends by itself; a busy or hung one is not waited for longer
        if self.wait(self.patience).is_none() {
            // SAFETY: a plain system call; the group is the one made in `start`, and its leader is not reaped yet
            unsafe { libc::kill(-(self.child.id() as i32), libc::SIGKILL) };
            let _ = self.child.wait();
        }
    }
}

fn write_requests(mut stdin: ChildStdin, queue: Receiver<Vec<u8>>) {
    for request in queue {
        if stdin.write_all(&request).and_then(|()| stdin.flush()).is_err() {
            // the process is gone; whoever waits for its answer learns that
            return;
        }
    }
}

/// Sends every line on, until the output ends or a line is too long.
fn read_lines(stdout: ChildStdout, answers: Sender<Result<Vec<u8>>>) {
    let mut reader = BufReader::new(stdout);
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::mutations::mutate;

    /// A shell that says it is ready and then runs `script`.
    fn shell(script: &str, restarts: usize) -> Settings {
        let script = format!("echo '{{\"rldiff_reward\": 1}}'; {script}");
        let command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        Settings { command, timeout_seconds: 1.0, start_timeout_seconds: 5.0, restarts }
    }

    fn score(settings: &Settings) -> Result<Vec<f32>> {
        let images = Tensor::full([2, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        Ok(CommandReward::start(settings)?.score(&images, &vec![Prompt::default(); 2])?.rewards)
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
        let mut reward = CommandReward::start(&shell(&script, 0)).unwrap();
        reward.score_with_ids(&images, &prompts, &["t-1".into(), "t-2".into()]).unwrap();
        let request = std::fs::read(&copy).unwrap();
        assert_eq!(&request[..header.len()], header.as_bytes());
        assert_eq!(request[header.len()..][..12], [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]);
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
            let e = format!("{:#}", CommandReward::start(&settings(command)).err().unwrap());
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
            CommandReward::start(&shell(r#"read x; echo '{"batch": 1, "scores": [7]}'; cat > /dev/null"#, 0)).unwrap();
        let good = Tensor::full([1, 3, 2, 2], 0.5, (Kind::Float, Device::Cpu));
        let images = Tensor::cat(&[&good * f64::NAN, good.shallow_clone()], 0);
        let scores = reward.score(&images, &vec![Prompt::default(); 2]).unwrap().rewards;
        assert!(scores[0].is_nan() && scores[1] == 7.0);
        let none = reward.score(&(good * f64::INFINITY), &[Prompt::default()]).unwrap().rewards;
        assert!(none[0].is_nan());
    }

    fn mutate_answers(rounds: usize) {
        let good =
            [&br#"{"batch": 3, "scores": [0.5, null, -1e-3]}"#[..], br#"{"scores":[1,2,3],"batch":3,"more":{}}"#];
        mutate(&good.map(<[u8]>::to_vec), rounds, |line| {
            if let Ok(scores) = parse_answer(line, 3, 3) {
                assert!(scores.len() == 3 && scores.iter().flatten().all(|s| s.is_finite()));
            }
        });
    }

    #[test]
    fn mutated_answers_never_panic() {
        mutate_answers(10_000);
    }

    #[test]
    #[ignore = "200,000 mutated answers"]
    fn many_mutated_answers_never_panic() {
        mutate_answers(200_000);
    }
}
