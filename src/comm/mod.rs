//! The communicator: how ranks agree. [`Local`] is one rank, [`Mpi`] is many; [`start`] picks.
//!
//! Gradients are summed in one fixed binary tree (see [`TreeSum`]): first over the lanes of a rank, then over ranks.
//! That makes the weights the same bits at 1, 2, 4, … ranks.

mod around;
mod last_words;
mod launcher;
mod local;
mod mpi;
pub mod nccl;
mod timed;
mod tree;
mod waiting;
mod watched;

pub use self::around::{Around, Operation};
pub use self::last_words::last_words;
pub use self::local::Local;
pub use self::mpi::Mpi;
pub(crate) use self::mpi::{end_world, ring};
pub use self::timed::{Timed, Visit};
pub use self::tree::{same_tree, tree_sum, Leaf, TreeSum};
pub use self::watched::Watched;

use anyhow::{ensure, Error, Result};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::{
    cannot_write::{CannotWrite, OfRanks},
    caught_panics,
    signals::{self, Interrupted},
    streams::complain,
};

/// Number type of gradients on their way between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    #[default]
    F32,
    /// Half the bytes; every rank's share and every partial sum is rounded.
    Bf16,
}

/// A vector in GPU memory that is to be summed over ranks in place.
#[derive(Clone, Copy, Debug)]
pub struct DeviceVector {
    /// Of its first element.
    pub address: u64,
    /// Elements.
    pub length: usize,
    /// Their number type.
    pub wire: Wire,
    /// The CUDA stream that makes it: the sum begins after what that stream has been given so far.
    pub stream: usize,
}

/// Collective operations among the ranks of a run. Every call must be made by all ranks in the same order, from the
/// thread that started the communicator.
///
/// A failure inside MPI is fatal (MPI's default error handler ends the run), so the errors returned here are those
/// that the caller can do something about.
pub trait Communicator {
    /// This rank, 0-based.
    fn rank(&self) -> usize;
    /// Number of ranks, at least 1.
    fn size(&self) -> usize;
    /// Rank among the ranks of the same host, and how many they are (from MPI's shared-memory split).
    fn local_rank(&self) -> (usize, usize);
    /// Whether ranks that wait sleep instead of asking all the time, because a host has more ranks than cores.
    fn sleeps(&self) -> bool {
        false
    }
    /// Returns when all ranks have arrived.
    fn barrier(&self) -> Result<()>;
    /// Replaces `data` on every rank by the bytes of `root`; lengths may differ beforehand.
    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()>;
    /// Overwrites `data` (same length everywhere) with the values of `root`; any size, sent in pieces.
    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()>;
    /// The bytes of every rank, in rank order, on every rank; lengths may differ.
    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Element-wise sum over ranks (same length everywhere, any size) in one fixed binary tree: neighbours first
    /// ((0+1)+(2+3))+…, an odd one carried up. The result is the same bits on every rank, equals [`tree_sum`] of the
    /// ranks' values, and continues the tree that [`TreeSum`] builds over lanes.
    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()>;
    /// As [`Communicator::all_reduce_sum_f32`], with bf16 on the wire: the same tree, every partial sum rounded to the
    /// nearest bf16 (ties to even). The same bits on every rank.
    fn all_reduce_sum_bf16(&self, data: &mut [bf16]) -> Result<()>;
    /// Starts the sum over ranks of a vector in GPU memory and returns at once. All ranks start the same sums in the
    /// same order; this one may be called from any thread.
    ///
    /// # Errors
    /// A communicator of several ranks that cannot reach GPU memory.
    fn start_device_sum(&self, vector: DeviceVector) -> Result<()> {
        ensure!(self.size() == 1, "GPU memory cannot be summed over ranks without NCCL ({vector:?})");
        Ok(())
    }
    /// What `stream` is given from now on begins after all sums that were started.
    fn finish_device_sums(&self, _stream: usize) -> Result<()> {
        Ok(())
    }
    /// Ends every rank of the run with `code` at once. Never returns.
    fn abort(&self, code: i32) -> !;
}

/// The communicator of this process: [`Mpi`] when an MPI launcher started it, otherwise [`Local`] without MPI being
/// touched, so that a plain `rldiff` needs no launcher.
///
/// Dropping it ends MPI in an orderly way and waits for all ranks to do the same; a rank that must leave because of
/// an error calls [`Communicator::abort`] instead.
///
/// # Errors
/// A launcher that belongs to another MPI than the one rldiff was built with, Slurm tasks started without one, and a
/// variable `RLDIFF_WAIT` that is none of its words.
pub fn start() -> Result<Box<dyn Communicator>> {
    match launcher::detect(|name| std::env::var(name).ok())? {
        launcher::Launcher::None => Ok(Box::new(Local)),
        launcher::Launcher::Mpi { ranks, on_host } => Ok(Box::new(Mpi::start(ranks, on_host)?)),
    }
}

