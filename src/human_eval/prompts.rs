//! What a human evaluation asks about: prompts that are given one by one, and those of an evaluation's sets.

use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use super::study::Prompt;
use crate::{
    comm::{all_made, Communicator},
    config::{eval::is_evaluation, load, EvalConfig, EvalSet, EvalSplit, Overlap},
    evaluation::{
        draw_prompts,
        overlap::{self, TestPrompts, TrainedOn},
    },
    prompts::{registry, Split},
    text_file, user_file,
};

/// Where the prompts of one form come from, as the command line says it.
pub struct Asked<'a> {
    pub texts: &'a [String],
    /// One prompt per line.
    pub file: Option<&'a PathBuf>,
    /// CONFIG:SET or CONFIG:SET:N.
    pub sets: &'a [String],
    /// Prompts of each set that does not say how many; 0 for as many as its evaluation takes.
    pub count: usize,
}

/// The prompts of one form.
pub struct Prompts {
    given: Vec<String>,
    sets: Vec<OfSet>,
}

/// A set's prompts.
struct OfSet {
    /// What tables call it.
    label: String,
    config: EvalSet,
    /// The part of their source that they are of.
    split: Split,
    texts: Vec<String>,
}

impl Prompts {
    /// A collective call; errors are the same on all ranks.
    pub fn read(asked: &Asked, comm: &dyn Communicator) -> Result<Self> {
        let given = all_made(comm, given(asked))?;
        let names = asked.sets.iter().map(|named| SetName::parse(named)).collect::<Result<Vec<_>>>()?;
        let mut sets = Vec::new();
        for (i, name) in names.iter().enumerate() {
            ensure!(!names[..i].contains(name), "{}:{} is given twice", name.config, name.set);
            // two configs may have sets of one name
            let alone = names.iter().filter(|other| other.set == name.set).count() == 1;
            let label = if alone { name.set.to_owned() } else { format!("{}:{}", name.config, name.set) };
            sets.push(of_set(name, asked.count, label, comm)?);
        }
        Ok(Prompts { given, sets })
    }

    /// All of them, those of no set first.
    pub fn all(&self) -> Vec<Prompt> {
        let given = self.given.iter().map(|text| Prompt { text: text.clone(), set: None });
        let of_sets = self
            .sets
            .iter()
            .flat_map(|set| set.texts.iter().map(|text| Prompt { text: text.clone(), set: Some(set.label.clone()) }));
        given.chain(of_sets).collect()
    }

    /// Whether the sets' prompts are others than those that the models were trained on; rank 0's list counts. A collective
    /// call.
    ///
    /// # Errors
    /// Names three prompts of a set that are not, unless the set is meant so or may have them.
    pub fn hold_sets_against(&self, trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
        let sets = self.sets.iter().filter(|set| set.config.split != EvalSplit::Train).map(|set| {
            let texts = set.texts.iter().map(String::as_str);
            let source = Some((&set.config.prompts, set.split));
            TestPrompts::new(format!("set {}", set.label), source, texts, set.config.overlap)
        });
        overlap::check(&sets.collect::<Vec<_>>(), trained_on, comm)
    }

    /// Says which of the prompts that are given one by one the models were trained on. A collective call.
    pub fn warn_of_given(&self, trained_on: &[TrainedOn], comm: &dyn Communicator) -> Result<()> {
        let texts = self.given.iter().map(String::as_str);
        let given = TestPrompts::new("the prompts given".to_owned(), None, texts, Overlap::Warn);
        overlap::check(&[given], trained_on, comm)
    }
}

/// Those that are given one by one.
fn given(asked: &Asked) -> Result<Vec<String>> {
    let mut prompts = asked.texts.to_vec();
    if let Some(path) = asked.file {
        let lines = text_file::lines(path)?;
        ensure!(!lines.is_empty(), "{} holds no prompt", path.display());
        prompts.extend(lines.into_iter().map(|(_, line)| line));
    }
    Ok(prompts)
}

/// Whether a set's name says how many prompts are taken of it.
pub fn says_how_many(named: &str) -> bool {
    SetName::parse(named).is_ok_and(|set| set.count.is_some())
}

/// CONFIG:SET or CONFIG:SET:N, taken apart.
#[derive(Debug)]
struct SetName<'a> {
    config: &'a str,
    set: &'a str,
    /// Prompts of it, where it says so.
    count: Option<usize>,
}

