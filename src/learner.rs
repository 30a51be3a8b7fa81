//! What training changes: the weights of the U-Net or of its adapters, the optimizer's moments, the average of the weights.

use std::{borrow::Cow, collections::BTreeMap};

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use tch::Tensor;

use crate::{
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
    store::checkpoint::{Checkpoint, CheckpointRef, ParameterEntry},
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

    /// The state's vectors on the host, by name, parameters in row-major order; from a GPU each is copied when its turn comes.
    pub fn vectors(&self) -> impl Iterator<Item = (&'static str, Cow<'_, [f32]>)> {
        let always = [
            ("weights", self.params.buffer()),
            ("exp_avg", &self.optimizer.exp_avg),
            ("exp_avg_sq", &self.optimizer.exp_avg_sq),
        ];
        let average = self.average.as_ref().map(|average| ("ema", average));
        always.into_iter().chain(average).map(|(name, buffer)| (name, self.params.row_major(buffer)))
    }

    /// The state after `iteration` iterations as a checkpoint to save.
    pub fn checkpoint<'a>(
        iteration: u64,
        vectors: &'a [(&'static str, Cow<'a, [f32]>)],
        meta: &'a Value,
        layout: &'a [ParameterEntry],
        config_toml: &'a str,
    ) -> CheckpointRef<'a> {
        let vectors = vectors.iter().map(|(name, values)| (*name, &**values)).collect();
        CheckpointRef { iteration, meta, config_toml, layout, vectors }
    }

    /// Takes over a checkpoint's state.
    ///
    /// # Errors
    /// The checkpoint is of another network or lacks a vector.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        ensure!(checkpoint.layout == self.layout(), "the checkpoint's parameters are not those of the model");
        let vector = |name: &str| {
            let values = checkpoint.vector(name).with_context(|| format!("the checkpoint holds no vector {name}"))?;
            ensure!(
                values.len() == self.params.len(),
                "the checkpoint's vector {name} has {} values, expected {}",
                values.len(),
                self.params.len()
            );
            Ok(self.params.with_row_major(values))
        };
        let (weights, exp_avg, exp_avg_sq) = (vector("weights")?, vector("exp_avg")?, vector("exp_avg_sq")?);
        if self.average.is_some() {
            self.average = Some(vector("ema")?);
        }
        self.params.buffer_mut().copy_from(&weights);
        self.params.publish();
        self.optimizer.exp_avg = exp_avg;
        self.optimizer.exp_avg_sq = exp_avg_sq;
        let meta = &checkpoint.meta;
        self.optimizer.steps = meta["optimizer_steps"].as_u64().context("the checkpoint lacks optimizer_steps")?;
        let statistics: Vec<PromptStatistics> =
            serde_json::from_value(meta["prompt_statistics"].clone()).context("the checkpoint's prompt_statistics")?;
        ensure!(
            statistics.len() == self.statistics.len(),
            "the checkpoint has prompt_statistics of {} tasks, expected {}",
            statistics.len(),
            self.statistics.len()
        );
        self.statistics = statistics;
        self.ratio_drift = number::from_value(&meta["ratio_drift"]).context("the checkpoint lacks ratio_drift")?;
        Ok(())
    }
}
