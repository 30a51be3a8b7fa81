//! `rldiff study`: the paper's comparison as one command. Trains every run with every seed, evaluates all models with the
//! same prompts and noise, and writes the paper's Tables 1 to 5 for them.
//!
//! ```text
//! OUT/runs/<run>-seed<n>/   ordinary runs, each resumable by itself
//! OUT/evaluation/           an ordinary evaluation of the base model and all of theirs
//! OUT/study.json, study.md, study.html
//! ```
//!
//! A study that was cut off goes on: a run that is done is found, one that is not goes on from its last checkpoint.

mod course;
mod figures;
mod findings;
mod joint;
mod matching;
mod page;
mod paper;
mod rivals;
mod statistics;
mod table_2;
mod tables;

pub use findings::{Finding, Verdict};
pub use statistics::{BySeed, Interval, Resampling};
pub use tables::{Study, Table};

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use tch::Device;

use self::tables::trained;

use crate::{
    cannot_write::CannotWrite,
    comm::{agree, Communicator},
    config::{Config, EvalConfig, EvalModel, PretrainMode, StudyConfig},
    evaluation::{Evaluation, ModelResult, TrainedOn},
    folders::{
        can_take,
        outputs::{is_json_with, may_replace},
        Place,
    },
    report,
    run::{Resume, Run},
    telemetry::{write_atomic, RunFiles},
};

/// The name of the model before training.
pub const BASE: &str = "base";

/// A run of the study with one seed.
pub struct Member {
    /// What the tables call it, the same for all seeds.
    pub name: String,
    pub seed: u64,
    pub config: Config,
    pub files: RunFiles,
    /// Another run of the study without its pretraining loss (Appendix G).
    pub ablation: bool,
}

impl Member {
    /// Whether both train by the same method on the same rewards.
    fn has_same_aim(&self, other: &Member) -> bool {
        self.config.method.name() == other.config.method.name() && trained(self) == trained(other)
    }

    fn has_pretraining(&self) -> bool {
        self.config.pretrain.mode != PretrainMode::Off
    }
}

/// A study that is ready to start.
pub struct Plan {
    pub config: StudyConfig,
    pub out: PathBuf,
    pub members: Vec<Member>,
    pub evaluation: EvalConfig,
    /// What its tables will lack of the paper's, a sentence each.
    pub lacks: Vec<String>,
}

impl Plan {
    /// Reads and checks every config of the study; nothing is written.
    pub fn new(mut config: StudyConfig, out: PathBuf, quick: bool) -> Result<Self> {
        if let Some(seeds) = config.quick.seeds.filter(|_| quick) {
            config.study.seeds.truncate(seeds);
        }
        let mut members = Vec::new();
        // seed by seed: the first results are there early
        for &seed in &config.study.seeds {
            for run in &config.runs {
                let name = StudyConfig::run_name(run, seed);
                let files = RunFiles::new(out.join("runs").join(name));
                members.push(Member {
                    name: run.name.clone(),
                    seed,
                    config: config.run_config(run, seed, quick)?,
                    files,
                    ablation: false,
                });
            }
        }
        let ablations: Vec<bool> = members
            .iter()
            .map(|member| {
                !member.has_pretraining() && members.iter().any(|m| m.has_pretraining() && m.has_same_aim(member))
            })
            .collect();
        members.iter_mut().zip(ablations).for_each(|(member, ablation)| member.ablation = ablation);
        let path = members[0].config.model.path.clone();
        for member in &members {
            let other = &member.config.model.path;
            ensure!(*other == path, "run {}: its model is {other}, that of {} is {path}", member.name, members[0].name);
        }
        let mut evaluation = config.evaluation(quick)?;
        evaluation.models = vec![EvalModel { name: BASE.to_string(), path, lora: String::new() }];
        evaluation.models.extend(config.models.iter().cloned());
        evaluation.models.extend(members.iter().map(|member| EvalModel {
            name: format!("{}-seed{}", member.name, member.seed),
            path: member.files.root().display().to_string(),
            lora: String::new(),
        }));
        evaluation.validate().context("the study's evaluation")?;
        let mut plan = Plan { config, out, members, evaluation, lacks: Vec::new() };
        matching::check(&plan)?;
        plan.lacks = matching::lacks(&plan);
        Ok(plan)
    }

