//! Test prompts that a model was trained on, which are no test.

use std::collections::HashSet;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::set::Set;
use crate::{
    comm::{agree, Communicator},
    config::{needs, Config, Overlap, PromptConfig, TaskConfig},
    excerpt::{quoted, IN_MESSAGES},
    model_origin,
    prompts::{registry as prompts, Prompt, PromptSource, Split},
    task::Task,
};

/// Prompts named in an error.
const NAMED: usize = 3;

/// Prompts that a model was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainedOn {
    pub model: String,
    pub task: String,
    pub prompts: PromptConfig,
}

impl TrainedOn {
    /// What `config` trains `model` on.
    pub fn of(model: &str, config: &Config) -> Vec<Self> {
        config.trained_tasks().map(|(_, task)| Self::of_task(model, task)).collect()
    }

    /// What a task trains `model` on.
    pub fn of_task(model: &str, task: &TaskConfig) -> Self {
        TrainedOn { model: model.to_owned(), task: task.name.clone(), prompts: task.prompts.clone() }
    }

    /// What `model` was trained on, where a run has made the files at `path`; of other models nobody knows. On one rank.
    pub fn of_files(model: &str, path: &str) -> Vec<Self> {
        match model_origin::of_model(path) {
            Some(Ok(origin)) => TrainedOn::of(model, &origin.config),
            Some(Err(e)) => {
                log::warn!("model {model}: what it was trained on is not known: {e:#}");
                Vec::new()
            }
            None => Vec::new(),
        }
    }
}

/// Prompts that models are tested with.
pub struct TestPrompts<'a> {
    /// As messages call them, for example `set places`.
    pub name: String,
    /// The source and its part that they are of, where they are of one.
    pub source: Option<(&'a PromptConfig, Split)>,
    /// Each once.
    pub texts: Vec<&'a str>,
    pub overlap: Overlap,
}

impl<'a> TestPrompts<'a> {
    /// Texts that come again are dropped.
    pub fn new(
        name: String,
        source: Option<(&'a PromptConfig, Split)>,
        texts: impl Iterator<Item = &'a str>,
        overlap: Overlap,
    ) -> Self {
        let mut seen = HashSet::new();
        let texts = texts.filter(|text| seen.insert(*text)).collect();
        TestPrompts { name, source, texts, overlap }
    }

    fn of_set(set: &'a Set) -> Self {
        let texts = set.prompts.iter().map(|prompt| prompt.text.as_str());
        let source = Some((&set.config.prompts, set.split));
        TestPrompts::new(format!("set {}", set.config.name), source, texts, set.config.overlap)
    }
}

/// Test prompts that are trained on too.
struct Found<'a> {
    tests: &'a TestPrompts<'a>,
    of: &'a TrainedOn,
    /// Names of all models that were trained on these prompts.
    models: String,
    prompts: Vec<&'a str>,
}

/// As [`check`], for the sets of an evaluation; a set that is meant to be of training prompts is left out.
pub fn check_sets(sets: &[Set], trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
    let (exempt, tests): (Vec<&Set>, Vec<&Set>) = sets.iter().partition(|set| set.is_of_training());
    if comm.rank() == 0 && !trained_on.is_empty() {
        for set in exempt {
            let name = &set.config.name;
            log::info!("set {name} is of prompts that are trained on (split = \"train\"): it is compared with nothing");
        }
    }
    check(&tests.into_iter().map(TestPrompts::of_set).collect::<Vec<_>>(), trained_on, comm)
}

/// Holds test prompts against what models were trained on, each source of prompts once; rank 0's list counts. Prompts are the same
/// where their texts are. A collective call; the result is the same on all ranks.
///
/// # Errors
/// Names three prompts of the first tests that have some, unless these are content with a warning.
pub fn check(tests: &[TestPrompts], trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
    let mut bytes = serde_json::to_vec(trained_on)?;
    comm.broadcast_bytes(&mut bytes, 0)?;
    let trained_on: Vec<TrainedOn> = serde_json::from_slice(&bytes).context("what models were trained on")?;
    if trained_on.is_empty() {
        return Ok(());
    }
    let mut result = Ok(());
    for (number, of) in trained_on.iter().enumerate() {
        if trained_on[..number].iter().any(|other| other.prompts == of.prompts) {
            continue;
        }
        let same = trained_on.iter().filter(|other| other.prompts == of.prompts);
        let mut models: Vec<&str> = same.map(|other| other.model.as_str()).collect();
        models.dedup();
        let models = models.join(", ");
        let found = |tests, prompts| Found { tests, of, models: models.clone(), prompts };
        // a source's parts have no text in common
        let (own, others): (Vec<&TestPrompts>, Vec<&TestPrompts>) =
            tests.iter().partition(|tests| tests.source.is_some_and(|(prompts, _)| *prompts == of.prompts));
        let is_train = |tests: &&TestPrompts| tests.source.is_some_and(|(_, split)| split == Split::Train);
        let mut all: Vec<Found> =
            own.into_iter().filter(is_train).map(|tests| found(tests, tests.texts.clone())).collect();
        if !others.is_empty() && is_here(of, comm)? {
            let source = prompts::build(&of.prompts, comm)
                .with_context(|| format!("the prompts that {models} trained on (task {})", of.task))?;
            if comm.rank() == 0 {
                let both = in_common(source.as_ref(), &others);
                all.extend(others.iter().zip(both).map(|(tests, prompts)| found(*tests, prompts)));
            }
        }
        if comm.rank() == 0 {
            result = result.and_then(|()| all.iter().filter(|found| !found.prompts.is_empty()).try_for_each(judge));
        }
    }
    agree(comm, result)
}

