//! The protocol by which pictures go to a reward that is somebody else's program, and scores come back: over the pipes
//! of a process ([`super::command`]), over a socket or by HTTP ([`super::server`]).
//!
//! The program first writes the line `{"rldiff_reward": 1}` (the version of this protocol) once it is ready. Then, for
//! every batch, it reads one JSON line and after it the pictures,
//! ```text
//! {"batch": 7, "count": 2, "height": 512, "width": 512, "ids": ["…", "…"], "prompts": [{"text": "…", "objects": []}, …]}
//! count · height · width · 3 bytes: RGB, rows from the top, picture after picture
//! ```
//! and answers with one line, `{"batch": 7, "scores": [0.25, null]}`: a number for every picture, or null where it
//! cannot judge one (a bad sample, left out of statistics and update). It ends when its input ends. Ids are stable: task,
//! iteration and global sample index.
//!
//! A program that hangs, dies, or answers anything else is given up and opened again, and gets the batch anew; after
//! `restarts` of these the run stops.

use std::time::Duration;

use anyhow::{anyhow, bail, ensure, Result};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{check_batch, rgb_bytes, whole, Pending, Reward, Scores};
use crate::{excerpt::escaped, prompts::Prompt, signals};

/// A longer answer is not read.
pub const MAX_ANSWER: u64 = 4 << 20;
const PROTOCOL: u32 = 1;

/// A way to a program that is ready for batches. Dropping it parts from the program.
pub trait Link {
    /// Sends a request on its way; whether it arrives, the answer shows. `timeout` is how long the answer may take.
    fn send(&mut self, request: &[u8], timeout: Duration);
    /// The line that answers the request that was sent last.
    ///
    /// # Errors
    /// None within `timeout` from now on, a program that is gone, more than [`MAX_ANSWER`] bytes.
    fn receive(&mut self, timeout: Duration) -> Result<Vec<u8>>;
    /// What has come before anything was asked, if something has.
    fn unasked(&mut self) -> Option<Result<Vec<u8>>> {
        None
    }
    /// What else is to be said of a program that failed, to be put behind the error.
    fn remarks(&mut self) -> String {
        String::new()
    }
    /// The program failed: nothing is waited for any more when this is dropped.
    fn give_up(&mut self);
}

#[derive(Deserialize)]
struct Ready {
    rldiff_reward: u32,
}

/// The line by which a program says that it is ready.
pub const READY: &str = "{\"rldiff_reward\": 1}";

/// Fails where this is not the line by which a program says that it is ready.
pub fn ensure_ready(line: &[u8]) -> Result<()> {
    let ready: Ready =
        serde_json::from_slice(line).map_err(|_| anyhow!("its first line must be {READY}, not {}", escaped(line)))?;
    let version = ready.rldiff_reward;
    ensure!(version == PROTOCOL, "it speaks version {version} of the protocol, this is version {PROTOCOL}");
    Ok(())
}

/// What the kinds of programs differ in.
pub trait Program {
    type Link: Link;
    /// The reward's name.
    const NAME: &'static str;
    /// The program in messages.
    fn shown(&self) -> String;
    /// What is to be done where something else than the protocol's lines has come.
    const ADVICE: &'static str;
    /// How long it may take to get ready.
    fn start_timeout(&self) -> Duration;
    /// How long a batch may take.
    fn timeout(&self) -> Duration;
    /// How often, in a run, it is opened again after a failure.
    fn restarts(&self) -> usize;
    /// Opens the program and waits until it is ready.
    fn open(&self) -> Result<Self::Link>;

    /// An error while the program is started, with what it is about.
    fn failed_at_start(&self, error: anyhow::Error, remarks: &str) -> anyhow::Error {
        let limit = self.start_timeout().as_secs_f64();
        anyhow!("{}: at its start (start_timeout_seconds = {limit}): {error:#}{remarks}", self.shown())
    }

    /// An error in batch number `batch`, with what it is about.
    fn failed_in_batch(&self, batch: u64, error: anyhow::Error, remarks: &str) -> anyhow::Error {
        let limit = self.timeout().as_secs_f64();
        anyhow!("{}: in batch {batch} (timeout_seconds = {limit}): {error:#}{remarks}", self.shown())
    }
}

/// Any program as a reward.
pub struct External<P: Program> {
    program: P,
    link: P::Link,
    restarts: usize,
    batch: u64,
    /// What came before the batch was sent: none of the protocol's lines does.
    early: Option<Result<Vec<u8>>>,
}

impl<P: Program> External<P> {
    /// # Errors
    /// A program that cannot be opened, or does not get ready in time.
    pub fn start(program: P) -> Result<Self> {
        Ok(External { link: program.open()?, program, restarts: 0, batch: 0, early: None })
    }

    /// The answer to the request that was sent last; asks again after a failure.
    fn answer(&mut self, request: &[u8], count: usize) -> Result<Vec<Option<f32>>> {
        loop {
            let scores = match self.early.take() {
                Some(early) => early.and_then(|line| Err(unasked(&line, self.batch, P::ADVICE))),
                None => {
                    let answer = self.link.receive(self.program.timeout());
                    answer.and_then(|line| parse_answer(&line, self.batch, count, P::ADVICE))
                }
            };
            let error = match scores {
                Ok(scores) => return Ok(scores),
                Err(e) => e,
            };
            self.link.give_up();
            // a signal may have ended the program as well
            signals::check()?;
            let error = self.program.failed_in_batch(self.batch, error, &self.link.remarks());
            if self.restarts == self.program.restarts() {
                let (restarts, s) = (self.restarts, if self.restarts == 1 { "" } else { "s" });
                return Err(error.context(format!("given up after {restarts} restart{s} (restarts = {restarts})")));
            }
            self.restarts += 1;
            log::warn!("{error:#}; opened again ({} of {})", self.restarts, self.program.restarts());
            self.link = self.program.open()?;
            self.link.send(request, self.program.timeout());
        }
    }
}