    /// Whether the study may go to its folder: what is in the places of its runs and pages was written by runs and a study.
    ///
    /// # Errors
    /// Names what is in the way.
    pub fn check_place(&self) -> Result<()> {
        can_take(&self.out, |name| ["config.toml", "study.json", "runs", "evaluation"].contains(&name))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let is_study = |bytes: &[u8]| text(bytes).parse::<toml::Table>().is_ok_and(|table| table.contains_key("study"));
        may_replace(&self.out.join("config.toml"), is_study)?;
        may_replace(&self.out.join("study.json"), is_json_with(&["seeds", "tables", "findings"]))?;
        let is_markdown = |bytes: &[u8]| text(bytes).contains("All models draw the same prompts from the same noise.");
        may_replace(&self.out.join("study.md"), is_markdown)?;
        may_replace(&self.out.join("study.html"), report::is_page)?;
        self.members.iter().try_for_each(|member| Place::of_run(member.files.root()).map(drop))
    }

    /// Builds every run once, so that a reward, a prompt set or a model that cannot be had is found before any work. A
    /// collective call.
    pub fn try_out(&self, comm: &dyn Communicator, device: Device) -> Result<()> {
        for member in self.of_first_seed() {
            Run::prepare(&member.config, comm, device, member.files.clone(), &Resume::Auto)
                .with_context(|| format!("run {}", member.name))?;
        }
        let before = self.evaluation_before_training();
        Evaluation::prepare(&before, comm, device, &evaluation_folder(&self.out))
            .and_then(|evaluation| evaluation.hold_against(&self.trained_on(), comm))
            .context("the study's evaluation")
    }

    /// What its runs are trained on.
    pub fn trained_on(&self) -> Vec<TrainedOn> {
        self.of_first_seed().flat_map(|member| TrainedOn::of(&member.name, &member.config)).collect()
    }

    /// Every run of the study once.
    pub fn of_first_seed(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.seed == self.config.study.seeds[0])
    }

    /// Of the first seed: each run that lacks its pretraining loss, behind the one that has it.
    fn ablations(&self) -> Vec<[&Member; 2]> {
        let with = |without: &Member| {
            let found = self.of_first_seed().find(|other| !other.ablation && other.has_same_aim(without));
            found.expect("an ablation has a run that it is one of")
        };
        self.of_first_seed().filter(|member| member.ablation).map(|without| [with(without), without]).collect()
    }

    /// The evaluation of what there is before any training: the other models are as large as the first and draw as many
    /// steps.
    pub fn evaluation_before_training(&self) -> EvalConfig {
        let there = self.evaluation.models[..1 + self.config.models.len()].to_vec();
        EvalConfig { models: there, ..self.evaluation.clone() }
    }

    /// Trains what is not trained yet. A collective call.
    pub fn train(&self, comm: &dyn Communicator, device: Device) -> Result<()> {
        for (i, member) in self.members.iter().enumerate() {
            if comm.rank() == 0 {
                let (name, count) = (&member.name, self.members.len());
                log::info!("run {} of {count}: {name}, seed {}", i + 1, member.seed);
            }
            let run = Run::prepare(&member.config, comm, device, member.files.clone(), &Resume::Auto)
                .with_context(|| format!("run {}, seed {}", member.name, member.seed))?;
            run.go()?;
        }
        Ok(())
    }

    /// Evaluates all models. A collective call.
    pub fn evaluate(&self, comm: &dyn Communicator, device: Device) -> Result<Vec<ModelResult>> {
        let out = evaluation_folder(&self.out);
        Evaluation::prepare(&self.evaluation, comm, device, &out)?.go(comm, device, &out)
    }

    /// Writes the tables; on rank 0 prints them. A collective call.
    pub fn report(&self, comm: &dyn Communicator, results: &[ModelResult]) -> Result<()> {
        let written = if comm.rank() == 0 { self.write(results) } else { Ok(()) };
        agree(comm, written).context(CannotWrite::new("the study's files"))
    }

    fn write(&self, results: &[ModelResult]) -> Result<()> {
        let study = Study::new(self, results)?;
        let file = |name: &str, bytes: &[u8]| write_atomic(&self.out.join(name), bytes);
        file("config.toml", toml::to_string_pretty(&self.config)?.as_bytes())?;
        let mut json = serde_json::to_vec_pretty(&study)?;
        json.push(b'\n');
        file("study.json", &json)?;
        let markdown = study.markdown();
        file("study.md", markdown.as_bytes())?;
        file("study.html", page::page(self, &study, results)?.as_bytes())?;
        say!("\n{markdown}results in {}", self.out.display());
        Ok(())
    }
}

/// The folder of a study's evaluation, below that of the study.
pub(crate) fn evaluation_folder(out: &Path) -> PathBuf {
    out.join("evaluation")
}
