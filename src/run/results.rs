//! The end of a run: base against tuned model, and the files that say so.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{ensure, Context, Result};
use tch::Kind;

use super::{load_model, no_signal, CannotWrite, Ending};
use crate::{
    comm::{agree, Communicator},
    config::Config,
    evaluate::{evaluate, Stop, TaskEvaluation},
    telemetry::{
        before_after_sheet, draw_reward_curves, names, read_metrics, save_png, BeforeAfter, Column, EventWriter,
        RewardPanel, RunFiles, Summary, TaskSummary,
    },
    train::Trainer,
    watch,
};

/// Evaluates base and tuned model with the same noise, and writes the results; unless `stop` says so in between.
pub fn finish(
    config: &Config,
    comm: &dyn Communicator,
    files: &RunFiles,
    mut trainer: Trainer,
    events: Option<EventWriter>,
    started: Instant,
    stop: &Stop,
) -> Result<Ending> {
    let first = comm.rank() == 0;
    if first {
        log::info!("evaluating the tuned and the base model on held-out prompts");
    }
    let weights = trainer.result();
    if let Some(average) = trainer.learner.average.clone() {
        trainer.learner.params.buffer_mut().copy_from(&average);
        trainer.learner.params.publish();
    }
    let _stage = watch::stage("evaluation", "");
    let Some(tuned) = evaluate(config, &trainer.pipeline, &trainer.steps, &mut trainer.tasks, comm, stop)? else {
        return Ok(Ending::Interrupted);
    };
    let base_model = load_model(&config.model.path, comm, trainer.pipeline.device)?;
    let Some(base) = evaluate(config, &base_model, &trainer.steps, &mut trainer.tasks, comm, stop)? else {
        return Ok(Ending::Interrupted);
    };
    let save = || -> Result<()> {
        let pipeline = &trainer.pipeline;
        pipeline.save(&files.model(), Kind::Float, Some(&pipeline.unet_with(&weights)?))?;
        if pipeline.lora.is_some() {
            pipeline.save_lora(&files.lora(), &weights, Kind::Float)?;
        }
        write_results(config, comm.size(), files, &base, &tuned, trainer.learner.ratio_drift, events, started)
    };
    let written = if first { save() } else { Ok(()) };
    agree(comm, written).context(CannotWrite)?;
    Ok(Ending::Complete)
}

fn write_results(
    config: &Config,
    world_size: usize,
    files: &RunFiles,
    base: &[TaskEvaluation],
    tuned: &[TaskEvaluation],
    ratio_drift: f64,
    events: Option<EventWriter>,
    started: Instant,
) -> Result<()> {
    let history = read_metrics(&files.metrics())?;
    no_signal::in_all(&history).iter().for_each(|line| log::warn!("{line}"));
    ensure!(base.len() == tuned.len(), "evaluations of different configs");
    let tasks = base
        .iter()
        .zip(tuned)
        .map(|(b, t)| TaskSummary::paired(&b.task, &b.units, &t.units))
        .collect::<Result<Vec<_>>>()?;
    let mut seconds_per_stage = BTreeMap::new();
    let mut training_seconds = 0.0;
    for metrics in &history {
        for (name, value) in metrics.iter() {
            match name.strip_prefix("seconds/") {
                Some("iteration") => training_seconds += value,
                Some(stage) => *seconds_per_stage.entry(stage.to_string()).or_insert(0.0) += value,
                None => {}
            }
        }
    }
    let samples: usize = config.trained_tasks().map(|(_, t)| t.samples).sum();
    let summary = Summary {
        config_name: config.run.name.clone(),
        tasks,
        iterations: config.run.iterations,
        world_size,
        samples_per_second: (samples * history.len()) as f64 / training_seconds,
        wall_seconds: started.elapsed().as_secs_f64(),
        seconds_per_stage,
        ratio_drift,
    };

    let sections: Vec<BeforeAfter> =
        base.iter().zip(tuned).zip(&summary.tasks).map(|((b, t), s)| section(b, t, s)).collect();
    let sheet = before_after_sheet(&format!("{}: before and after, the same noise", config.run.name), &sections)?;
    save_png(&files.before_after(), &sheet, &[("config".into(), toml::to_string_pretty(config)?)])?;
    if let Some(mut events) = events {
        events.picture(config.run.iterations, "before_after", &sheet)?;
    }
    let panels: Vec<RewardPanel> = config
        .trained_tasks()
        .map(|(index, task)| RewardPanel { task: task.name.clone(), base: Some(summary.tasks[index].base.mean) })
        .collect();
    if history.iter().any(|m| panels.iter().any(|p| m.get(&names::reward_mean(&p.task)).is_some())) {
        draw_reward_curves(&files.reward_curves(), &config.run.name, &history, &panels)?;
    }
    summary.write(&files.summary())?;
    print!("\n{}", summary.table());
    println!("\nresults in {}", files.root().display());
    Ok(())
}

fn section(base: &TaskEvaluation, tuned: &TaskEvaluation, summary: &TaskSummary) -> BeforeAfter {
    // with a minus sign, not a hyphen
    let number = |value: f64, decimals: usize| format!("{value:.decimals$}").replace('-', "−");
    let columns = base.shown.iter().zip(&tuned.shown).map(|(b, t)| Column {
        caption: b.prompt.clone(),
        base: b.picture.clone(),
        tuned: t.picture.clone(),
        base_note: number(b.reward.into(), 2),
        tuned_note: number(t.reward.into(), 2),
    });
    BeforeAfter {
        title: format!(
            "{}: {} to {} on held-out prompts",
            base.task,
            number(summary.base.mean, 3),
            number(summary.tuned.mean, 3)
        ),
        columns: columns.collect(),
    }
}
