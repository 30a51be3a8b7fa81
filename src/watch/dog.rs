//! The thread that compares the record with the limits.
//!
//! Ranks talk through files in the run's folder, and only in an alarm: MPI belongs to the loop's thread, which hangs
//! then. Until an alarm a rank asks the file system twice a second whether there is one.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{channel, RecvTimeoutError, Sender},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{record, verdict::verdict, State, REWARD};
use crate::{comm::end_world, streams::complain};

const TICK: Duration = Duration::from_millis(200);
/// Between two looks for the alarm of another rank.
const LOOK: Duration = Duration::from_millis(500);
/// What the others have for their answer: two looks and some patience with the file system.
const GRACE: Duration = Duration::from_millis(1500);
/// Exit code of a run that was ended because a rank was late.
const EXIT_CODE: i32 = 1;

/// Seconds after which the run is ended; 0 for never.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// `run.collective_limit`.
    pub collective: f64,
    /// `run.reward_limit`.
    pub reward: f64,
}

/// Watches this rank until it is dropped.
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// `folder` is one that all ranks see, as [`super::clear`] leaves it; `hosts` in rank order.
    pub fn start(folder: PathBuf, rank: usize, hosts: Vec<String>, limits: Limits) -> std::io::Result<Self> {
        let (stop, stopped) = channel();
        let dog = Dog { folder, rank, hosts, limits };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            let mut looked = Instant::now();
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                dog.check();
                if looked.elapsed() >= LOOK {
                    looked = Instant::now();
                    if dog.alarm().exists() {
                        dog.put_down();
                    }
                }
            }
        })?;
        Ok(Watchdog { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // a panic of the thread has ended the process
            let _ = thread.join();
        }
    }
}

struct Dog {
    folder: PathBuf,
    rank: usize,
    hosts: Vec<String>,
    limits: Limits,
}

/// Whether a watchdog writes files of this name.
pub(super) fn is_own(name: &str) -> bool {
    let of_rank = name.strip_prefix("rank-").and_then(|name| name.strip_suffix(".json").or(name.strip_suffix(".tmp")));
    name == "alarm" || of_rank.is_some_and(|rank| rank.parse::<usize>().is_ok())
}

impl Dog {
    fn alarm(&self) -> PathBuf {
        self.folder.join("alarm")
    }

    fn answer(&self, rank: usize) -> PathBuf {
        self.folder.join(format!("rank-{rank:03}.json"))
    }

    fn check(&self) {
        let (reward, waiting) = {
            let record = record();
            let reward = record.stages.last().filter(|stage| stage.name == REWARD);
            (
                reward.map(|stage| (stage.since.elapsed().as_secs_f64(), record.state(self.rank).doing)),
                record.collective.as_ref().map(|c| (c.since.elapsed().as_secs_f64(), c.name)),
            )
        };
        if let Some((seconds, doing)) = reward {
            if exceeds(seconds, self.limits.reward) {
                let host = &self.hosts[self.rank];
                self.end(&format!(
                    "rank {} on {host} is late: it is in {doing} (run.reward_limit = {} s)",
                    self.rank, self.limits.reward
                ));
            }
        }
        if let Some((seconds, name)) = waiting {
            if exceeds(seconds, self.limits.collective) {
                self.alarm_others(name, seconds);
            }
        }
    }

    /// Only the first rank to raise the alarm judges; another that is still alive after the judge's time judges too.
    fn alarm_others(&self, name: &str, seconds: f64) {
        let raised = fs::OpenOptions::new().write(true).create_new(true).open(self.alarm());
        let limit = self.limits.collective;
        match raised {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && seconds < limit + 3.0 => return,
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => self.end(&format!(
                "rank {} on {} has waited in {name} for {seconds:.1} s (run.collective_limit = {limit} s); which rank is \
                 late cannot be found out: {}: {e}",
                self.rank,
                self.hosts[self.rank],
                self.folder.display()
            )),
            _ => {}
        }
        self.put_down();
        let asked = Instant::now();
        let states = loop {
            let states: Vec<Option<State>> = (0..self.hosts.len()).map(|rank| read(&self.answer(rank))).collect();
            if asked.elapsed() > GRACE || states.iter().all(Option::is_some) {
                break states;
            }
            std::thread::sleep(TICK / 2);
        };
        self.end(&format!("{} (run.collective_limit = {limit} s)", verdict(&states, &self.hosts)));
    }

    /// Writes what this rank is doing where the others read it.
    fn put_down(&self) {
        let state = record().state(self.rank);
        let path = self.answer(self.rank);
        let temporary = path.with_extension("tmp");
        let write = || -> anyhow::Result<()> {
            fs::write(&temporary, serde_json::to_vec(&state)?)?;
            Ok(fs::rename(&temporary, &path)?)
        };
        if let Err(e) = write() {
            log::error!("rank {}: {}: {e:#}", self.rank, path.display());
        }
    }

    fn end(&self, why: &str) -> ! {
        complain(&format!("error: {why}\n"));
        end_world(EXIT_CODE)
    }
}

fn exceeds(seconds: f64, limit: f64) -> bool {
    limit > 0.0 && seconds > limit
}

fn read(path: &Path) -> Option<State> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
