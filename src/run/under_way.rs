//! A run from its first iteration to its results, or to the signal that ends it.

use std::time::{Duration, Instant};

use anyhow::{anyhow, Context, Result};
use tch::Device;

use super::{course, no_signal::NoSignal, recorder::Recorder, results, resume, trajectories, Run};
use crate::{
    cannot_write::CannotWrite,
    comm::{agree, last_words},
    config::RewardSource,
    faults,
    folders::FolderLock,
    learner::Learner,
    replicas, signals,
    store::{Keep, SaveReport, Saver},
    stragglers::Stragglers,
    telemetry::{names, read_metrics, Metrics, Reason},
    watch::{self, Limits, Watchdog},
};

/// What the message of a failure has to come out by itself.
const PATIENCE_AFTER_A_FAILURE: Duration = Duration::from_secs(10);

/// A run under way: what it writes with, and where it is.
struct UnderWay {
    config_toml: String,
    hosts: Vec<String>,
    /// On rank 0.
    recorder: Option<Recorder>,
    saver: Saver,
    stragglers: Stragglers,
    no_signal: NoSignal,
    /// Iterations done.
    done: u64,
    /// The iteration whose state is on disk, or on its way there.
    saved: Option<u64>,
    /// What a signal drops now; nothing between two pieces of work.
    droppable: Option<String>,
}

