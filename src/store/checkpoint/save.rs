//! Saving a checkpoint in the background: the training waits for the copy of the state and goes on.
//!
//! ```text
//!             loop's thread (collectives)           a thread of each rank        a thread of rank 0
//! begin       copy of this rank's share   ───────►  shard: write, fsync, digest
//! advance     have all ranks written? ◄───────────  done
//!             gather the shards' digests  ──────────────────────────────────►  fsync of metrics; manifest;
//! advance     is it published? ◄────────────────────────────────────────────   rename; old ones removed
//! ```
//! [`Saver::advance`] is called after each task's roll-out and at the end of an iteration and does not wait;
//! [`Saver::finish`] does. A failure on one
//! rank is an error on all at the next of these calls, and leaves the checkpoints that were there.
//!
//! Two threads of a process may then use HDF5, which is not thread-safe by itself: every call of the crate `hdf5` takes
//! one lock for the whole process, so that a trajectory shard waits for the checkpoint's and the other way round.

use std::{
    fs::File,
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    folder_of,
    manifest::{Manifest, ShardEntry},
    publish::{self, Keep},
    shard::Share,
    CheckpointRef, Values, FORMAT,
};
use crate::{
    comm::{agree, Communicator},
    faults,
};

/// What a save did.
#[derive(Clone, Debug)]
pub struct SaveReport {
    pub path: PathBuf,
    /// Time the training loop waited.
    pub stalled: Duration,
    /// Time this rank's threads worked.
    pub took: Duration,
    /// Bytes this rank wrote.
    pub bytes: u64,
}

/// Saves checkpoints of one run into one folder, one at a time.
pub struct Saver {
    checkpoints: PathBuf,
    keep: Keep,
    pending: Option<Pending>,
}

struct Pending {
    path: PathBuf,
    partial: PathBuf,
    elements: usize,
    iteration: u64,
    /// To be synced before the checkpoint is published (rank 0).
    metrics: Option<File>,
    phase: Phase,
    report: SaveReport,
}

enum Phase {
    Writing(Work<ShardEntry>),
    /// A thread on rank 0 only.
    Publishing(Option<Work<()>>),
}

/// A thread with the time it took.
type Work<T> = JoinHandle<(Result<T>, Duration)>;

fn start<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<Work<T>> {
    let timed = move || {
        let started = Instant::now();
        (work(), started.elapsed())
    };
    std::thread::Builder::new().name("checkpoint".into()).spawn(timed).context("cannot start a thread")
}

fn join<T>(work: Work<T>) -> (Result<T>, Duration) {
    work.join().unwrap_or_else(|_| (Err(anyhow::anyhow!("the checkpoint's thread panicked")), Duration::ZERO))
}

impl Saver {
    pub fn new(checkpoints: &Path, keep: Keep) -> Self {
        Saver { checkpoints: checkpoints.to_path_buf(), keep, pending: None }
    }

    /// Starts to save the state as `iteration-N`; a save that is still under way is finished first, and its report
    /// given. `metrics` (rank 0) is synced before the checkpoint gets its name, so that a resumed run finds the lines
    /// that belong to it. A collective call; it waits for the copy of this rank's share.
    pub fn begin(
        &mut self,
        checkpoint: &CheckpointRef<impl Values + ?Sized>,
        metrics: Option<File>,
        comm: &dyn Communicator,
    ) -> Result<Option<SaveReport>> {
        let earlier = self.finish(comm)?;
        let started = Instant::now();
        let path = folder_of(&self.checkpoints, checkpoint.iteration);
        let partial = path.with_extension("partial");
        let copied = Share::copy(checkpoint, comm.rank(), comm.size());
        let ready = match comm.rank() {
            0 => copied.and_then(|share| publish::start_empty(&partial).map(|()| share)),
            _ => copied,
        };
        let share = agree_on(ready, comm)?;
        let (elements, iteration, folder) = (share.elements, share.iteration, partial.clone());
        let writing = agree_on(start(move || share.write(&folder)), comm)?;
        let report = SaveReport { path: path.clone(), stalled: started.elapsed(), took: Duration::ZERO, bytes: 0 };
        let phase = Phase::Writing(writing);
        self.pending = Some(Pending { path, partial, elements, iteration, metrics, phase, report });
        Ok(earlier)
    }

