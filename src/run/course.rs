//! Small evaluations in the course of a run: reward, fine detail and diversity on the same few held-out prompts and noise,
//! and the pictures themselves.

use std::time::Instant;

use anyhow::{Context, Result};

use super::recorder::Recorder;
use crate::{
    cannot_write::CannotWrite,
    comm::{agree, Communicator},
    config::Config,
    evaluate::{evaluate_few, TaskEvaluation},
    signals,
    telemetry::{names, GridRow, Metrics, RunFiles, SampleSheet},
    train::Trainer,
    watch,
};

/// What the numbers of the model before training are called: `<task>/base_diversity`.
const BASE: &str = "base_";

/// Does an evaluation follow when `done` iterations are done? Before the first and after the last (`ended`), and in between
/// every `evaluation.every`.
pub fn is_due(config: &Config, done: u64, ended: bool) -> bool {
    let every = config.evaluation.every;
    every > 0 && (done % every == 0 || ended)
}

/// Whether the numbers of an iteration lack those of the evaluation that followed it: a signal has dropped it.
pub fn is_missing(metrics: &Metrics) -> bool {
    let of_evaluation = |name: &str| name.rsplit('/').next() == Some(names::EVALUATION_REWARD);
    !metrics.iter().any(|(name, _)| of_evaluation(name))
}

/// Evaluates the trainer's policy and adds what it finds to `metrics`; rank 0 keeps the pictures. A collective call.
///
/// # Errors
/// Among others [`signals::Interrupted`], on all ranks, with nothing added.
pub fn evaluate(
    trainer: &mut Trainer,
    comm: &dyn Communicator,
    files: &RunFiles,
    done: u64,
    recorder: &mut Option<Recorder>,
    metrics: &mut Metrics,
) -> Result<()> {
    let started = Instant::now();
    let of = if done == 0 { "of the base model".to_string() } else { format!("after iteration {done}") };
    let _droppable = signals::droppable(match done {
        0 => format!("the evaluation {of} is dropped at the next denoising step; nothing has been trained yet"),
        _ => format!("the evaluation {of} is dropped at the next denoising step; the iteration itself is saved"),
    });
    let _stage = watch::stage("evaluation", "");
    let few = evaluate_few(trainer.config, &trainer.pipeline, &trainer.steps, &mut trainer.tasks, comm)?;
    let prefix = if done == 0 { BASE } else { "" };
    for task in &few {
        for (name, value) in numbers(task) {
            metrics.set(names::of_task(&task.task, &format!("{prefix}{name}")), value);
        }
    }
    let _finishing = signals::finishing(format!("the evaluation {of} is being written: that is finished first"));
    let kept = recorder.as_mut().map_or(Ok(()), |recorder| {
        few.iter().try_for_each(|task| recorder.samples(files, done, &task.task, &sheet(task)))
    });
    agree(comm, kept).context(CannotWrite::new("the run's files"))?;
    // the first line of metrics takes that of the base model, too
    let before = metrics.get(&names::seconds("evaluation")).unwrap_or(0.0);
    metrics.set(names::seconds("evaluation"), before + started.elapsed().as_secs_f64());
    Ok(())
}

/// Means over pictures, or over prompts; rewards that are not finite are left out.
fn numbers(task: &TaskEvaluation) -> Vec<(&'static str, f64)> {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let rewards: Vec<f64> = task.rewards.iter().map(|&r| f64::from(r)).filter(|r| r.is_finite()).collect();
    let mut numbers =
        vec![(names::EVALUATION_REWARD, mean(&rewards)), (names::HIGH_FREQUENCY, mean(&task.high_frequency))];
    if !task.diversity.is_empty() {
        numbers.push((names::DIVERSITY, mean(&task.diversity)));
    }
    numbers
}

/// The pictures that are kept, a row for each prompt.
fn sheet(task: &TaskEvaluation) -> SampleSheet {
    let prompts = task.diversity.len().max(1);
    let rows = task.shown.chunks(task.shown.len() / prompts).map(|of_prompt| GridRow {
        caption: of_prompt[0].prompt.clone(),
        pictures: of_prompt.iter().map(|shown| shown.picture.clone()).collect(),
    });
    SampleSheet { rows: rows.collect() }
}