/// A batch that a program has been asked about.
pub struct Asked {
    request: Vec<u8>,
    /// Of all pictures.
    ids: Vec<String>,
    /// Numbers of those that were sent; without any the program was not asked.
    sent: Vec<usize>,
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

impl<P: Program> Reward for External<P> {
    fn name(&self) -> &str {
        P::NAME
    }

    /// With the numbers of the pictures as ids.
    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        let ids: Vec<String> = (0..prompts.len()).map(|i| i.to_string()).collect();
        self.score_with_ids(images, prompts, &ids)
    }

    fn score_with_ids(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Scores> {
        let pending = self.begin(images, prompts, ids)?;
        self.collect(pending)
    }

    /// One batch, so that the program judges while the next one is rolled out.
    fn begin_in_parts(
        &mut self,
        parts: &mut dyn Iterator<Item = Tensor>,
        prompts: &[Prompt],
        ids: &[String],
    ) -> Result<Pending> {
        self.begin(&whole(parts), prompts, ids)
    }

    /// Pictures with a value that is not finite are bad samples and not sent.
    fn begin(&mut self, images: &Tensor, prompts: &[Prompt], ids: &[String]) -> Result<Pending> {
        let n = check_batch(images, prompts)?;
        ensure!(ids.len() == n, "{} ids for {n} pictures", ids.len());
        let pictures = rgb_bytes(images)?;
        let sent: Vec<usize> = (0..n).filter(|&i| pictures.rgb[i].is_some()).collect();
        let mut request = Vec::new();
        if !sent.is_empty() {
            self.batch += 1;
            let header = Header {
                batch: self.batch,
                count: sent.len(),
                height: pictures.height,
                width: pictures.width,
                ids: sent.iter().map(|&i| ids[i].as_str()).collect(),
                prompts: sent.iter().map(|&i| &prompts[i]).collect(),
            };
            request = serde_json::to_vec(&header)?;
            request.push(b'\n');
            pictures.rgb.iter().flatten().for_each(|rgb| request.extend(rgb));
            self.early = self.link.unasked();
            self.link.send(&request, self.program.timeout());
        }
        Ok(Pending::Asked(Asked { request, ids: ids.to_vec(), sent }))
    }

    fn collect(&mut self, pending: Pending) -> Result<Scores> {
        let Pending::Asked(Asked { request, ids, sent }) = pending else {
            bail!("{}: another reward's batch", self.program.shown())
        };
        let mut rewards = vec![f32::NAN; ids.len()];
        if !sent.is_empty() {
            let scores = self.answer(&request, sent.len())?;
            for (&i, score) in sent.iter().zip(scores) {
                match score {
                    Some(score) => rewards[i] = score,
                    None => log::warn!("{} gives no score for {}", self.program.shown(), ids[i]),
                }
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

/// What to say of a line that nobody asked for.
fn unasked(line: &[u8], batch: u64, advice: &str) -> anyhow::Error {
    let when = match batch {
        1 => "behind its ready line, before the first batch was sent".to_string(),
        _ => format!("behind its answer to batch {}, before the next one was sent", batch - 1),
    };
    anyhow!("{when}, it wrote {}{advice}", escaped(line))
}

/// Scores of a line of the process.
///
/// # Errors
/// Anything but `count` numbers or nulls for `batch`.
fn parse_answer(line: &[u8], batch: u64, count: usize, advice: &str) -> Result<Vec<Option<f32>>> {
    let answer: Answer = serde_json::from_slice(line).map_err(|e| {
        let wrote = escaped(line);
        if serde_json::from_slice::<Ready>(line).is_ok() {
            return anyhow!("it said once more that it is ready, {wrote}, where the scores of the batch were expected");
        }
        let nan = ["NaN", "Infinity"].iter().any(|word| String::from_utf8_lossy(line).contains(word));
        let hint = match serde_json::from_slice::<serde_json::Value>(line) {
            _ if nan => " (NaN and Infinity are not JSON: null is for a picture without a score)",
            Ok(serde_json::Value::Object(_)) => "",
            _ => advice,
        };
        let wanted = format!("{{\"batch\": {batch}, \"scores\": [{count} numbers]}}");
        anyhow!("where {wanted} was expected it wrote {wrote}: {e}{hint}")
    })?;
    ensure!(answer.batch == batch, "an answer to batch {} where batch {batch} was asked", answer.batch);
    ensure!(answer.scores.len() == count, "{} for {count} pictures", numbers(answer.scores.len()));
    let in_range = |score: f64| {
        let value = score as f32;
        ensure!(value.is_finite(), "the score {score:e} is beyond f32");
        Ok(value)
    };
    answer.scores.into_iter().map(|score| score.map(in_range).transpose()).collect()
}

fn numbers(count: usize) -> String {
    format!("{count} number{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutations::mutate;

    fn mutate_answers(rounds: usize) {
        let good =
            [&br#"{"batch": 3, "scores": [0.5, null, -1e-3]}"#[..], br#"{"scores":[1,2,3],"batch":3,"more":{}}"#];
        mutate(&good.map(<[u8]>::to_vec), rounds, |line| {
            if let Ok(scores) = parse_answer(line, 3, 3, "") {
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
