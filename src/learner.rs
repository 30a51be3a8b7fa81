//! What training changes: the weights of the U-Net or of its adapters, the optimizer's moments, the average of the weights.

use std::{collections::BTreeMap, ops::Range};

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use tch::Tensor;

use crate::{
    comm::Communicator,
    config::Config,
    faults,
    kernels::{adamw::AdamW, FlatBuffer},
    models::{
        flat_parameters::{FlatParameters, LayoutEntry},
        pipeline::Pipeline,
    },
    policy::{
        advantage::PromptStatistics,
        optimizer::{update_average, Optimizer},
    },
    store::checkpoint::{CheckpointRef, ParameterEntry, Stored, Values},
    telemetry::number,
};

pub struct Learner {
    pub params: FlatParameters,
    pub optimizer: Optimizer,
    /// Exponential average of the weights, where the config asks for one.
    pub average: Option<FlatBuffer>,
    average_decay: f64,
    /// Per task: running rewards of every prompt (`per_prompt` normalisation only).
    pub statistics: Vec<PromptStatistics>,
    /// Largest ratio drift of the run so far; for the summary.
    pub ratio_drift: f64,
}

impl Learner {
    /// Makes the U-Net of `pipeline`, or its adapters, trainable.
    pub fn new(pipeline: &Pipeline, config: &Config) -> Result<Self> {
        let params = FlatParameters::new(&[pipeline.trainable()])?;
        let u = &config.update;
        let adamw = AdamW {
            learning_rate: u.learning_rate,
            beta1: u.beta1,
            beta2: u.beta2,
            epsilon: u.epsilon,
            weight_decay: u.weight_decay,
        };
        let max_norm = (u.max_grad_norm > 0.0).then_some(u.max_grad_norm);
        let decay = config.ema.decay;
        Ok(Learner {
            optimizer: Optimizer::new(params.buffer(), adamw, max_norm, u.warmup_steps),
            average: (decay > 0.0).then(|| params.buffer().clone()),
            average_decay: decay,
            statistics: vec![PromptStatistics::default(); config.tasks.len()],
            ratio_drift: 0.0,
            params,
        })
    }

    /// One AdamW step (and one of the average); returns the gradient's norm before clipping.
    pub fn step(&mut self, gradient: &FlatBuffer) -> Result<f64> {
        let norm = self.optimizer.step(&mut self.params, gradient)?;
        if let Some(average) = &mut self.average {
            update_average(average, self.params.buffer(), self.average_decay);
        }
        Ok(norm)
    }

    /// Whether all weights, and their averages, are numbers.
    pub fn is_finite(&self) -> bool {
        self.params.buffer().is_finite() && self.average.as_ref().is_none_or(FlatBuffer::is_finite)
    }

    /// The faults `weights` and `moments`: the first weight, or mean of its gradients, becomes NaN, or another by its last
    /// bit.
    pub fn spoil(&mut self) {
        if !faults::present() {
            return;
        }
        for (at, buffer) in [("weights", self.params.buffer()), ("moments", &self.optimizer.exp_avg)] {
            let first = buffer.part(0..1);
            let mut value = [first.double_value(&[0]) as f32];
            if faults::spoil(at, &mut value) {
                let _ = first.shallow_clone().fill_(f64::from(value[0]));
            }
        }
        self.params.publish();
    }

    /// The weights to evaluate and to save: the average where there is one.
    pub fn result(&self) -> BTreeMap<String, Tensor> {
        self.params.unflatten(self.average.as_ref().unwrap_or(self.params.buffer()))
    }

    /// Everything a checkpoint holds, besides the config.
    pub fn meta(&self) -> Value {
        json!({
            "optimizer_steps": self.optimizer.steps,
            "prompt_statistics": self.statistics,
            "ratio_drift": number::to_value(self.ratio_drift),
        })
    }

    pub fn layout(&self) -> Vec<ParameterEntry> {
        let entry = |e: &LayoutEntry| ParameterEntry {
            name: e.name.clone(),
            shape: e.shape.iter().map(|&d| d as usize).collect(),
            offset: e.offset,
        };
        self.params.layout.iter().map(entry).collect()
    }

    /// The state's vectors by name, as they lie on the device.
    pub fn buffers(&self) -> impl Iterator<Item = (&'static str, &FlatBuffer)> {
        let always = [
            ("weights", self.params.buffer()),
            ("exp_avg", &self.optimizer.exp_avg),
            ("exp_avg_sq", &self.optimizer.exp_avg_sq),
        ];
        always.into_iter().chain(self.average.as_ref().map(|average| ("ema", average)))
    }

    /// The state's vectors by name, as a checkpoint has them: nothing is copied to the host before it is asked for.
    pub fn vectors(&self) -> Vec<(&'static str, RowMajor<'_>)> {
        self.buffers().map(|(name, buffer)| (name, RowMajor { params: &self.params, buffer })).collect()
    }

