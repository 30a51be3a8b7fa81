//! Measures iterations on the ranks there are, section by section (see [`super::model`]).

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::sums::{BucketSum, Sums};
use crate::{
    cli::bench::{median, rates},
    comm::{Communicator, Operation, Timed, Visit},
    config::Config,
    models::pipeline::Pipeline,
    run::load_for_training,
    train::Trainer,
};

/// What one start of the program on some number of ranks found out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measurement {
    pub config: String,
    pub ranks: usize,
    /// Of a node, at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranks_per_node: Option<usize>,
    /// The GPU's name; absent on CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<String>,
    pub threads: usize,
    /// The config as it is: the same batch, shared by the ranks. Absent where the ranks cannot share its lanes evenly.
    pub strong: Option<Iterations>,
    /// The same number of lanes for every rank.
    pub weak: Iterations,
    /// Median seconds of a sum of nothing and of one of the gradient's size.
    pub empty_sum_seconds: f64,
    pub gradient_sum_seconds: f64,
    pub gradient_bytes: usize,
    /// The gradient's sum in buckets of several sizes, nothing else going on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bucket_sums: Vec<BucketSum>,
    /// From the start of the process until model and optimizer stand, by rank.
    pub start_up_seconds: Vec<f64>,
    /// Memory that no other process shares, after the last iteration, bytes, by rank.
    pub private_bytes: Vec<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Iterations {
    pub lanes_per_rank: usize,
    pub samples: usize,
    /// Seconds of every measured iteration, on the slowest rank.
    pub seconds: Vec<f64>,
    pub sections: Vec<MeasuredSection>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MeasuredSection {
    pub operation: Operation,
    /// Mean over ranks of what each brings along.
    pub bytes: f64,
    /// Mean over ranks and iterations.
    pub work_seconds: f64,
    /// Standard deviation of the work over the ranks of an iteration (root of the mean variance); of one rank, over the
    /// iterations.
    pub work_deviation: f64,
    /// Seconds in the operation of the rank that came last: the operation without the waiting.
    pub operation_seconds: f64,
    /// Seconds of the work during which the operation could go on already; mean over ranks and iterations.
    #[serde(default)]
    pub window_seconds: f64,
    /// Pieces of the operation.
    #[serde(default)]
    pub vectors: usize,
}

/// How much is measured.
#[derive(Clone, Copy)]
pub struct Plan {
    pub lanes_per_rank: usize,
    pub warm_up: u64,
    pub measured: u64,
}

/// Trains `pipeline`, the config's model, where it lies; on GPUs a communicator of several ranks reaches their memory. A
/// collective call; the result is rank 0's.
pub fn measure(config: &Config, plan: Plan, comm: &dyn Communicator, pipeline: Pipeline) -> Result<Measurement> {
    let device = pipeline.device;
    let ranks = comm.size();
    let weak_config = with_lanes(config, ranks * plan.lanes_per_rank)?;
    let timed = Timed::new(comm);
    let mut trainer = Trainer::new(&weak_config, &timed, pipeline)?;
    let start_up_seconds = gather(comm, since_process_start()?)?;
    let weak = iterations(&weak_config, &mut trainer, &timed, plan)?;
    let gradient_bytes = 4 * trainer.learner.params.len();
    drop(trainer);
    let strong = match config.run.lanes % ranks {
        0 => {
            let mut trainer = Trainer::new(config, &timed, load_for_training(config, comm, device)?)?;
            Some(iterations(config, &mut trainer, &timed, plan)?)
        }
        _ => None,
    };
    let ranks_per_node = gather(comm, comm.local_rank().1)?.into_iter().max();
    let sums = Sums { comm, device, length: gradient_bytes / 4 };
    Ok(Measurement {
        config: config.run.name.clone(),
        ranks,
        ranks_per_node,
        gpu: rates::gpu(device)?.map(|gpu| gpu.0),
        threads: config.run.threads,
        strong,
        weak,
        empty_sum_seconds: sums.seconds(1, 1)?,
        gradient_sum_seconds: sums.seconds(sums.length, sums.length)?,
        gradient_bytes,
        bucket_sums: sums.in_buckets()?,
        start_up_seconds,
        private_bytes: gather(comm, private_bytes()?)?,
    })
}

/// Scalars of a U-Net that a CPU still trains in seconds or minutes.
const MOST_ON_A_CPU: u64 = 200_000_000;

/// # Errors
/// A model of full size on a CPU: one iteration would take a day.
pub fn ensure_feasible(pipeline: &Pipeline) -> Result<()> {
    let parameters = pipeline.unet_parameters.count();
    ensure!(
        pipeline.device != Device::Cpu || parameters <= MOST_ON_A_CPU,
        "an iteration of a U-Net of {} M parameters takes a CPU core a day or more: bench scaling measures it on GPUs \
         (--device cuda)",
        parameters / 1_000_000
    );
    Ok(())
}

/// The config with another number of lanes of the same size.
fn with_lanes(config: &Config, lanes: usize) -> Result<Config> {
    let mut changed = config.clone();
    changed.run.lanes = lanes;
    for task in &mut changed.tasks {
        task.samples = task.samples / config.run.lanes * lanes;
    }
    changed.validate()?;
    Ok(changed)
}

fn iterations(config: &Config, trainer: &mut Trainer, timed: &Timed, plan: Plan) -> Result<Iterations> {
    let (mut mine, mut seconds) = (Vec::new(), Vec::new());
    for iteration in 0..plan.warm_up + plan.measured.max(1) {
        timed.barrier()?;
        timed.take();
        let started = Instant::now();
        trainer.iterate(iteration, &mut |_, _, _, _| Ok(()))?;
        // the end of all ranks' iteration
        timed.barrier()?;
        if iteration >= plan.warm_up {
            seconds.push(started.elapsed().as_secs_f64());
            mine.push(timed.take());
        }
    }
    // section by section: of every rank, of every iteration
    let of_ranks: Vec<Vec<Vec<Visit>>> = gather(timed, mine)?;
    let count = of_ranks[0][0].len();
    let same = of_ranks.iter().flatten().all(|visits| visits.len() == count);
    ensure!(same, "ranks or iterations differ in their collective operations");
    let slowest = gather(timed, seconds)?.into_iter().reduce(|a, b| a.iter().zip(&b).map(|(x, y)| x.max(*y)).collect());
    Ok(Iterations {
        lanes_per_rank: config.run.lanes / timed.size(),
        samples: config.trained_tasks().map(|(_, task)| task.samples).sum(),
        seconds: slowest.context("no rank")?,
        sections: (0..count).map(|index| section(&of_ranks, index)).collect(),
    })
}

fn section(of_ranks: &[Vec<Vec<Visit>>], index: usize) -> MeasuredSection {
    let iterations = of_ranks[0].len();
    let of_iteration = |i: usize| of_ranks.iter().map(move |rank| rank[i][index]);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let variance = |values: &[f64]| {
        let m = mean(values);
        values.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (values.len() as f64 - 1.0).max(1.0)
    };
    let work: Vec<Vec<f64>> = (0..iterations).map(|i| of_iteration(i).map(|v| v.work).collect()).collect();
    let work_deviation = match of_ranks.len() {
        1 => variance(&work.concat()),
        _ => mean(&work.iter().map(|ranks| variance(ranks)).collect::<Vec<_>>()),
    }
    .sqrt();
    let shortest = |i: usize| of_iteration(i).map(|v| v.inside).fold(f64::INFINITY, f64::min);
    let first = of_ranks[0][0][index];
    MeasuredSection {
        operation: first.operation,
        bytes: mean(&of_iteration(0).map(|v| v.bytes as f64).collect::<Vec<_>>()),
        work_seconds: mean(&work.concat()),
        work_deviation,
        operation_seconds: median((0..iterations).map(shortest).collect()),
        window_seconds: mean(&(0..iterations).flat_map(&of_iteration).map(|v| v.window).collect::<Vec<_>>()),
        vectors: first.vectors,
    }
}

/// Every rank's value, in rank order, on every rank.
fn gather<T: Serialize + serde::de::DeserializeOwned>(comm: &dyn Communicator, mine: T) -> Result<Vec<T>> {
    let all = comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
    all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
}

/// Seconds since the kernel started this process.
fn since_process_start() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("/proc/self/stat")?;
    // after "pid (name) ", the name may hold anything; starttime is the 20th field from there, in ticks since boot
    let ticks = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse::<f64>().ok());
    // SAFETY: asks for a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) };
    let now = now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9;
    Ok(now - ticks.context("/proc/self/stat has no start time")? / per_second)
}