    /// Goes one step on with the save that is under way, if all ranks are ready for it; gives its report when it is
    /// complete. A collective call that does not wait for files.
    pub fn advance(&mut self, comm: &dyn Communicator) -> Result<Option<SaveReport>> {
        let Some(pending) = &self.pending else { return Ok(None) };
        let busy = match &pending.phase {
            Phase::Writing(thread) => !thread.is_finished(),
            Phase::Publishing(thread) => thread.as_ref().is_some_and(|thread| !thread.is_finished()),
        };
        let mut ranks_busy = [f32::from(u8::from(busy))];
        comm.all_reduce_sum_f32(&mut ranks_busy)?;
        if ranks_busy[0] > 0.0 {
            return Ok(None);
        }
        self.step(comm)
    }

    /// Waits until the save that is under way is complete, and gives its report. A collective call.
    pub fn finish(&mut self, comm: &dyn Communicator) -> Result<Option<SaveReport>> {
        while self.pending.is_some() {
            if let Some(report) = self.step(comm)? {
                return Ok(Some(report));
            }
        }
        Ok(None)
    }

    /// From one phase to the next, waiting for the threads.
    fn step(&mut self, comm: &dyn Communicator) -> Result<Option<SaveReport>> {
        let Some(pending) = self.pending.take() else { return Ok(None) };
        let outcome = self.step_of(pending, comm);
        if outcome.is_err() && comm.rank() == 0 {
            // all ranks' threads have ended; best effort, since the first error is the one worth reporting
            let _ = publish::clear_leftovers(&self.checkpoints);
        }
        outcome
    }

    fn step_of(&mut self, mut pending: Pending, comm: &dyn Communicator) -> Result<Option<SaveReport>> {
        let started = Instant::now();
        match pending.phase {
            Phase::Writing(thread) => {
                let (written, took) = join(thread);
                let entry = agree_on(written, comm)?;
                (pending.report.took, pending.report.bytes) = (took, entry.bytes);
                let entries = comm.all_gather_bytes(&serde_json::to_vec(&entry)?)?;
                let shards = entries.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect::<Result<_>>()?;
                let manifest = Manifest {
                    format: FORMAT.to_string(),
                    code_version: crate::CODE_VERSION.to_string(),
                    iteration: pending.iteration,
                    elements: pending.elements,
                    shards,
                };
                let publishing = if comm.rank() == 0 {
                    let (partial, path, keep) = (pending.partial.clone(), pending.path.clone(), self.keep);
                    let metrics = pending.metrics.take();
                    start(move || {
                        if let Some(file) = metrics {
                            faults::file_point("fsync", Path::new("metrics.jsonl"))?;
                            file.sync_all().context("cannot sync the metrics")?;
                        }
                        manifest.write(&partial)?;
                        publish::publish(&partial, &path)?;
                        publish::remove_others(&path, manifest.iteration, keep)
                    })
                    .map(Some)
                } else {
                    Ok(None)
                };
                pending.phase = Phase::Publishing(agree_on(publishing, comm)?);
                pending.report.stalled += started.elapsed();
                self.pending = Some(pending);
                Ok(None)
            }
            Phase::Publishing(thread) => {
                let (published, took) = thread.map_or((Ok(()), Duration::ZERO), join);
                agree(comm, published)?;
                pending.report.took += took;
                pending.report.stalled += started.elapsed();
                Ok(Some(pending.report))
            }
        }
    }
}