/// First line of what the MPI library says of itself.
pub fn library_version() -> String {
    let version = ::mpi::environment::library_version().unwrap_or_default();
    version.lines().next().unwrap_or("unknown").trim().to_string()
}

/// What a rank says of how it went.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Success,
    /// A signal has stopped it.
    Interrupted,
    /// `of_writing`: because it could not write.
    Failure {
        of_writing: bool,
        text: String,
    },
}

impl Outcome {
    fn of<T>(mine: &Result<T>) -> Self {
        match mine {
            Ok(_) => Outcome::Success,
            Err(e) if signals::is_interruption(e) => Outcome::Interrupted,
            Err(e) => Outcome::Failure { of_writing: CannotWrite::caused(e), text: format!("{e:#}") },
        }
    }

    /// Nothing for success.
    fn packed(&self) -> Vec<u8> {
        match self {
            Outcome::Success => Vec::new(),
            Outcome::Interrupted => vec![2],
            Outcome::Failure { of_writing, text } => [&[u8::from(*of_writing)], text.as_bytes()].concat(),
        }
    }

    fn unpacked(bytes: &[u8]) -> Self {
        match bytes.split_first() {
            None => Outcome::Success,
            Some((2, _)) => Outcome::Interrupted,
            Some((mark, text)) => {
                Outcome::Failure { of_writing: *mark == 1, text: String::from_utf8_lossy(text).into_owned() }
            }
        }
    }

    /// The same on all ranks, from what all of them say: an error that names each rank that failed and why, else
    /// [`Interrupted`] where a signal has stopped some.
    fn of_all(all: &[Vec<u8>]) -> Result<()> {
        let all: Vec<Outcome> = all.iter().map(|bytes| Outcome::unpacked(bytes)).collect();
        let (mut texts, mut any_of_writing) = (Vec::new(), false);
        for (rank, outcome) in all.iter().enumerate() {
            if let Outcome::Failure { of_writing, text } = outcome {
                texts.push(format!("rank {rank}: {text}"));
                any_of_writing |= of_writing;
            }
        }
        if !texts.is_empty() {
            return Err(OfRanks { text: texts.join("; "), of_writing: any_of_writing }.into());
        }
        match all.contains(&Outcome::Interrupted) {
            true => {
                signals::asked_elsewhere();
                Err(Interrupted.into())
            }
            false => Ok(()),
        }
    }
}

/// All ranks learn whether every one of them succeeded: `Ok` everywhere, or an error everywhere that names each rank
/// that failed and why, or [`Interrupted`] everywhere where that is all that stopped some. A collective call; whoever
/// calls it must reach it even after a failure.
pub fn agree(comm: &dyn Communicator, mine: Result<()>) -> Result<()> {
    Outcome::of_all(&comm.all_gather_bytes(&Outcome::of(&mine).packed())?)
}

/// What every rank made by itself from the same settings, or the same error on all of them: once where all failed alike,
/// by rank where they did not, [`Interrupted`] where a signal is the reason. A collective call, to be reached even after
/// a failure.
pub fn all_made<T>(comm: &dyn Communicator, mine: Result<T>) -> Result<T> {
    // what fails after a signal may have failed by it: programs that judge get signals, too
    let mine = mine.or_else(|e| signals::check().map_err(Error::from).and(Err(e)));
    let outcome = Outcome::of(&mine);
    let all = comm.all_gather_bytes(&outcome.packed())?;
    if let Outcome::Failure { of_writing, text } = &outcome {
        if all.iter().all(|other| Outcome::unpacked(other) == outcome) {
            return Err(OfRanks { text: text.clone(), of_writing: *of_writing }.into());
        }
    }
    Outcome::of_all(&all)?;
    mine
}

/// Makes a panic on any thread of any rank end all ranks within seconds: it prints `rank R: message (file:line)` on
/// stderr (with a backtrace under RUST_BACKTRACE=1) and leaves with code 101, through MPI where MPI is up. Panics inside
/// [`caught_panics::catch`] are errors instead.
pub fn abort_world_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        if caught_panics::are_caught() {
            return;
        }
        let message = caught_panics::message(info.payload());
        let explained = crate::memory::explain(message).or_else(|| crate::device::numerics::explain(message));
        let message = &explained.unwrap_or_else(|| message.to_string());
        let place = info.location().map(|l| format!(" ({}:{})", l.file(), l.line())).unwrap_or_default();
        let mut text = format!("rank {}: {message}{place}\n", mpi::world_rank());
        let backtrace = std::backtrace::Backtrace::capture();
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            text.push_str(&backtrace.to_string());
        }
        complain(&text);
        mpi::end_world(101)
    }));
}
