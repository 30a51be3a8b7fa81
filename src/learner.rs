//! What training changes: the weights of the U-Net or of its adapters, the optimizer's moments, the average of the weights.

use std::collections::BTreeMap;

use anyhow::{ensure, Context, Result};
use serde_json::{json, Value};
use tch::Tensor;

use crate::{
    config::Config,
    kernels::adamw::AdamW,
    models::{parameters::FlatParameters, pipeline::Pipeline},
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
    pub average: Option<Vec<f32>>,
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
            optimizer: Optimizer::new(params.len(), adamw, max_norm, u.warmup_steps),
            average: (decay > 0.0).then(|| params.values().to_vec()),
            average_decay: decay,
            statistics: vec![PromptStatistics::default(); config.tasks.len()],
            ratio_drift: 0.0,
            params,
        })
    }

    /// One AdamW step (and one of the average); returns the gradient's norm before clipping.
    pub fn step(&mut self, gradient: &[f32]) -> Result<f64> {
        let norm = self.optimizer.step(&mut self.params, gradient)?;
        if let Some(average) = &mut self.average {
            update_average(average, self.params.values(), self.average_decay);
        }
        Ok(norm)
    }

    /// Whether all weights, and their averages, are numbers.
    pub fn is_finite(&self) -> bool {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        finite(self.params.values()) && self.average.as_deref().is_none_or(finite)
    }

    /// The weights to evaluate and to save: the average where there is one.
    pub fn result(&self) -> BTreeMap<String, Tensor> {
        self.params.unflatten(self.average.as_deref().unwrap_or(self.params.values()))
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
        let entry = |e: &crate::models::parameters::LayoutEntry| ParameterEntry {
            name: e.name.clone(),
            shape: e.shape.iter().map(|&d| d as usize).collect(),
            offset: e.offset,
        };
        self.params.layout.iter().map(entry).collect()
    }

    /// The state after `iteration` iterations as a checkpoint to save.
    pub fn checkpoint<'a>(
        &'a self,
        iteration: u64,
        meta: &'a Value,
        layout: &'a [ParameterEntry],
        config_toml: &'a str,
    ) -> CheckpointRef<'a> {
        let mut vectors = vec![
            ("weights", self.params.values()),
            ("exp_avg", self.optimizer.exp_avg.as_slice()),
            ("exp_avg_sq", self.optimizer.exp_avg_sq.as_slice()),
        ];
        if let Some(average) = &self.average {
            vectors.push(("ema", average));
        }
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
            Ok(values.to_vec())
        };
        let (weights, exp_avg, exp_avg_sq) = (vector("weights")?, vector("exp_avg")?, vector("exp_avg_sq")?);
        if self.average.is_some() {
            self.average = Some(vector("ema")?);
        }
        self.params.values_mut().copy_from_slice(&weights);
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
