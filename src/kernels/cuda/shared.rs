//! Kernels that rank 0 has compiled for all ranks: a job of many GPUs compiles once and leaves one rank's cache to be
//! written, instead of each rank doing the same work at the same moment in the same folder.

use std::{collections::BTreeMap, sync::Mutex};

use anyhow::{anyhow, ensure, Context, Result};

use super::compile::{cache_folder, compile_cached, Architecture, Source, Toolkit, SOURCES};
use crate::comm::Communicator;

/// A source's name, and the architecture as its two numbers.
type Which = (&'static str, (u32, u32));

/// Cubins by source and architecture.
static RECEIVED: Mutex<BTreeMap<Which, Vec<u8>>> = Mutex::new(BTreeMap::new());

/// The cubin that rank 0 has sent.
pub(super) fn received(source: &Source, architecture: Architecture) -> Option<Vec<u8>> {
    let received = RECEIVED.lock().expect("a panic ends the process");
    received.get(&(source.name, (architecture.major, architecture.minor))).cloned()
}

/// Compiles all kernels on rank 0, or takes them from its cache, for every architecture among the ranks' GPUs, and hands
/// them to all ranks. `mine` is this rank's. Nothing to do for one rank. A collective call.
///
/// # Errors
/// What rank 0 could not compile; the same on all ranks.
pub fn share(mine: Architecture, comm: &dyn Communicator) -> Result<()> {
    share_with(mine, comm, |source, architecture| {
        let mut toolkit = || Toolkit::find(&[]);
        Ok(compile_cached(source, architecture, cache_folder().as_deref(), &mut toolkit)?.cubin)
    })
}

/// As [`share`], with `compile` in place of NVRTC.
pub fn share_with(
    mine: Architecture,
    comm: &dyn Communicator,
    mut compile: impl FnMut(&Source, Architecture) -> Result<Vec<u8>>,
) -> Result<()> {
    if comm.size() == 1 {
        return Ok(());
    }
    let all = comm.all_gather_bytes(&[mine.major.to_le_bytes(), mine.minor.to_le_bytes()].concat())?;
    let mut architectures = all.iter().map(|bytes| of_bytes(bytes)).collect::<Result<Vec<_>>>()?;
    architectures.sort_by_key(|a| (a.major, a.minor));
    architectures.dedup();
    let wanted =
        || architectures.iter().flat_map(|&architecture| SOURCES.iter().map(move |source| (source, architecture)));
    let mut lengths = Vec::new();
    let mut cubins = Vec::new();
    if comm.rank() == 0 {
        let compiled = wanted().map(|(source, architecture)| compile(source, architecture)).collect::<Result<Vec<_>>>();
        let told =
            compiled.as_ref().map(|all| all.iter().map(Vec::len).collect::<Vec<_>>()).map_err(|e| format!("{e:#}"));
        lengths = serde_json::to_vec(&told)?;
        cubins = compiled.unwrap_or_default().concat();
    }
    comm.broadcast_bytes(&mut lengths, 0)?;
    let lengths: Result<Vec<usize>, String> = serde_json::from_slice(&lengths)?;
    let lengths = lengths.map_err(|e| anyhow!("rank 0 cannot compile the kernels: {e}"))?;
    comm.broadcast_bytes(&mut cubins, 0)?;
    let mut received = RECEIVED.lock().expect("a panic ends the process");
    let mut rest = &cubins[..];
    for ((source, architecture), length) in wanted().zip(lengths) {
        let (cubin, after) = rest.split_at_checked(length).context("kernels from rank 0 that end too early")?;
        received.insert((source.name, (architecture.major, architecture.minor)), cubin.to_vec());
        rest = after;
    }
    ensure!(rest.is_empty(), "kernels from rank 0 that do not end");
    Ok(())
}

/// Whether this rank has all kernels of `architecture` from rank 0, and how many bytes they are.
pub fn shared_bytes(architecture: Architecture) -> Option<usize> {
    SOURCES.iter().map(|source| received(source, architecture).map(|cubin| cubin.len())).sum()
}

fn of_bytes(bytes: &[u8]) -> Result<Architecture> {
    let words: [u8; 8] = bytes.try_into().context("the architecture of another rank's GPU")?;
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| words[at + i]));
    Ok(Architecture { major: word(0), minor: word(4) })
}