impl Run<'_> {
    /// Trains, evaluates and writes everything. A collective call.
    ///
    /// # Errors
    /// [`signals::Interrupted`] on all ranks where a signal asked for it: what could be dropped is, the state before it is
    /// on disk, and the run goes on from there when it is resumed.
    pub fn go(mut self) -> Result<()> {
        let (config, comm) = (self.config, self.comm);
        let first = comm.rank() == 0;
        if self.is_finished()? {
            if first {
                let ended = self.stop.ending(self.done).words;
                say!("{}: {ended}; see {}", config.run.name, self.files.root().display());
            }
            return Ok(());
        }
        signals::stop_here(comm)?;
        self.trainer.chosen.tell();
        let config_toml = toml::to_string_pretty(config)?;
        let begun = if first { self.begin(&config_toml).map(Some) } else { Ok(None) };
        let (recorder, begun) = match begun {
            Ok(recorder) => (recorder, Ok(())),
            Err(e) => (None, Err(e)),
        };
        agree(comm, begun).context(CannotWrite::new("the run's files"))?;
        let _between = signals::droppable("leaving before the next piece of work; what is done is kept");
        let hosts = watch::hosts(comm)?;
        let limits = Limits { collective: config.run.collective_limit, reward: config.run.reward_limit };
        let _watchdog = Watchdog::start(self.files.watch(), comm.rank(), hosts.clone(), limits)?;
        let keep = Keep { last: config.run.keep_checkpoints, every: config.run.keep_every };
        let mut way = UnderWay {
            config_toml,
            hosts,
            recorder,
            saver: Saver::new(&self.files.checkpoints(), keep),
            stragglers: Stragglers::default(),
            no_signal: NoSignal::default(),
            done: self.done,
            saved: self.origin.as_deref().filter(|origin| resume::is_in(origin, &self.files)).map(|_| self.done),
            droppable: None,
        };
        match self.work(&mut way) {
            Err(e) if signals::is_interruption(&e) => self.leave(way).and(Err(e)),
            Err(e) => {
                // what is dropped on the way to the message may wait for a GPU that waits for other ranks
                if self.trainer.pipeline.device != Device::Cpu && comm.size() > 1 {
                    last_words(comm.rank(), &e, PATIENCE_AFTER_A_FAILURE)?;
                }
                Err(e)
            }
            Ok(()) => Ok(()),
        }
    }

    /// What is left to do. A collective call.
    fn work(&mut self, way: &mut UnderWay) -> Result<()> {
        let (config, comm) = (self.config, self.comm);
        let mut of_base = Metrics::default();
        if self.done == 0 && course::is_due(config, 0, false) {
            way.droppable = Some("the evaluation of the base model".to_string());
            course::evaluate(&mut self.trainer, comm, &self.files, 0, &mut way.recorder, &mut of_base)?;
        }
        let mut ended = self.stop.is_end(self.done, comm)?;
        if let Some(mut metrics) = self.without_evaluation(ended)? {
            way.droppable = Some(format!("the evaluation after iteration {}", self.done));
            course::evaluate(&mut self.trainer, comm, &self.files, self.done, &mut way.recorder, &mut metrics)?;
            ended |= self.stop.see(RewardSource::Evaluation, &mut metrics, comm)?;
            if let Some(recorder) = &mut way.recorder {
                recorder.with_evaluation(&metrics).context(CannotWrite::new("the run's files"))?;
            }
        }
        while !ended {
            ended = self.iterate(way, way.done, &of_base)?;
        }
        let ending = self.stop.ending(way.done);
        if comm.rank() == 0 && ending.reason == Reason::Saturated {
            log::info!("{}", ending.words);
        }
        way.droppable = Some("the evaluation at the end".to_string());
        let events = way.recorder.as_mut().map(Recorder::finish);
        results::finish(config, comm, &self.files, &mut self.trainer, events, self.started, ending)
    }

    /// One iteration with its evaluation, its checkpoint and its line of metrics; gives whether it was the last. A collective
    /// call.
    fn iterate(&mut self, way: &mut UnderWay, iteration: u64, of_base: &Metrics) -> Result<bool> {
        let (config, comm) = (self.config, self.comm);
        self.lock.as_ref().map_or(Ok(()), FolderLock::check)?;
        let done = iteration + 1;
        let droppable = signals::droppable(match iteration {
            0 => {
                "iteration 1 is dropped at the next denoising step or reward batch; nothing has been trained yet".into()
            }
            _ => format!(
                "iteration {done} is dropped at the next denoising step or reward batch; the state after iteration \
                 {iteration} is kept"
            ),
        });
        way.droppable = None;
        signals::stop_here(comm)?;
        way.droppable = Some(format!("the roll-out of iteration {done}"));
        let (mut saved, mut stalled) = (None, Duration::ZERO);
        let saver = &mut way.saver;
        let mut metrics = self.trainer.iterate(iteration, &mut |trainer, task, batch, chosen| {
            let started = Instant::now();
            saved = saver.advance(comm).context(CannotWrite::new("the run's files"))?.or(saved.take());
            stalled += started.elapsed();
            let every = config.trajectories.every;
            if let Some(batch) = batch.filter(|_| every > 0 && done % every == 0) {
                trajectories::write(trainer, &self.files, task, iteration, batch, chosen)
                    .context(CannotWrite::new("the run's files"))?;
            }
            Ok(())
        })?;
        drop(droppable);
        let _finishing = signals::finishing(format!("iteration {done} is done: it is saved first"));
        (way.done, way.droppable) = (done, None);
        if iteration == 0 {
            of_base.iter().for_each(|(name, value)| metrics.set(name, value));
        }
        if comm.rank() == 0 {
            let seconds = metrics.get(names::SECONDS).unwrap_or(0.0);
            let mut lines = way.stragglers.note(&self.trainer.stage_seconds, seconds, &way.hosts);
            lines.extend(way.no_signal.note(config, &metrics));
            lines.iter().for_each(|line| log::warn!("iteration {done}: {line}"));
        }
        self.trainer.check_weights(done)?;
        let saturated = self.stop.see(RewardSource::Training, &mut metrics, comm)?;
        let mut ended = saturated || done == config.run.iterations;
        if course::is_due(config, done, ended) {
            way.droppable = Some(format!("the evaluation after iteration {done}"));
            let recorder = &mut way.recorder;
            let evaluated = course::evaluate(&mut self.trainer, comm, &self.files, done, recorder, &mut metrics);
            if let (Err(e), Some(recorder)) = (&evaluated, recorder) {
                if signals::is_interruption(e) {
                    recorder.without_evaluation(&metrics).context(CannotWrite::new("the run's files"))?;
                }
            }
            evaluated?;
            ended |= self.stop.see(RewardSource::Evaluation, &mut metrics, comm)?;
        }
        if config.run.compare_every > 0 && done % config.run.compare_every == 0 {
            replicas::compare(self.trainer.learner.buffers(), done, &way.hosts, comm)?;
        }
        let every = config.run.checkpoint_every;
        let _stage = watch::stage("saving", "");
        let started = Instant::now();
        saved = way.saver.advance(comm).context(CannotWrite::new("the run's files"))?.or(saved);
        if every > 0 && (done % every == 0 || ended) {
            saved = self.begin_save(way)?.or(saved);
        }
        stalled += started.elapsed();
        metrics.set(names::SAVE_STALL, stalled.as_secs_f64());
        if let Some(report) = saved {
            metrics.set(names::SAVE_IN_BACKGROUND, report.took.as_secs_f64());
        }
        if let Some(recorder) = &mut way.recorder {
            faults::point("metrics");
            recorder.iteration(&metrics).context(CannotWrite::new("the run's files"))?;
        }
        if ended {
            self.finish_save(way)?;
        }
        Ok(ended)
    }

    /// Saves the state where it is not on disk yet, and says what became of what was under way. A collective call.
    fn leave(self, mut way: UnderWay) -> Result<()> {
        let _finishing = signals::finishing("saving");
        let (done, comm) = (way.done, self.comm);
        if done > 0 && way.saved != Some(done) {
            let _stage = watch::stage("saving", "");
            self.begin_save(&mut way)?;
        }
        self.finish_save(&mut way)?;
        if let Some(recorder) = &mut way.recorder {
            recorder.finish();
        }
        if comm.rank() == 0 {
            let dropped = way.droppable.map(|what| format!("; {what} was dropped")).unwrap_or_default();
            match done {
                0 => log::info!("asked to stop before the first iteration was done: nothing to save{dropped}"),
                _ => log::info!("asked to stop: saved after iteration {done}{dropped}"),
            }
        }
        Ok(())
    }

    /// The numbers of the last iteration that is done, where its evaluation was dropped and is to be made up for. They are
    /// rank 0's; the others have some without values. A collective call.
    fn without_evaluation(&self, ended: bool) -> Result<Option<Metrics>> {
        if self.done == 0 || !course::is_due(self.config, self.done, ended) {
            return Ok(None);
        }
        let read = || -> Result<Option<Metrics>> {
            let last = read_metrics(&self.files.metrics())?.pop();
            Ok(last.filter(|metrics| metrics.iteration + 1 == self.done && course::is_missing(metrics)))
        };
        let read = if self.comm.rank() == 0 { read() } else { Ok(None) };
        let mut found = vec![u8::from(matches!(read, Ok(Some(_))))];
        agree(self.comm, read.as_ref().map(drop).map_err(|e| anyhow!("{e:#}")))?;
        self.comm.broadcast_bytes(&mut found, 0)?;
        let mine = read?;
        Ok((found == [1]).then(|| mine.unwrap_or_else(|| Metrics::new(self.done - 1))))
    }

    /// Begins to save the state after the iterations that are done. A collective call.
    fn begin_save(&self, way: &mut UnderWay) -> Result<Option<SaveReport>> {
        let metrics = way.recorder.as_ref().map(|recorder| recorder.metrics.file()).transpose()?;
        let learner = &self.trainer.learner;
        let (mut meta, layout, vectors) = (learner.meta(), learner.layout(), learner.vectors());
        self.stop.add_to(&mut meta, way.done)?;
        let checkpoint = Learner::checkpoint(way.done, &vectors, &meta, &layout, &way.config_toml);
        let earlier = way.saver.begin(&checkpoint, metrics, self.comm).context(CannotWrite::new("the run's files"))?;
        way.saved = Some(way.done);
        Ok(earlier)
    }

    /// Waits until what is being saved is on disk. A collective call.
    fn finish_save(&self, way: &mut UnderWay) -> Result<()> {
        let report = way.saver.finish(self.comm).context(CannotWrite::new("the run's files"))?;
        if let Some(report) = report.filter(|_| self.comm.rank() == 0) {
            log::info!("{}", in_words(&report));
        }
        Ok(())
    }
}

fn in_words(report: &SaveReport) -> String {
    format!(
        "{}: {:.1} MB by this rank in {:.2} s, the loop waited {:.3} s",
        report.path.display(),
        report.bytes as f64 / 1e6,
        report.took.as_secs_f64(),
        report.stalled.as_secs_f64()
    )
}
