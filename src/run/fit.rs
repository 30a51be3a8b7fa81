//! What `"auto"` means for `model.gradient_checkpointing` and `rollout.cuda_graph`: the fastest setting whose memory, by the
//! reckoning of [`super::footprint`], fits into the device. No result depends on it.

use std::fs;

use anyhow::{Context, Result};
use tch::Device;

use super::footprint::{self, Cost, Memory, Setting};
use crate::{
    comm::{agree, all_made, Communicator},
    config::{Checkpointing, Config, Graphs},
    device::parts,
    models::{pipeline::Pipeline, recompute::Recomputed},
};

/// Share of a device's memory that may be reckoned with: libtorch's cache has holes, and other programs run beside.
const USABLE: f64 = 0.92;

/// What is made of both settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub recomputed: Recomputed,
    pub graphs: bool,
}

/// Where a rank computes.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub on_gpu: bool,
    /// There are other ranks.
    pub in_company: bool,
    /// Memory of the GPU, or this rank's share of the host's.
    pub bytes: u64,
    /// Lanes of the rank.
    pub lanes: usize,
}

/// A choice, and what it was made by.
pub struct Decided {
    pub choice: Choice,
    pub cost: Cost,
    pub memory: Memory,
    pub fits: bool,
}

/// Whether a setting is left to the program.
pub fn is_open(config: &Config) -> bool {
    config.model.gradient_checkpointing == Checkpointing::Auto || config.rollout.cuda_graph == Graphs::Auto
}

/// The settings that a config allows in `room`, the fastest first.
fn candidates(config: &Config, room: &Room) -> Vec<Choice> {
    let recomputed = match config.model.gradient_checkpointing {
        Checkpointing::Fixed(which) => vec![which],
        Checkpointing::Auto => vec![Recomputed::Nothing, Recomputed::Level0, Recomputed::Everything],
    };
    let graphs: &[bool] = match config.rollout.cuda_graph {
        Graphs::Fixed(true) => &[true],
        Graphs::Auto if room.on_gpu => &[true, false],
        Graphs::Fixed(false) | Graphs::Auto => &[false],
    };
    // computing again costs more than the launches that a graph saves
    recomputed.iter().flat_map(|&recomputed| graphs.iter().map(move |&graphs| Choice { recomputed, graphs })).collect()
}

/// The first setting that fits, else the one that takes least. `of_rewards` bytes are the rewards' networks.
pub fn decide(config: &Config, pipeline: &Pipeline, of_rewards: u64, room: &Room) -> Result<Decided> {
    let measure = |recomputed| footprint::measure(pipeline.architecture(), config, recomputed);
    decide_by(config, pipeline, of_rewards, room, measure)
}

fn decide_by(
    config: &Config,
    pipeline: &Pipeline,
    of_rewards: u64,
    room: &Room,
    mut measure: impl FnMut(Recomputed) -> Result<Cost>,
) -> Result<Decided> {
    let mut measured: Option<(Recomputed, Cost)> = None;
    let mut last = None;
    for choice in candidates(config, room) {
        let cost = match measured {
            Some((recomputed, cost)) if recomputed == choice.recomputed => cost,
            _ => measure(choice.recomputed)?,
        };
        measured = Some((choice.recomputed, cost));
        let &Room { lanes, on_gpu, in_company, .. } = room;
        let setting = Setting { lanes, on_gpu, in_company, graphs: choice.graphs };
        let memory = footprint::memory(config, pipeline, &cost, setting);
        let fits = (memory.total() + of_rewards) as f64 <= USABLE * room.bytes as f64;
        last = Some(Decided { choice, cost, memory, fits });
        if fits {
            break;
        }
    }
    last.context("no setting is allowed")
}

/// What a run does.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub choice: Choice,
    /// On rank 0, where something was left to the program.
    words: Option<String>,
    warning: Option<String>,
}

impl Chosen {
    /// Says in the log what was chosen, once the run has begun.
    pub fn tell(&self) {
        self.words.iter().for_each(|words| log::info!("{words}"));
        self.warning.iter().for_each(|words| log::warn!("{words}"));
    }
}

