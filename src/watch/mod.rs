//! What this rank is doing, since when, and what happens when that takes too long.
//!
//! The loop's thread keeps a record: the stage it is in ([`stage`]) and the collective operation it waits in
//! ([`collective`], set by [`crate::comm::Watched`]). A second thread, the [`Watchdog`], compares the record with the
//! limits. A reward that is late is this rank's own fault; a collective that is late is somebody else's, so the first
//! rank to notice raises an alarm, all watchdogs put down what their rank is doing, and the alarmed one names the late
//! rank and ends the run.

mod dog;
mod verdict;

use std::{
    fs,
    path::Path,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use dog::{Limits, Watchdog};

use crate::{
    cannot_write::make_folder,
    comm::{self, Communicator},
    faults, host,
};

/// The stage that `run.reward_limit` is about.
pub const REWARD: &str = "reward";

struct Operation {
    name: &'static str,
    /// Task or the like.
    detail: String,
    since: Instant,
}

struct Record {
    iteration: u64,
    /// Innermost last.
    stages: Vec<Operation>,
    /// Name of the stage that ended last.
    ended: &'static str,
    collective: Option<Operation>,
    /// Collectives entered so far: the same on all ranks that have come equally far.
    entered: u64,
    /// Time spent in collectives so far.
    waited: Duration,
}

static RECORD: Mutex<Record> = Mutex::new(Record {
    iteration: 0,
    stages: Vec::new(),
    ended: "start",
    collective: None,
    entered: 0,
    waited: Duration::ZERO,
});

fn record() -> MutexGuard<'static, Record> {
    // the panic hook ends the process; a poisoned record is still a record
    RECORD.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Begins iteration `iteration`, counted from 0.
pub fn iteration(iteration: u64) {
    record().iteration = iteration;
    faults::iteration(iteration);
}

/// Ends a stage when dropped.
pub struct Stage(());

/// The loop enters a stage; `detail` says of what (a task).
#[must_use]
pub fn stage(name: &'static str, detail: &str) -> Stage {
    record().stages.push(Operation { name, detail: detail.to_string(), since: Instant::now() });
    faults::point(name);
    Stage(())
}

impl Drop for Stage {
    fn drop(&mut self) {
        let mut record = record();
        if let Some(stage) = record.stages.pop() {
            record.ended = stage.name;
        }
    }
}

/// Ends a collective operation when dropped.
pub struct Collective(());

/// The loop enters a collective operation.
#[must_use]
pub fn collective(name: &'static str) -> Collective {
    let mut record = record();
    record.entered += 1;
    record.collective = Some(Operation { name, detail: String::new(), since: Instant::now() });
    Collective(())
}

impl Drop for Collective {
    fn drop(&mut self) {
        let mut record = record();
        if let Some(collective) = record.collective.take() {
            record.waited += collective.since.elapsed();
        }
    }
}

/// Time this rank has spent in collectives so far, and its GPU in waiting for sums over ranks: to tell its own work from
/// waiting for others. Whoever asks for a stage waits for the GPU's part of it first.
pub fn waited() -> Duration {
    record().waited + comm::nccl::waited()
}

/// A rank's record at one moment, as its watchdog puts it down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    rank: usize,
    entered: u64,
    /// What it is in besides a collective, with its duration.
    doing: String,
    /// The collective it waits in, and for how many seconds.
    waiting: Option<(String, f64)>,
}

impl Record {
    fn state(&self, rank: usize) -> State {
        let doing = match self.stages.last() {
            Some(stage) => {
                let of = if stage.detail.is_empty() { String::new() } else { format!(" ({})", stage.detail) };
                let seconds = stage.since.elapsed().as_secs_f64();
                format!("{}{of} of iteration {} for {seconds:.1} s", stage.name, self.iteration + 1)
            }
            None => format!("what follows {} in iteration {}", self.ended, self.iteration + 1),
        };
        let waiting = self.collective.as_ref().map(|c| (c.name.to_string(), c.since.elapsed().as_secs_f64()));
        State { rank, entered: self.entered, doing, waiting }
    }
}

/// Makes the folder of [`Watchdog::start`], and removes what the alarm of an earlier start has left in it.
pub fn clear(folder: &Path) -> Result<()> {
    make_folder(folder)?;
    let clear = || -> std::io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if dog::is_own(&entry.file_name().to_string_lossy()) && !entry.file_type()?.is_dir() {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    };
    clear().with_context(|| format!("cannot clear {}", folder.display()))
}

/// Names of the ranks' hosts, in rank order. A collective call.
pub fn hosts(comm: &dyn Communicator) -> anyhow::Result<Vec<String>> {
    let all = comm.all_gather_bytes(host::name().unwrap_or_default().as_bytes())?;
    Ok(all.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_names_stage_task_iteration_and_collective() {
        // the only test that touches the process's record
        iteration(4);
        let outer = stage("evaluation", "");
        {
            let _inner = stage(REWARD, "parity");
            let state = record().state(3);
            assert!(state.doing.starts_with("reward (parity) of iteration 5 for 0."), "{state:?}");
            assert_eq!((state.rank, state.waiting), (3, None));
        }
        assert!(record().state(0).doing.starts_with("evaluation of iteration 5"));
        drop(outer);
        let before = record().entered;
        let waited_before = waited();
        {
            let _in = collective("all-reduce");
            std::thread::sleep(Duration::from_millis(20));
            let state = record().state(0);
            assert_eq!(state.doing, "what follows evaluation in iteration 5");
            assert_eq!((state.entered, state.waiting.unwrap().0.as_str()), (before + 1, "all-reduce"));
        }
        assert!(waited() - waited_before >= Duration::from_millis(20));
        assert!(record().collective.is_none());
    }
}