/// Memory of this process alone: anonymous pages in RAM.
fn private_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let field = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
    Ok(field.context("/proc/self/status has no RssAnon")?.trim().parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        miniature::MINIATURE_MODEL,
        models::{
            architectures::Architecture,
            folder::{ModelFiles, ModelLocation},
            pipeline::Build,
        },
    };

    #[test]
    fn a_model_of_full_size_is_not_measured_on_a_cpu() {
        let sized = |files| Pipeline::shapes_only(files, Device::Cpu, Build::default()).unwrap();
        ensure_feasible(&sized(ModelFiles::read(&ModelLocation::Embedded(MINIATURE_MODEL)).unwrap())).unwrap();
        let error = ensure_feasible(&sized(Architecture::Sd2Base.files())).unwrap_err().to_string();
        assert!(error.contains("866 M parameters") || error.contains("865 M parameters"), "{error}");
        assert!(error.contains("--device cuda"), "{error}");
    }

    fn visit(work: f64, inside: f64) -> Visit {
        Visit { operation: Operation::Sum, bytes: 8, work, inside, window: 0.25 * work, vectors: 1 }
    }

    #[test]
    fn spread_is_over_ranks_and_the_last_to_come_does_not_wait() {
        // two ranks, two iterations, one section
        let of_ranks =
            [vec![vec![visit(1.0, 0.5)], vec![visit(2.0, 0.4)]], vec![vec![visit(1.4, 0.1)], vec![visit(2.2, 0.2)]]];
        let s = section(&of_ranks, 0);
        assert!((s.work_seconds - 1.65).abs() < 1e-12);
        // variances 0.08 and 0.02
        assert!((s.work_deviation - 0.05f64.sqrt()).abs() < 1e-12);
        assert!((s.operation_seconds - 0.15).abs() < 1e-12);
        assert!((s.window_seconds - 0.25 * 1.65).abs() < 1e-12 && s.vectors == 1);
        let alone = section(&of_ranks[..1], 0);
        assert!((alone.work_deviation - 0.5f64.sqrt()).abs() < 1e-12, "over iterations: {}", alone.work_deviation);
    }

    #[test]
    fn a_process_knows_its_age_and_size() {
        let age = since_process_start().unwrap();
        assert!((0.0..3600.0).contains(&age), "{age}");
        assert!(private_bytes().unwrap() > 100_000);
    }
}