impl PartialEq for SetName<'_> {
    fn eq(&self, other: &Self) -> bool {
        (self.config, self.set) == (other.config, other.set)
    }
}

impl<'a> SetName<'a> {
    fn parse(named: &'a str) -> Result<Self> {
        let split = |text: &'a str| text.rsplit_once(':').filter(|(left, right)| !left.is_empty() && !right.is_empty());
        let (config, set) = split(named).with_context(|| format!("{named}: CONFIG:SET is wanted"))?;
        let with_count = split(config).filter(|_| set.bytes().all(|byte| byte.is_ascii_digit()));
        let Some((config, name)) = with_count else {
            return Ok(SetName { config, set, count: None });
        };
        let count = set.parse().ok().filter(|count| (1..=16_777_216).contains(count));
        let count = count.with_context(|| format!("{named}: {set} prompts; 1 to 16777216 are possible"))?;
        Ok(SetName { config, set: name, count: Some(count) })
    }
}

/// The prompts of a set: as many as its name says, or `count`, or, where that is 0, the set's own count. A collective call.
fn of_set(named: &SetName, count: usize, label: String, comm: &dyn Communicator) -> Result<OfSet> {
    let (path, name, count) = (named.config, named.set, named.count.unwrap_or(count));
    let read = || -> Result<_> {
        let path = Path::new(path);
        let text = user_file::read_text(path).with_context(|| format!("cannot read {}", path.display()))?;
        let config = match is_evaluation(&text) {
            true => EvalConfig::load(path, &[])?,
            false => EvalConfig::of_run(&load::load(load::Experiment::File(path), &[])?)?,
        };
        let index = config.sets.iter().position(|set| set.name == name).with_context(|| {
            let names: Vec<&str> = config.sets.iter().map(|set| set.name.as_str()).collect();
            format!("{} has no set {name}; it has {}", path.display(), names.join(", "))
        })?;
        Ok((config, index))
    };
    let (config, index) = all_made(comm, read())?;
    let set = &config.sets[index];
    let count = match count {
        0 => set.count,
        count => most_there(named, set, count, comm)?,
    };
    let config_of_set = EvalSet { count, ..set.clone() };
    let drawn = draw_prompts(&config_of_set, index as u8, config.eval.seed, comm)
        .with_context(|| format!("{}:{name}", named.config))?;
    let texts = drawn.prompts.into_iter().map(|prompt| prompt.text).collect();
    Ok(OfSet { label, config: config_of_set, split: drawn.split, texts })
}

/// `count`, or as many prompts as the set has where these are fewer: an evaluation would take them again from the start. A
/// collective call.
fn most_there(named: &SetName, set: &EvalSet, count: usize, comm: &dyn Communicator) -> Result<usize> {
    if set.split != EvalSplit::Evaluation {
        // too many are an error there
        return Ok(count);
    }
    let what = || format!("{}:{}", named.config, named.set);
    let source = registry::build(&set.prompts, comm).with_context(what)?;
    let there = match source.len(Split::HeldOut) {
        0 => source.len(Split::Train),
        held_out => held_out,
    };
    let there = usize::try_from(there)?;
    if count > there && there > 0 && comm.rank() == 0 {
        log::warn!("{}: {count} prompts are asked for and {there} are there: these are taken, each once", what());
    }
    Ok(if there > 0 { count.min(there) } else { count })
}

#[cfg(test)]
mod tests {
    use super::SetName;

    #[test]
    fn a_set_may_say_how_many_prompts() {
        let parsed =
            |named| SetName::parse(named).map(|set| (set.config, set.set, set.count)).map_err(|e| e.to_string());
        assert_eq!(parsed("a/b.toml:places"), Ok(("a/b.toml", "places", None)));
        assert_eq!(parsed("a/b.toml:places:300"), Ok(("a/b.toml", "places", Some(300))));
        // a set may be called by a number, a path may hold a colon
        assert_eq!(parsed("b.toml:17"), Ok(("b.toml", "17", None)));
        assert_eq!(parsed("a:b.toml:places"), Ok(("a:b.toml", "places", None)));
        for wrong in ["places", ":places", "b.toml:"] {
            assert_eq!(parsed(wrong), Err(format!("{wrong}: CONFIG:SET is wanted")));
        }
        let error = parsed("b.toml:places:0").unwrap_err();
        assert_eq!(error, "b.toml:places:0: 0 prompts; 1 to 16777216 are possible");
    }
}