/// What the run does, the same on all ranks: rank 0 decides by the least memory that a rank has. A collective call.
pub fn choose(
    config: &Config,
    pipeline: &Pipeline,
    of_rewards: u64,
    lanes: usize,
    comm: &dyn Communicator,
) -> Result<Chosen> {
    let room = Room { on_gpu: pipeline.device != Device::Cpu, in_company: comm.size() > 1, bytes: 0, lanes };
    if !is_open(config) {
        return Ok(Chosen { choice: candidates(config, &room)[0], words: None, warning: None });
    }
    let own = all_made(comm, own_memory(pipeline.device, comm))?;
    let all = comm.all_gather_bytes(&own.to_le_bytes())?;
    let read = |bytes: &Vec<u8>| bytes.as_slice().try_into().map(u64::from_le_bytes);
    let all = all.iter().map(read).collect::<Result<Vec<_>, _>>().context("the memory of another rank")?;
    let room = Room { bytes: all.into_iter().min().unwrap_or(own), ..room };
    let decided = if comm.rank() == 0 { decide(config, pipeline, of_rewards, &room).map(Some) } else { Ok(None) };
    let (decided, made) = match decided {
        Ok(decided) => (decided, Ok(())),
        Err(e) => (None, Err(e)),
    };
    agree(comm, made).context("deciding what \"auto\" means")?;
    let all = candidates(config, &room);
    let place = |decided: &Decided| all.iter().position(|&choice| choice == decided.choice).unwrap_or(0) as u8;
    let mut index: Vec<u8> = decided.iter().map(place).collect();
    comm.broadcast_bytes(&mut index, 0)?;
    let choice = index.first().and_then(|&index| all.get(usize::from(index)));
    let choice = *choice.context("the choice of rank 0")?;
    let (mut words, mut warning) = (None, None);
    if let Some(decided) = decided {
        let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let place = if room.on_gpu { "on the GPU" } else { "for a rank on this host" };
        let (needed, there) = (gb(decided.memory.total() + of_rewards), gb(room.bytes));
        let chosen = in_words(config, choice);
        words = Some(format!("{chosen} (a rank takes about {needed}, there are {there} {place})"));
        let short = format!("the run may not fit into memory: about {needed} of {there} {place}; raise run.lanes");
        warning = (!decided.fits).then_some(short);
    }
    Ok(Chosen { choice, words, warning })
}

/// The settings that were left to the program, with what was chosen.
pub fn in_words(config: &Config, choice: Choice) -> String {
    let mut words = Vec::new();
    if config.model.gradient_checkpointing == Checkpointing::Auto {
        let which = match choice.recomputed {
            Recomputed::Nothing => "off",
            Recomputed::Level0 => "of level 0",
            Recomputed::Everything => "on",
        };
        words.push(format!("gradient checkpointing: {which}"));
    }
    if config.rollout.cuda_graph == Graphs::Auto {
        words.push(format!("CUDA graphs: {}", if choice.graphs { "on" } else { "off" }));
    }
    format!("chosen by \"auto\": {}", words.join(", "))
}

/// Memory of this rank's GPU, or its share of the host's.
fn own_memory(device: Device, comm: &dyn Communicator) -> Result<u64> {
    match device {
        Device::Cuda(index) => {
            let gpus = parts::gpus()?;
            let gpu = gpus.get(index).with_context(|| format!("the driver does not list GPU {index}"))?;
            Ok(gpu.bytes as u64)
        }
        _ => Ok(host_memory() / comm.local_rank().1.max(1) as u64),
    }
}

