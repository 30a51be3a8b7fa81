//! Which device a rank computes on, chosen at run time: the CPU, or a GPU of its own.
//!
//! `parts.rs` knows what a GPU needs (and is, with src/comm and src/kernels, all that names the crate `cudarc`),
//! `torch_cuda.rs` is libtorch's side of it.

pub mod numerics;
pub mod parts;
pub mod stopwatch;
pub mod threads;
pub mod torch_cuda;

use std::collections::BTreeSet;

use anyhow::{anyhow, bail, ensure, Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::comm::{self, Communicator};

pub use torch_cuda::{current_stream, set_device, synchronize};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// A GPU where every rank has one and all that it needs, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// What a rank can offer.
#[derive(Serialize, Deserialize)]
struct Offer {
    /// UUIDs of the GPUs it sees, or what is missing.
    gpus: Result<Vec<[u8; 16]>, String>,
}

/// The device of this rank. A collective call, before the first tensor of the process; the error is the same on all ranks.
///
/// # Errors
/// `cuda` was asked for and something that it needs is missing; several ranks would have to share a GPU.
pub fn choose(wanted: Wanted, comm: &dyn Communicator) -> Result<Device> {
    if wanted == Wanted::Cpu {
        return Ok(Device::Cpu);
    }
    let offer = Offer { gpus: prepare(comm.size()).map_err(|e| format!("{e:#}")) };
    let offers: Vec<Offer> = comm
        .all_gather_bytes(&serde_json::to_vec(&offer)?)?
        .iter()
        .map(|bytes| serde_json::from_slice(bytes))
        .collect::<Result<_, _>>()
        .context("devices of another rank")?;
    let mut visible = Vec::new();
    for (rank, offer) in offers.into_iter().enumerate() {
        match offer.gpus {
            Ok(gpus) => visible.push(gpus),
            Err(missing) if wanted == Wanted::Auto => {
                // a machine without a driver is an ordinary CPU machine; one that has a GPU should say why it is idle
                if comm.rank() == 0 && parts::gpus().is_ok() {
                    log::warn!("computing on the CPU: {missing} (rank {rank})");
                }
                return Ok(Device::Cpu);
            }
            Err(missing) => bail!("--device cuda: {missing} (rank {rank})"),
        }
    }
    let local: Vec<usize> = comm
        .all_gather_bytes(&(comm.local_rank().0 as u64).to_le_bytes())?
        .iter()
        .map(|bytes| bytes.as_slice().try_into().map(|b| u64::from_le_bytes(b) as usize))
        .collect::<Result<_, _>>()
        .map_err(|_| anyhow!("the local rank of another rank"))?;
    let index = assign(&local, &visible)?[comm.rank()];
    comm::agree(comm, set_device(index))?;
    Ok(Device::Cuda(index))
}

/// Everything that a GPU needs, opened; the UUIDs of the GPUs.
fn prepare(ranks: usize) -> Result<Vec<[u8; 16]>> {
    let gpus = parts::gpus()?;
    parts::nvrtc()?;
    if ranks > 1 {
        parts::open_nccl()?;
    }
    parts::open_libtorch_cuda()?;
    ensure!(tch::Cuda::is_available(), "libtorch_cuda sees no device, though the driver does");
    Ok(gpus.into_iter().map(|gpu| gpu.uuid).collect())
}

/// The GPU of every rank, as an index into those it sees: by its rank on the node where all see all, the only one where
/// the launcher gives each rank its own.
fn assign(local_rank: &[usize], visible: &[Vec<[u8; 16]>]) -> Result<Vec<usize>> {
    let indices: Vec<usize> = local_rank.iter().zip(visible).map(|(local, gpus)| local % gpus.len()).collect();
    let mut taken = std::collections::BTreeMap::new();
    for (rank, (index, gpus)) in indices.iter().zip(visible).enumerate() {
        if let Some(other) = taken.insert(gpus[*index], rank) {
            // ranks of one node are those that see this GPU
            let ranks = visible.iter().filter(|seen| seen.contains(&gpus[*index])).count();
            let node: BTreeSet<_> = visible.iter().filter(|seen| seen.contains(&gpus[*index])).flatten().collect();
            bail!(
                "{ranks} ranks on a node with {} GPU{}: ranks {other} and {rank} would share one; start at most one rank \
                 per GPU, or use --device cpu",
                node.len(),
                if node.len() == 1 { "" } else { "s" }
            );
        }
    }
    Ok(indices)
}

/// For a setting that only a GPU has.
///
/// # Errors
/// `device` is none.
pub fn ensure_gpu(device: Device, setting: &str) -> Result<()> {
    ensure!(device != Device::Cpu, "{setting} needs a GPU, but this run computes on the CPU (--device cuda)");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Local;

    #[test]
    fn every_rank_gets_a_gpu_of_its_own() {
        let gpu = |n: u8| [n; 16];
        let node = |first: u8, count: u8| (first..first + count).map(gpu).collect::<Vec<_>>();
        // two nodes of four GPUs, each rank sees its node's
        let visible: Vec<_> = (0..8).map(|rank| node(4 * (rank / 4), 4)).collect();
        assert_eq!(assign(&[0, 1, 2, 3, 0, 1, 2, 3], &visible).unwrap(), [0, 1, 2, 3, 0, 1, 2, 3]);
        // the launcher shows each rank one GPU
        let visible: Vec<_> = (0..4).map(|rank| vec![gpu(rank)]).collect();
        assert_eq!(assign(&[0, 1, 2, 3], &visible).unwrap(), [0; 4]);
        // fewer ranks than GPUs
        assert_eq!(assign(&[0, 1], &[node(0, 8), node(0, 8)]).unwrap(), [0, 1]);
        let error = assign(&[0, 1, 2], &[node(0, 2), node(0, 2), node(0, 2)]).unwrap_err().to_string();
        assert!(error.contains("3 ranks on a node with 2 GPUs: ranks 0 and 2"), "{error}");
        let error = assign(&[0, 1], &[node(7, 1), node(7, 1)]).unwrap_err().to_string();
        assert!(error.contains("2 ranks on a node with 1 GPU:"), "{error}");
    }

    #[test]
    fn without_a_gpu_auto_is_the_cpu_and_cuda_an_error() {
        assert_eq!(choose(Wanted::Cpu, &Local).unwrap(), Device::Cpu);
        if parts::gpus().is_ok() {
            return;
        }
        assert_eq!(choose(Wanted::Auto, &Local).unwrap(), Device::Cpu);
        let error = choose(Wanted::Cuda, &Local).unwrap_err().to_string();
        assert!(error.starts_with("--device cuda: no NVIDIA driver: libcuda.so.1"), "{error}");
        assert!(ensure_gpu(Device::Cpu, "rollout.cuda_graph").unwrap_err().to_string().contains("needs a GPU"));
    }
}