/// Says which evaluation prompts of a run's tasks another of its tasks trains on: a task that is `train = false`, or has
/// its reward from elsewhere, may well use another's prompts. On one rank.
pub fn warn_of_tasks(config: &Config, tasks: &[Task]) -> Result<()> {
    let seed = config.evaluation.seed;
    let drawn: Vec<Vec<Prompt>> = tasks
        .iter()
        .map(|task| {
            let count = task.config.evaluation_samples / task.config.evaluation_images_per_prompt;
            prompts::evaluation_prompts(task.prompts.as_ref(), seed, task.index, count)
        })
        .collect();
    for (index, trained) in config.trained_tasks() {
        let others = tasks.iter().zip(&drawn).filter(|(task, _)| task.config.prompts != trained.prompts);
        let others = others.map(|(task, drawn)| {
            let texts = drawn.iter().map(|prompt| prompt.text.as_str());
            TestPrompts::new(format!("the evaluation of task {}", task.config.name), None, texts, Overlap::Warn)
        });
        let others: Vec<TestPrompts> = others.collect();
        if others.is_empty() {
            continue;
        }
        let both = in_common(tasks[index].prompts.as_ref(), &others.iter().collect::<Vec<_>>());
        let of = TrainedOn::of_task("this run", trained);
        for (tests, prompts) in others.iter().zip(both).filter(|(_, prompts)| !prompts.is_empty()) {
            judge(&Found { tests, of: &of, models: of.model.clone(), prompts })?;
        }
    }
    Ok(())
}

/// Are the files of these prompts here? Rank 0 looks, and says what cannot be compared.
fn is_here(of: &TrainedOn, comm: &dyn Communicator) -> Result<bool> {
    let mut here = Vec::new();
    if comm.rank() == 0 {
        let looked = needs::ensure_here(&of.prompts.needs(&format!("task.{}", of.task)));
        if let Err(e) = &looked {
            log::warn!("{} trained on prompts that cannot be compared with those of the sets: {e:#}", of.model);
        }
        here = vec![u8::from(looked.is_ok())];
    }
    comm.broadcast_bytes(&mut here, 0)?;
    Ok(here == [1])
}

/// Of each tests the texts that `source` trains on; the source, which may have millions, is gone through once.
fn in_common<'a>(source: &dyn PromptSource, tests: &[&'a TestPrompts]) -> Vec<Vec<&'a str>> {
    let wanted: HashSet<&str> = tests.iter().flat_map(|tests| tests.texts.iter().copied()).collect();
    let trained = (0..source.len(Split::Train)).map(|index| source.prompt(Split::Train, index).text);
    let both: HashSet<&str> = trained.filter_map(|text| wanted.get(text.as_str()).copied()).collect();
    let of_tests = |tests: &&'a TestPrompts| tests.texts.iter().copied().filter(|text| both.contains(text)).collect();
    tests.iter().map(of_tests).collect()
}

fn judge(found: &Found) -> Result<()> {
    let Found { tests, of, models, prompts } = found;
    let named: Vec<String> = prompts.iter().take(NAMED).map(|text| quoted(text, IN_MESSAGES)).collect();
    let message = format!(
        "{}: {} of its {} prompts are among those that {models} trained on (task {}): {}",
        tests.name,
        prompts.len(),
        tests.texts.len(),
        of.task,
        named.join(", ")
    );
    ensure!(
        tests.overlap == Overlap::Warn,
        "{message}; a set that is meant to have them says split = \"train\", one that may have them overlap = \"warn\""
    );
    log::warn!("{message}");
    Ok(())
}
