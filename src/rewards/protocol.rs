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

use super::{check_batch, rgb_bytes, Pending, Reward, Scores};
use crate::{prompts::Prompt, signals};

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
    /// The program failed: nothing is waited for any more when this is dropped.
    fn give_up(&mut self);
}

#[derive(Deserialize)]
struct Ready {
    rldiff_reward: u32,
}

/// Fails where this is not the line by which a program says that it is ready.
pub fn ensure_ready(line: &[u8]) -> Result<()> {
    let ready: Ready = serde_json::from_slice(line).map_err(|_| {
        let start = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
        anyhow!("its first line must be {{\"rldiff_reward\": {PROTOCOL}}}, not {start:?}")
    })?;
    ensure!(ready.rldiff_reward == PROTOCOL, "it speaks version {} of the protocol", ready.rldiff_reward);
    Ok(())
}

/// What the kinds of programs differ in.
pub trait Program {
    type Link: Link;
    /// The reward's name.
    const NAME: &'static str;
    /// The program in messages.
    fn shown(&self) -> String;
    /// How long a batch may take.
    fn timeout(&self) -> Duration;
    /// How often, in a run, it is opened again after a failure.
    fn restarts(&self) -> usize;
    /// Opens the program and waits until it is ready.
    fn open(&self) -> Result<Self::Link>;
}

/// Any program as a reward.
pub struct External<P: Program> {
    program: P,
    link: P::Link,
    restarts: usize,
    batch: u64,
}

impl<P: Program> External<P> {
    /// # Errors
    /// A program that cannot be opened, or does not get ready in time.
    pub fn start(program: P) -> Result<Self> {
        Ok(External { link: program.open()?, program, restarts: 0, batch: 0 })
    }

    /// The answer to the request that was sent last; asks again after a failure.
    fn answer(&mut self, request: &[u8], count: usize) -> Result<Vec<Option<f32>>> {
        loop {
            let answer = self.link.receive(self.program.timeout());
            let error = match answer.and_then(|line| parse_answer(&line, self.batch, count)) {
                Ok(scores) => return Ok(scores),
                Err(e) => e.context(self.program.shown()),
            };
            self.link.give_up();
            // a signal may have ended the program as well
            signals::check()?;
            if self.restarts == self.program.restarts() {
                return Err(error.context(format!("after {} restarts", self.restarts)));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutations::mutate;

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
