//! What rank 0 writes while the run goes on.

use anyhow::Result;

use crate::{
    cannot_write::make_folder,
    config::Config,
    telemetry::{image_grid, write_atomic, EventWriter, JsonlWriter, Metrics, Progress, RunFiles, SampleSheet, Screen},
};

pub struct Recorder {
    pub metrics: JsonlWriter,
    events: EventWriter,
    /// Until the training's end.
    progress: Option<Progress>,
}

impl Recorder {
    /// Makes the run's folder, or goes on after `done` iterations in the one that is there.
    pub fn create(config: &Config, config_toml: &str, files: &RunFiles, done: u64) -> Result<Self> {
        files.create()?;
        write_atomic(&files.config(), config_toml.as_bytes())?;
        let names: Vec<String> = config.trained_tasks().map(|(_, t)| t.name.clone()).collect();
        let metrics = match done {
            0 => JsonlWriter::create(&files.metrics())?,
            done => JsonlWriter::open_for_resume(&files.metrics(), done)?,
        };
        Ok(Recorder {
            metrics,
            events: EventWriter::create(&files.tensorboard(), done)?,
            progress: Some(Progress::new(Screen::detect(), &names, done, config.run.iterations)),
        })
    }

    pub fn iteration(&mut self, metrics: &Metrics) -> Result<()> {
        self.metrics.append(metrics)?;
        self.events.metrics(metrics)?;
        if let Some(progress) = &mut self.progress {
            progress.iteration(metrics);
        }
        Ok(())
    }

    /// Keeps the line of an iteration whose evaluation was dropped. It is not shown before it is whole.
    pub fn without_evaluation(&mut self, metrics: &Metrics) -> Result<()> {
        self.metrics.append(metrics)
    }

    /// Puts the whole line in the place of one that was kept by [`Recorder::without_evaluation`].
    pub fn with_evaluation(&mut self, metrics: &Metrics) -> Result<()> {
        self.metrics.replace_last(metrics)?;
        self.events.metrics(metrics)
    }

    /// What a task's evaluation after `done` iterations drew, as a file and for TensorBoard.
    pub fn samples(&mut self, files: &RunFiles, done: u64, task: &str, sheet: &SampleSheet) -> Result<()> {
        let folder = files.samples(task);
        make_folder(&folder)?;
        sheet.save(&folder.join(SampleSheet::name(done)))?;
        self.events.picture(done, &format!("samples/{task}"), &image_grid("", &sheet.rows)?)
    }

    /// Ends the progress display; the event file stays open for the pictures.
    pub fn finish(&mut self) -> &mut EventWriter {
        if let Some(progress) = self.progress.take() {
            progress.finish();
        }
        &mut self.events
    }
}