/// As [`agree`], with what this rank has.
fn agree_on<T>(mine: Result<T>, comm: &dyn Communicator) -> Result<T> {
    let (value, outcome) = match mine {
        Ok(value) => (Some(value), Ok(())),
        Err(e) => (None, Err(e)),
    };
    agree(comm, outcome)?;
    value.context("the ranks agreed on a failure of this one")
}

/// Saves the state to `checkpoints/iteration-N` and waits until that is done. A collective call; an error on one rank
/// is an error on all, and leaves what was there before.
pub fn save(
    checkpoints: &Path,
    checkpoint: &CheckpointRef<impl Values + ?Sized>,
    keep: Keep,
    comm: &dyn Communicator,
) -> Result<SaveReport> {
    let mut saver = Saver::new(checkpoints, keep);
    saver.begin(checkpoint, None, comm)?;
    saver.finish(comm)?.context("a save that began was not there to be finished")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::comm::Local;

    /// The state may change as soon as `begin` has returned: what is saved is the copy.
    #[test]
    fn what_changes_after_the_copy_is_not_saved() {
        let folder = tempfile::tempdir().unwrap();
        let mut saver = Saver::new(folder.path(), Keep { last: 3, every: 0 });
        let mut weights = vec![1.5f32; 1_000_000];
        let meta = json!({});
        for iteration in 1..=3 {
            let checkpoint = CheckpointRef {
                iteration,
                meta: &meta,
                config_toml: "",
                layout: &[],
                vectors: vec![("weights", &weights)],
            };
            let earlier = saver.begin(&checkpoint, None, &Local).unwrap();
            assert_eq!(earlier.is_some(), iteration == 3, "the first is complete before the third begins");
            weights.iter_mut().for_each(|w| *w += 1.0);
            if iteration == 1 {
                let mut report = None;
                while report.is_none() {
                    report = saver.advance(&Local).unwrap();
                }
                let report = report.unwrap();
                assert!(report.path.ends_with("iteration-000001") && report.bytes > 4_000_000, "{report:?}");
            }
        }
        assert!(saver.finish(&Local).unwrap().is_some() && saver.finish(&Local).unwrap().is_none());
        for iteration in 1..=3u64 {
            let saved = super::super::load(&folder_of(folder.path(), iteration), &Local).unwrap().checkpoint;
            assert_eq!(saved.vector("weights").unwrap()[7], iteration as f32 + 0.5);
        }
        assert!(fs::read_dir(folder.path()).unwrap().count() == 3);
    }

    #[test]
    fn a_failure_in_the_background_comes_out_of_the_next_call_and_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let (weights, meta) = ([1.0f32], json!({}));
        let of = |iteration| CheckpointRef {
            iteration,
            meta: &meta,
            config_toml: "",
            layout: &[],
            vectors: vec![("weights", &weights[..])],
        };
        let mut saver = Saver::new(folder.path(), Keep { last: 1, every: 0 });
        saver.begin(&of(1), None, &Local).unwrap();
        saver.finish(&Local).unwrap();
        // the same again must replace it, and cannot
        fs::write(folder.path().join("iteration-000001.replaced"), b"in the way").unwrap();
        saver.begin(&of(1), None, &Local).unwrap();
        let error = format!("{:#}", saver.finish(&Local).unwrap_err());
        assert!(error.contains("rank 0") && error.contains("iteration-000001.replaced"), "{error}");
        assert!(saver.finish(&Local).unwrap().is_none(), "a save that failed is not pending");
        assert_eq!(super::super::load(&folder_of(folder.path(), 1), &Local).unwrap().checkpoint.iteration, 1);
        // the copy cannot begin
        fs::write(folder.path().join("iteration-000003.partial"), b"in the way").unwrap();
        let error = format!("{:#}", saver.begin(&of(3), None, &Local).unwrap_err());
        assert!(error.contains("iteration-000003.partial"), "{error}");
    }
}
