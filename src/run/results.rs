//! The end of a run: base against tuned model, and the files that say so.

use std::{collections::BTreeMap, time::Instant};

use anyhow::{ensure, Context, Result};
use tch::Kind;

use super::{load_base, no_signal, stop};
use crate::{
    cannot_write::CannotWrite,
    comm::{agree, Communicator},
    config::Config,
    evaluate::{evaluate, TaskEvaluation},
    signals, streams,
    telemetry::{
        before_after_sheet, draw_reward_curves, names, read_metrics, save_png, BeforeAfter, Column, Ending,
        EventWriter, RewardPanel, RunFiles, Summary, TaskSummary,
    },
    train::Trainer,
    watch,
};

/// Evaluates base and tuned model with the same noise, and writes the results.
///
/// # Errors
/// Among others [`signals::Interrupted`], on all ranks, with nothing written and the trainer as it was.
pub fn finish(
    config: &Config,
    comm: &dyn Communicator,
    files: &RunFiles,
    trainer: &mut Trainer,
    events: Option<&mut EventWriter>,
    started: Instant,
    ending: Ending,
) -> Result<()> {
    let first = comm.rank() == 0;
    if first {
        log::info!("evaluating the tuned and the base model on held-out prompts");
    }
    let droppable = signals::droppable(
        "the evaluation at the end is dropped at the next denoising step; the state after the last iteration is kept",
    );
    let weights = trainer.result();
    let _stage = watch::stage("evaluation", "");
    let last = trainer.learner.average.clone().map(|average| {
        let params = &mut trainer.learner.params;
        let last = params.buffer().clone();
        params.buffer_mut().copy_from(&average);
        params.publish();
        last
    });
    let evaluated = evaluate_both(config, comm, trainer);
    if let (Err(_), Some(last)) = (&evaluated, last) {
        // to be saved
        trainer.learner.params.buffer_mut().copy_from(&last);
        trainer.learner.params.publish();
    }
    let (base, tuned) = evaluated?;
    drop(droppable);
    let _finishing = signals::finishing("the results are being written: that is finished first");
    let save = || -> Result<()> {
        let pipeline = &trainer.pipeline;
        pipeline.save_again(&files.model(), Kind::Float, Some(&pipeline.unet_with(&weights)?))?;
        if pipeline.lora.is_some() {
            pipeline.save_lora(&files.lora(), &weights, Kind::Float)?;
        }
        write_results(config, comm.size(), files, &base, &tuned, trainer.learner.ratio_drift, events, started, ending)
    };
    let written = if first { save() } else { Ok(()) };
    agree(comm, written).context(CannotWrite::new("the run's files"))
}

/// The base model's evaluation and the tuned one's. A collective call.
fn evaluate_both(
    config: &Config,
    comm: &dyn Communicator,
    trainer: &mut Trainer,
) -> Result<(Vec<TaskEvaluation>, Vec<TaskEvaluation>)> {
    signals::stop_here(comm)?;
    let tuned = evaluate(config, &trainer.pipeline, &trainer.steps, &mut trainer.tasks, comm)?;
    let base_model = load_base(config, comm, trainer.pipeline.device)?;
    signals::stop_here(comm)?;
    let base = evaluate(config, &base_model, &trainer.steps, &mut trainer.tasks, comm)?;
    Ok((base, tuned))
}

fn write_results(
    config: &Config,
    world_size: usize,
    files: &RunFiles,
    base: &[TaskEvaluation],
    tuned: &[TaskEvaluation],
    ratio_drift: f64,
    events: Option<&mut EventWriter>,
    started: Instant,
    ending: Ending,
) -> Result<()> {
    let history = read_metrics(&files.metrics())?;
    no_signal::in_all(&history).iter().for_each(|line| log::warn!("{line}"));
    let diverged = stop::fallen_back(config, &history);
    diverged.iter().for_each(|fallen| log::warn!("{fallen}"));
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
        iterations: ending.iterations,
        ended: Some(ending),
        diverged,
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
    if let Some(events) = events {
        events.picture(summary.iterations, "before_after", &sheet)?;
    }
    let panels: Vec<RewardPanel> = config
        .trained_tasks()
        .map(|(index, task)| RewardPanel { task: task.name.clone(), base: Some(summary.tasks[index].base.mean) })
        .collect();
    if history.iter().any(|m| panels.iter().any(|p| m.get(&names::reward_mean(&p.task)).is_some())) {
        draw_reward_curves(&files.reward_curves(), &config.run.name, &history, &panels)?;
    }
    summary.write(&files.summary())?;
    streams::print(format_args!("\n{}", summary.table()));
    say!("\nresults in {}", files.root().display());
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
