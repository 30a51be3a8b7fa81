//! Which device a rank computes on, chosen at run time: the CPU, or a GPU of its own.
//!
//! `parts.rs` knows what a GPU needs (and is, with src/comm and src/kernels, all that names the crate `cudarc`),
//! `torch_cuda.rs` is libtorch's side of it.

pub mod attention;
pub mod numerics;
pub mod parts;
pub mod stopwatch;
pub mod threads;
pub mod torch_cuda;

use std::collections::BTreeSet;

use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{
    comm::{self, Communicator},
    host,
};

pub use torch_cuda::{current_stream, set_device, synchronize};

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Wanted {
    /// A GPU where every rank has one and all that it needs, the CPU where none has.
    #[default]
    Auto,
    Cpu,
    Cuda,
}

/// What a rank can offer.
#[derive(Clone, Serialize, Deserialize)]
struct Offer {
    host: String,
    /// Its rank among those of the host.
    local: usize,
    /// GPUs that the driver shows it.
    seen: usize,
    /// Their UUIDs where it can use them, or what is missing.
    usable: Result<Vec<[u8; 16]>, String>,
}

impl Offer {
    fn mine(comm: &dyn Communicator) -> Self {
        Offer {
            host: host::name().unwrap_or_else(|| "an unknown host".into()),
            local: comm.local_rank().0,
            seen: parts::gpus().map_or(0, |gpus| gpus.len()),
            usable: prepare(comm.size()).map_err(|e| format!("{e:#}")),
        }
    }
}

/// What becomes of all ranks' offers.
#[derive(Debug, PartialEq)]
struct Choice {
    /// For each rank the index of its GPU; none where all compute on the CPU.
    gpus: Option<Vec<usize>>,
    /// About GPUs that stay idle.
    warning: Option<String>,
}

/// The device of this rank. A collective call, before the first tensor of the process; the error is the same on all ranks.
///
/// # Errors
/// `cuda` was asked for and something that it needs is missing; some ranks can use a GPU and others cannot; several ranks
/// would have to share a GPU.
pub fn choose(wanted: Wanted, comm: &dyn Communicator) -> Result<Device> {
    if wanted == Wanted::Cpu {
        return Ok(Device::Cpu);
    }
    let offers: Vec<Offer> = comm
        .all_gather_bytes(&serde_json::to_vec(&Offer::mine(comm))?)?
        .iter()
        .map(|bytes| serde_json::from_slice(bytes))
        .collect::<Result<_, _>>()
        .context("devices of another rank")?;
    let choice = decide(wanted, &offers)?;
    if let Some(warning) = choice.warning.filter(|_| comm.rank() == 0) {
        log::warn!("{warning}");
    }
    let Some(gpus) = choice.gpus else { return Ok(Device::Cpu) };
    let index = gpus[comm.rank()];
    comm::agree(comm, set_device(index))?;
    Ok(Device::Cuda(index))
}

/// All GPUs or all CPUs: one rank without a GPU would make a job of many GPUs as slow as a CPU.
fn decide(wanted: Wanted, offers: &[Offer]) -> Result<Choice> {
    let asked = if wanted == Wanted::Cuda { "--device cuda: " } else { "" };
    let seen = offers.iter().filter(|offer| offer.seen > 0).count();
    let usable: Vec<&Vec<_>> = offers.iter().filter_map(|offer| offer.usable.as_ref().ok()).collect();
    if usable.len() == offers.len() {
        let visible: Vec<Vec<_>> = usable.into_iter().cloned().collect();
        let local: Vec<usize> = offers.iter().map(|offer| offer.local).collect();
        let gpus = assign(&local, &visible)?;
        let all: BTreeSet<_> = visible.iter().flatten().collect();
        let idle = all.len() - gpus.len();
        let warning = (idle > 0).then(|| {
            format!("{idle} of the {} GPUs that are here are not used: start one rank per GPU to use them", all.len())
        });
        return Ok(Choice { gpus: Some(gpus), warning });
    }
    let mixed = !usable.is_empty() || (seen > 0 && seen < offers.len());
    if mixed {
        let lacks = |offer: &Offer| match (&offer.usable, offer.seen) {
            (Ok(_), _) => None,
            // it is the others that cannot use theirs
            (Err(_), 1..) if usable.is_empty() => None,
            (Err(missing), _) => Some(missing.clone()),
        };
        let without: Vec<String> = groups(offers, lacks);
        let with: Vec<String> = groups(offers, |offer| lacks(offer).is_none().then(String::new));
        bail!(
            "{asked}some ranks have a GPU and others do not: {} have; {} do not; mend or leave out what has none, or use \
             --device cpu",
            with.join(", "),
            without.join(", ")
        );
    }
    let (rank, missing, host) = offers
        .iter()
        .enumerate()
        .find_map(|(rank, offer)| Some((rank, offer.usable.as_ref().err()?, &offer.host)))
        .context("no rank made an offer")?;
    ensure!(wanted == Wanted::Auto, "{asked}{missing} (rank {rank} on {host})");
    // a machine without a driver is an ordinary CPU machine; one that has a GPU should say why it is idle
    let warning =
        (seen > 0).then(|| format!("computing on the CPU, though there are GPUs: {missing} (rank {rank} on {host})"));
    Ok(Choice { gpus: None, warning })
}