    /// The state after `iteration` iterations as a checkpoint to save.
    pub fn checkpoint<'a>(
        iteration: u64,
        vectors: &'a [(&'static str, RowMajor<'a>)],
        meta: &'a Value,
        layout: &'a [ParameterEntry],
        config_toml: &'a str,
    ) -> CheckpointRef<'a, RowMajor<'a>> {
        let vectors = vectors.iter().map(|(name, values)| (*name, values)).collect();
        CheckpointRef { iteration, meta, config_toml, layout, vectors }
    }

    /// Takes over a checkpoint's state, a piece of one vector at a time. A collective call; the error is the same on all
    /// ranks, and one of reading leaves the state half taken over.
    ///
    /// # Errors
    /// The checkpoint is of another network or lacks a vector.
    pub fn restore(&mut self, stored: &Stored, comm: &dyn Communicator) -> Result<()> {
        let head = &stored.head;
        ensure!(head.layout == self.layout(), "the checkpoint's parameters are not those of the model");
        for (name, _) in self.buffers() {
            ensure!(head.names.iter().any(|held| held == name), "the checkpoint holds no vector {name}");
            ensure!(
                head.elements == self.params.len(),
                "the checkpoint's vector {name} has {} values, expected {}",
                head.elements,
                self.params.len()
            );
        }
        let meta = &head.meta;
        let steps = meta["optimizer_steps"].as_u64().context("the checkpoint lacks optimizer_steps")?;
        let statistics: Vec<PromptStatistics> =
            serde_json::from_value(meta["prompt_statistics"].clone()).context("the checkpoint's prompt_statistics")?;
        ensure!(
            statistics.len() == self.statistics.len(),
            "the checkpoint has prompt_statistics of {} tasks, expected {}",
            statistics.len(),
            self.statistics.len()
        );
        let ratio_drift = number::from_value(&meta["ratio_drift"]).context("the checkpoint lacks ratio_drift")?;
        for (name, buffer) in self.buffers() {
            let mut take = |at: usize, values: &[f32]| self.params.write_row_major(buffer, at, values);
            stored.pieces(name, comm, &mut take)?;
        }
        self.params.publish();
        self.optimizer.steps = steps;
        self.statistics = statistics;
        self.ratio_drift = ratio_drift;
        Ok(())
    }
}

/// A vector of the state, every parameter in row-major order on the host.
pub struct RowMajor<'a> {
    params: &'a FlatParameters,
    buffer: &'a FlatBuffer,
}

impl Values for RowMajor<'_> {
    fn length(&self) -> usize {
        self.buffer.len()
    }

    fn copy(&self, range: Range<usize>) -> Vec<f32> {
        self.params.read_row_major(self.buffer, range)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use half::bf16;
    use tch::Device;

    use super::*;
    use crate::{
        comm::Local,
        config::load,
        models::row_major::moved,
        replicas,
        run::load_for_training,
        store::{checkpoint::Saver, Keep},
    };

    /// One of several ranks, the others like it.
    struct OneOf {
        rank: usize,
        size: usize,
    }

    impl Communicator for OneOf {
        fn rank(&self) -> usize {
            self.rank
        }

        fn size(&self) -> usize {
            self.size
        }

        fn local_rank(&self) -> (usize, usize) {
            (self.rank, self.size)
        }

        fn barrier(&self) -> Result<()> {
            Ok(())
        }

        fn broadcast_bytes(&self, _data: &mut Vec<u8>, _root: usize) -> Result<()> {
            Ok(())
        }

        fn broadcast_f32(&self, _data: &mut [f32], _root: usize) -> Result<()> {
            Ok(())
        }

        fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
            Ok(vec![data.to_vec(); self.size])
        }

        fn all_reduce_sum_f32(&self, _data: &mut [f32]) -> Result<()> {
            Ok(())
        }

        fn all_reduce_sum_bf16(&self, _data: &mut [bf16]) -> Result<()> {
            Ok(())
        }

        fn abort(&self, code: i32) -> ! {
            std::process::exit(code)
        }
    }

    /// Every rank used to copy all vectors to compare them and again to save 1/ranks of them; it copies its share, once.
    #[test]
    fn a_rank_copies_its_share_to_the_host_and_nothing_else() {
        let config = load::parse(load::EMBEDDED_JOINT, "joint", &["ema.decay=0.9".to_string()]).unwrap();
        let pipeline = load_for_training(&config, &Local, Device::Cpu).unwrap();
        let learner = Learner::new(&pipeline, &config).unwrap();
        let (meta, layout, vectors) = (learner.meta(), learner.layout(), learner.vectors());
        let checkpoint = Learner::checkpoint(1, &vectors, &meta, &layout, "");
        let elements = learner.params.len();
        let all_vectors = || vectors.iter().for_each(|(_, values)| drop(values.copy(0..elements)));
        let (before, ()) = moved::during(|| (0..2).for_each(|_| all_vectors()));
        assert_eq!((before, vectors.len()), (2 * 4 * elements * 4, 4));
        for size in [1, 2, 4, 128] {
            let mut together = 0;
            for rank in [0, 1, size / 2, size - 1].into_iter().filter(|&rank| rank < size) {
                let comm = OneOf { rank, size };
                let folder = tempfile::tempdir().unwrap();
                let mut saver = Saver::new(folder.path(), Keep { last: 1, every: 0 });
                let (saved, begun) = moved::during(|| saver.begin(&checkpoint, None, &comm));
                begun.unwrap();
                let share = elements * (rank + 1) / size - elements * rank / size;
                assert_eq!(saved, 4 * share * 4, "rank {rank} of {size}");
                together += saved;
                // on a GPU; on the CPU the vectors are hashed where they are
                let (compared, equal) = moved::during(|| replicas::compare(learner.buffers(), 1, &[], &comm));
                equal.unwrap();
                assert_eq!(compared, 0);
                println!("rank {rank} of {size}: {before} bytes before, {saved} for a save now, 32 for a comparison");
            }
            assert!(size > 2 || together >= before / 2, "{together} of {before}");
        }
    }
}