/// Memory that this process may use with those beside it: the machine's, or what the job's control group allows.
fn host_memory() -> u64 {
    let number = |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).and_then(number);
    let limit = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.as_deref().and_then(number);
    // where nothing is known, nothing is a reason to save
    total.map_or(u64::MAX, |kib| kib << 10).min(limit.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::Local,
        config::load::{parse, EMBEDDED_JOINT},
        models::architectures::Architecture,
    };

    fn config(sets: &[&str]) -> Config {
        let joint = concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/joint.toml");
        let text = std::fs::read_to_string(joint).unwrap();
        parse(&text, joint, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
    }

    /// As measured of SD2's U-Net in f32, halved for bf16: bytes of a row.
    fn cost(recomputed: Recomputed) -> Result<Cost> {
        let kept = match recomputed {
            Recomputed::Nothing => 870_000_000,
            Recomputed::Level0 => 330_000_000,
            Recomputed::Everything => 60_000_000,
        };
        Ok(Cost {
            kept_per_row: kept,
            working_per_row: 134_000_000,
            decode_per_picture: 600_000_000,
            ..Cost::default()
        })
    }

    fn pipeline(config: &Config) -> Pipeline {
        Pipeline::shapes_only(Architecture::Sd2Base.files(), Device::Cpu, super::super::build_for(config)).unwrap()
    }

    #[test]
    fn memory_decides() {
        let config = config(&["model.gradient_checkpointing='auto'", "rollout.cuda_graph='auto'"]);
        let pipeline = pipeline(&config);
        let room = |bytes: u64, on_gpu: bool| Room { on_gpu, in_company: true, bytes, lanes: 1 };
        let chosen = |bytes: u64, on_gpu: bool| {
            let decided = decide_by(&config, &pipeline, 0, &room(bytes, on_gpu), cost).unwrap();
            (decided.choice, decided.fits)
        };
        let all = candidates(&config, &room(0, true));
        assert_eq!(all.len(), 6);
        let total = |choice: &Choice| {
            let setting = Setting { lanes: 1, on_gpu: true, in_company: true, graphs: choice.graphs };
            footprint::memory(&config, &pipeline, &cost(choice.recomputed).unwrap(), setting).total()
        };
        let totals: Vec<u64> = all.iter().map(total).collect();
        assert!(totals.windows(2).all(|pair| pair[0] >= pair[1]), "the fastest first takes most: {totals:?}");
        assert!(totals[0] > totals[2] && totals[2] > totals[4], "{totals:?}");
        // SD2 with all activations and a graph fits a GPU of 80 GB, not one of 48
        let enough_for = |total: u64| (total as f64 / USABLE) as u64 + 1;
        assert!((48_000_000_000..80_000_000_000).contains(&enough_for(totals[0])), "{totals:?}");
        for total in totals.clone() {
            let enough = enough_for(total);
            let first = totals.iter().position(|&other| other <= total).unwrap();
            assert_eq!(chosen(enough, true), (all[first], true), "{enough} bytes");
            let (choice, fits) = chosen(enough - 1_000_000, true);
            assert!(choice != all[first] || !fits, "{choice:?} in less than it takes");
        }
        assert!(!chosen(1, true).1);
        // no graphs on a CPU, however much memory it has
        let everything_kept = Choice { recomputed: Recomputed::Nothing, graphs: false };
        assert_eq!(chosen(1 << 50, false), (everything_kept, true));
    }

    #[test]
    fn what_is_fixed_stays() {
        let config = config(&["model.gradient_checkpointing='level_0'", "rollout.cuda_graph='auto'"]);
        let room = Room { on_gpu: true, in_company: false, bytes: 1 << 40, lanes: 1 };
        let decided = decide_by(&config, &pipeline(&config), 0, &room, cost).unwrap();
        assert_eq!(decided.choice, Choice { recomputed: Recomputed::Level0, graphs: true });
        assert_eq!(in_words(&config, decided.choice), "chosen by \"auto\": CUDA graphs: on");
    }

    #[test]
    fn a_host_has_memory_and_a_miniature_fits() {
        assert!(host_memory() > 1 << 28);
        let sets = ["model.gradient_checkpointing='auto'".to_string(), "rollout.cuda_graph='auto'".to_string()];
        let config = parse(EMBEDDED_JOINT, "joint", &sets).unwrap();
        let pipeline = super::super::load_for_training(&config, &Local, Device::Cpu).unwrap();
        let chosen = choose(&config, &pipeline, 0, 2, &Local).unwrap();
        assert!(chosen.words.unwrap().starts_with("chosen by \"auto\": gradient checkpointing: off, CUDA graphs: off"));
        assert_eq!(chosen.choice, Choice { recomputed: Recomputed::Nothing, graphs: false });
    }
}