/// The ranks of which `what` says something, by host and by what it says: "ranks 0-7 on n1 (no NVRTC)".
fn groups(offers: &[Offer], what: impl Fn(&Offer) -> Option<String>) -> Vec<String> {
    let mut groups: Vec<(&str, String, Vec<usize>)> = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        let Some(said) = what(offer) else { continue };
        match groups.iter_mut().find(|(host, other, _)| *host == offer.host && *other == said) {
            Some((_, _, ranks)) => ranks.push(rank),
            None => groups.push((&offer.host, said, vec![rank])),
        }
    }
    let line = |(host, said, ranks): (&str, String, Vec<usize>)| {
        let said = if said.is_empty() { said } else { format!(" ({said})") };
        let plural = if ranks.len() == 1 { "" } else { "s" };
        format!("rank{plural} {} on {host}{said}", ranges(&ranks))
    };
    groups.into_iter().map(line).collect()
}

/// Rising numbers as "0-7, 9".
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let text = |run: &[usize]| match run {
        [one] => one.to_string(),
        run => format!("{}-{}", run[0], run[run.len() - 1]),
    };
    runs.map(text).collect::<Vec<_>>().join(", ")
}

/// For the first line of a command: "2 ranks, on the CPU", "8 ranks, each on a GPU (NVIDIA H200)".
pub fn ranks_and_device(comm: &dyn Communicator, device: Device) -> String {
    let ranks = if comm.size() == 1 { "1 rank".to_string() } else { format!("{} ranks", comm.size()) };
    let each = if device == Device::Cpu || comm.size() == 1 { "" } else { "each " };
    let sleep = if comm.sleeps() { " (more ranks than cores: those that wait sleep)" } else { "" };
    format!("{ranks}, {each}on {}{sleep}", name(device))
}

/// "the CPU", or "a GPU (NVIDIA H200)".
fn name(device: Device) -> String {
    let Device::Cuda(index) = device else { return "the CPU".into() };
    match parts::gpus().ok().and_then(|gpus| gpus.into_iter().nth(index)) {
        Some(gpu) => format!("a GPU ({})", gpu.name),
        None => "a GPU".into(),
    }
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

    /// One of `ranks` on a host of its own with `seen` GPUs; `missing` is what keeps it from using them.
    fn offers(host: &str, ranks: usize, seen: u8, missing: &str) -> Vec<Offer> {
        let usable = match missing {
            "" => Ok((0..seen)
                .map(|gpu| std::array::from_fn(|i| if i == 0 { gpu } else { host.as_bytes()[1] }))
                .collect()),
            missing => Err(missing.to_string()),
        };
        (0..ranks).map(|local| Offer { host: host.into(), local, seen: seen.into(), usable: usable.clone() }).collect()
    }

    const NO_DRIVER: &str = "no NVIDIA driver: libcuda.so.1 was not found";

    #[test]
    fn a_gpu_that_some_ranks_lack_ends_the_job_with_the_hosts_names() {
        let broken = [offers("n1", 8, 8, ""), offers("n2", 8, 0, NO_DRIVER), offers("n3", 8, 8, "")].concat();
        for (wanted, begins) in [(Wanted::Auto, "some ranks"), (Wanted::Cuda, "--device cuda: some ranks")] {
            let error = decide(wanted, &broken).unwrap_err().to_string();
            let named =
                "ranks 0-7 on n1, ranks 16-23 on n3 have; ranks 8-15 on n2 (no NVIDIA driver: libcuda.so.1 was \
                         not found) do not";
            assert!(error.starts_with(begins) && error.contains(named), "{error}");
        }
        // it has the GPU, but cannot use it; the others can
        let broken = [offers("n1", 1, 1, "no NVRTC"), offers("n2", 2, 2, "")].concat();
        let error = decide(Wanted::Auto, &broken).unwrap_err().to_string();
        assert!(error.contains("ranks 1-2 on n2 have; rank 0 on n1 (no NVRTC) do not"), "{error}");
        // nobody can use what some have
        let broken = [offers("n1", 1, 0, NO_DRIVER), offers("n2", 1, 2, "no NVRTC")].concat();
        let error = decide(Wanted::Auto, &broken).unwrap_err().to_string();
        assert!(error.contains("rank 1 on n2 have; rank 0 on n1 (no NVIDIA driver"), "{error}");
    }

    #[test]
    fn gpus_that_stay_idle_are_said_whichever_rank_sees_them() {
        let none = decide(Wanted::Auto, &offers("n1", 4, 0, NO_DRIVER)).unwrap();
        assert_eq!(none, Choice { gpus: None, warning: None });
        let unusable = decide(Wanted::Auto, &[offers("n1", 1, 1, "no NVRTC"), offers("n2", 1, 1, "no NVRTC")].concat());
        let warning = unusable.unwrap().warning.expect("a warning");
        assert_eq!(warning, "computing on the CPU, though there are GPUs: no NVRTC (rank 0 on n1)");
        let error = decide(Wanted::Cuda, &offers("n1", 2, 1, "no NVRTC")).unwrap_err().to_string();
        assert_eq!(error, "--device cuda: no NVRTC (rank 0 on n1)");
        let some = decide(Wanted::Auto, &[offers("n1", 2, 8, ""), offers("n2", 2, 8, "")].concat()).unwrap();
        assert_eq!(some.gpus.unwrap(), [0, 1, 0, 1]);
        assert!(some.warning.unwrap().starts_with("12 of the 16 GPUs that are here are not used"));
        assert_eq!(decide(Wanted::Cuda, &offers("n1", 2, 2, "")).unwrap().warning, None);
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
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
