//! Test prompts that a model was trained on, which are no test.

use std::collections::HashSet;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::set::Set;
use crate::{
    comm::{agree, Communicator},
    config::{needs, Config, EvalModel, Overlap, PromptConfig},
    excerpt::{quoted, IN_MESSAGES},
    model_origin,
    prompts::{registry as prompts, PromptSource, Split},
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
        let of = |task: &crate::config::TaskConfig| TrainedOn {
            model: model.to_owned(),
            task: task.name.clone(),
            prompts: task.prompts.clone(),
        };
        config.trained_tasks().map(|(_, task)| of(task)).collect()
    }
}

/// What models were trained on that runs have made; of other models nobody knows. On one rank.
pub fn of_models(models: &[EvalModel]) -> Vec<TrainedOn> {
    let mut found = Vec::new();
    for model in models {
        let origins = [&model.path, &model.lora].into_iter().filter_map(|path| model_origin::of_model(path));
        for origin in origins {
            match origin {
                Ok(origin) => found.extend(TrainedOn::of(&model.name, &origin.config)),
                Err(e) => log::warn!("model {}: what it was trained on is not known: {e:#}", model.name),
            }
        }
    }
    found
}

/// A set's prompts that are trained on too.
struct Found<'a> {
    set: &'a Set,
    of: &'a TrainedOn,
    /// Names of all models that were trained on these prompts.
    models: String,
    prompts: Vec<&'a str>,
}

/// Holds sets against what models were trained on, each source of prompts once; rank 0's list counts. Prompts are the same
/// where their texts are. A collective call; the result is the same on all ranks.
///
/// # Errors
/// Names three prompts of the first set that has some, unless its settings are content with a warning.
pub fn check(sets: &[Set], trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
    let mut bytes = serde_json::to_vec(trained_on)?;
    comm.broadcast_bytes(&mut bytes, 0)?;
    let trained_on: Vec<TrainedOn> = serde_json::from_slice(&bytes).context("what models were trained on")?;
    if trained_on.is_empty() {
        return Ok(());
    }
    let (exempt, tests): (Vec<&Set>, Vec<&Set>) = sets.iter().partition(|set| set.is_of_training());
    if comm.rank() == 0 {
        for set in exempt {
            let name = &set.config.name;
            log::info!("set {name} is of prompts that are trained on (split = \"train\"): it is compared with nothing");
        }
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
        let found = |set, prompts| Found { set, of, models: models.clone(), prompts };
        // a source's parts have no text in common
        let (own, others): (Vec<&Set>, Vec<&Set>) =
            tests.iter().copied().partition(|set| set.config.prompts == of.prompts);
        let of_own = own.into_iter().filter(|set| set.split == Split::Train);
        let mut all: Vec<Found> = of_own.map(|set| found(set, texts(set))).collect();
        if !others.is_empty() && is_here(of, comm)? {
            let source = prompts::build(&of.prompts, comm)
                .with_context(|| format!("the prompts that {models} trained on (task {})", of.task))?;
            if comm.rank() == 0 {
                let both = in_common(source.as_ref(), &others);
                all.extend(others.iter().zip(both).map(|(set, prompts)| found(*set, prompts)));
            }
        }
        if comm.rank() == 0 {
            result = result.and_then(|()| all.iter().filter(|found| !found.prompts.is_empty()).try_for_each(judge));
        }
    }
    agree(comm, result)
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

/// A set's texts, each once.
fn texts(set: &Set) -> Vec<&str> {
    let mut seen = HashSet::new();
    set.prompts.iter().map(|prompt| prompt.text.as_str()).filter(|text| seen.insert(*text)).collect()
}

/// Of each set the texts that `source` trains on; the source, which may have millions, is gone through once.
fn in_common<'a>(source: &dyn PromptSource, sets: &[&'a Set]) -> Vec<Vec<&'a str>> {
    let of_sets: Vec<Vec<&str>> = sets.iter().map(|set| texts(set)).collect();
    let wanted: HashSet<&str> = of_sets.iter().flatten().copied().collect();
    let trained = (0..source.len(Split::Train)).map(|index| source.prompt(Split::Train, index).text);
    let both: HashSet<&str> = trained.filter_map(|text| wanted.get(text.as_str()).copied()).collect();
    of_sets.into_iter().map(|texts| texts.into_iter().filter(|text| both.contains(text)).collect()).collect()
}

fn judge(found: &Found) -> Result<()> {
    let Found { set, of, models, prompts } = found;
    let named: Vec<String> = prompts.iter().take(NAMED).map(|text| quoted(text, IN_MESSAGES)).collect();
    let (name, task) = (&set.config.name, &of.task);
    let message = format!(
        "set {name}: {} of its {} prompts are among those that {models} trained on (task {task}): {}",
        prompts.len(),
        texts(set).len(),
        named.join(", ")
    );
    ensure!(
        set.config.overlap == Overlap::Warn,
        "{message}; a set that is meant to have them says split = \"train\", one that may have them overlap = \"warn\""
    );
    log::warn!("{message}");
    Ok(())
}
