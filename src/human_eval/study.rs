//! A study: which models are compared on which prompts, and which of them is on which side.

use std::{collections::BTreeSet, path::Path};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    assignment::{deal, Asked, Assignment},
    questions::{Edition, Form},
};
use crate::{
    draw::Drawing,
    random::{Coordinates, Purpose, Stream},
    store::digest,
    telemetry::write_atomic,
};

/// All there is to know about a study before anybody has answered. It is kept by whoever runs it: raters must not see
/// which model is where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Which questions it asks.
    #[serde(rename = "format")]
    pub edition: Edition,
    pub title: String,
    pub models: Vec<Model>,
    /// How the pictures are drawn; the seed also decides the sides.
    pub drawing: Drawing,
    /// Raters that every query should have.
    pub raters: usize,
    pub queries: Vec<Query>,
    /// The user's guidelines, in Markdown, in place of the built-in ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidelines: Option<String>,
    /// Queries that a rater gets at most; none where everyone gets all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_rater: Option<usize>,
    /// Who gets which; the rater at place i has the number i + 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assignments: Vec<Assignment>,
    /// Raters who got queries of missing ones later; numbers go on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub again: Vec<Assignment>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// As it was given: `embedded`, or a folder.
    pub name: String,
    /// SHA-256 of its files.
    pub digest: String,
}

/// One page's worth of questions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    pub id: String,
    pub form: Form,
    pub prompt: String,
    /// Which set of prompts it is from; none for one that was given by itself, and in old studies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Index of the model on this side.
    pub left: usize,
    pub right: usize,
    /// Number of the first picture's noise; both models draw with the same.
    pub first_sample: usize,
}

/// What to draw, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    pub text: String,
    pub set: Option<String>,
}

impl Query {
    /// The two models, the lower index first.
    pub fn models(&self) -> (usize, usize) {
        (self.left.min(self.right), self.left.max(self.right))
    }
}

/// Which models meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Pairing {
    /// Every model with every other.
    All,
    /// Every model with the first.
    First,
}

impl Study {
    /// Every prompt for every pair of models that meet. In each form and pair of models the lower model is on the left
    /// in half of the queries, drawn by the seed: a habit of choosing one side favours nobody.
    ///
    /// # Errors
    /// Fewer than two models, one given twice, or no prompt.
    pub fn plan(
        title: &str,
        models: Vec<Model>,
        pairing: Pairing,
        pair_prompts: &[Prompt],
        group_prompts: &[Prompt],
        raters: usize,
        drawing: Drawing,
    ) -> Result<Self> {
        ensure!(models.len() >= 2, "a comparison needs two models or more: give --model at least twice");
        for (i, model) in models.iter().enumerate() {
            ensure!(models[..i].iter().all(|m| m.name != model.name), "--model {} is given twice", model.name);
        }
        ensure!(raters > 0, "--raters must be at least 1");
        ensure!(
            !pair_prompts.is_empty() || !group_prompts.is_empty(),
            "there is nothing to ask: give --prompt or --prompts, --group-prompt or --group-prompts"
        );
        let mut queries = Vec::new();
        for (form, prompts, first) in [(Form::Pair, pair_prompts, 0), (Form::Group, group_prompts, pair_prompts.len())]
        {
            for (number, (low, high)) in meetings(models.len(), pairing).into_iter().enumerate() {
                let swapped = swapped(drawing.seed, form, number, prompts.len());
                for (i, prompt) in prompts.iter().enumerate() {
                    let (left, right) = if swapped[i] { (high, low) } else { (low, high) };
                    let id = format!("{}-{:04}", form.name(), number * prompts.len() + i + 1);
                    let first_sample = first + i * form.pictures();
                    let Prompt { text: prompt, set } = prompt.clone();
                    queries.push(Query { id, form, prompt, set, left, right, first_sample });
                }
            }
        }
        Ok(Study {
            edition: Edition::Paper,
            title: title.to_owned(),
            models,
            drawing,
            raters,
            queries,
            guidelines: None,
            per_rater: None,
            assignments: Vec::new(),
            again: Vec::new(),
        })
    }

    /// The same with at most `per_rater` queries for a rater ([`super::assignment`]); as it is without a number.
    ///
    /// # Errors
    /// Numbers that cannot be met.
    pub fn shared_out(self, per_rater: Option<usize>) -> Result<Self> {
        let Some(most) = per_rater else { return Ok(self) };
        let assignments = deal(&self.queries, self.raters, most, self.drawing.seed)?;
        Ok(Study { per_rater, assignments, ..self })
    }

    pub fn is_shared_out(&self) -> bool {
        !self.assignments.is_empty()
    }

    /// What the rater with this number gets.
    pub fn assignment(&self, number: usize) -> Option<&Assignment> {
        self.assignments.iter().chain(&self.again).find(|assignment| assignment.number == number)
    }

    /// Does this rater see the query's left side on the right?
    pub fn is_mirrored(&self, number: usize, query: &str) -> bool {
        self.assignment(number).and_then(|assignment| assignment.asked(query)).is_some_and(|asked| asked.mirrored)
    }

    /// The study as it was before queries were handed out again.
    pub fn as_planned(&self) -> Self {
        Study { again: Vec::new(), ..self.clone() }
    }

    /// What tells this study's pages and votes from another's: the beginning of the SHA-256 of all of it as it was
    /// planned.
    pub fn id(&self) -> String {
        let json = serde_json::to_vec(&self.as_planned()).expect("a study is plain data");
        digest::of_bytes(&json)[..32].to_owned()
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, &[&serde_json::to_vec_pretty(self)?[..], b"\n"].concat())
    }

    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let study: Study =
            serde_json::from_slice(&bytes).with_context(|| format!("{} is no study.json", path.display()))?;
        let known = |query: &Query| query.left.max(query.right) < study.models.len() && query.left != query.right;
        let wrong = study.queries.iter().find(|query| !known(query));
        ensure!(wrong.is_none(), "{}: query {} names a model that is not there", path.display(), wrong.unwrap().id);
        study.check_assignments().with_context(|| path.display().to_string())?;
        Ok(study)
    }

    fn check_assignments(&self) -> Result<()> {
        ensure!(self.per_rater.is_some() == self.is_shared_out(), "per_rater and assignments go together");
        let queries: BTreeSet<&str> = self.queries.iter().map(|query| query.id.as_str()).collect();
        let mut held: BTreeSet<(usize, &str)> = BTreeSet::new();
        for (i, assignment) in self.assignments.iter().chain(&self.again).enumerate() {
            let number = assignment.number;
            ensure!(number == i + 1, "rater {number} stands at place {}", i + 1);
            for Asked { query, instead_of, .. } in &assignment.queries {
                ensure!(queries.contains(query.as_str()), "rater {number} has the query {query}, which is not there");
                let again = i >= self.assignments.len();
                let follows = instead_of.map_or(!again, |before| again && held.contains(&(before, query.as_str())));
                ensure!(follows, "rater {number} has the query {query} from nobody who had it");
                ensure!(held.insert((number, query)), "rater {number} has the query {query} twice");
            }
        }
        Ok(())
    }

    /// The pairs of models that meet, the lower index first.
    pub fn meetings(&self) -> Vec<(usize, usize)> {
        let mut all: Vec<_> = self.queries.iter().map(Query::models).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

fn meetings(models: usize, pairing: Pairing) -> Vec<(usize, usize)> {
    let firsts = if pairing == Pairing::First { 1 } else { models };
    (0..firsts).flat_map(|low| (low + 1..models).map(move |high| (low, high))).collect()
}

/// For each of `count` queries: is the higher model on the left? True for half of them; where that is no whole number a
/// coin decides about the last one.
fn swapped(seed: u64, form: Form, meeting: usize, count: usize) -> Vec<bool> {
    let at = Coordinates { task: form as u8, sample: meeting as u32, ..Coordinates::new(seed, Purpose::StudySides) };
    half_of(count, &mut at.stream())
}

/// True for half of `count`; where that is no whole number a coin decides about the last one.
pub(super) fn half_of(count: usize, stream: &mut Stream) -> Vec<bool> {
    let half = count / 2 + if count % 2 == 1 { stream.below(2) as usize } else { 0 };
    let mut chosen = vec![false; count];
    stream.choose(count, half).into_iter().for_each(|i| chosen[i] = true);
    chosen
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn drawing(seed: u64) -> Drawing {
        let negative = String::new();
        Drawing { seed, steps: 2, guidance_scale: 1.0, eta: 0.0, negative, height: None, width: None }
    }

    pub fn example(models: usize, pairs: usize, groups: usize) -> Study {
        let models = (0..models).map(|i| Model { name: format!("model {i}"), digest: String::new() }).collect();
        let prompts = |n: usize| (0..n).map(|i| Prompt { text: format!("prompt {i}"), set: None }).collect::<Vec<_>>();
        Study::plan("A study", models, Pairing::All, &prompts(pairs), &prompts(groups), 5, drawing(3)).unwrap()
    }

    #[test]
    fn every_pair_meets_on_every_prompt_and_stands_left_half_of_the_time() {
        let study = example(3, 20, 7);
        assert_eq!(study.meetings(), [(0, 1), (0, 2), (1, 2)]);
        assert_eq!(study.queries.len(), 3 * 27);
        let mut patterns = Vec::new();
        for meeting in study.meetings() {
            let of_form = |form| study.queries.iter().filter(move |q| q.models() == meeting && q.form == form);
            let swapped: Vec<bool> = of_form(Form::Pair).map(|q| q.left > q.right).collect();
            assert_eq!((swapped.len(), swapped.iter().filter(|s| **s).count()), (20, 10));
            patterns.push(swapped);
            let swapped = of_form(Form::Group).filter(|q| q.left > q.right).count();
            assert!(swapped == 3 || swapped == 4, "{swapped} of 7");
            // the same noise for a prompt whoever meets, other noise for other pictures
            let samples: Vec<_> = study
                .queries
                .iter()
                .filter(|q| q.models() == meeting)
                .flat_map(|q| q.first_sample..q.first_sample + q.form.pictures())
                .collect();
            assert_eq!(samples, (0..20 + 7 * 6).collect::<Vec<_>>());
        }
        assert!(patterns[0] != patterns[1] && patterns[1] != patterns[2], "each pair of models has its own order");
        let mut ids: Vec<_> = study.queries.iter().map(|q| &q.id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), study.queries.len());
    }

    #[test]
    fn the_first_model_can_be_the_only_opponent() {
        assert_eq!(meetings(4, Pairing::First), [(0, 1), (0, 2), (0, 3)]);
        assert_eq!(meetings(3, Pairing::All), [(0, 1), (0, 2), (1, 2)]);
    }

    #[test]
    fn a_study_comes_back_from_its_file_and_another_seed_is_another_study() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.json");
        let study = example(2, 3, 1);
        study.write(&path).unwrap();
        assert_eq!(Study::read(&path).unwrap(), study);
        assert_eq!(study.id(), example(2, 3, 1).id());
        assert_ne!(study.id(), example(2, 3, 2).id());
        let mut wrong = study.clone();
        wrong.queries[1].left = 7;
        wrong.write(&path).unwrap();
        assert!(format!("{:#}", Study::read(&path).unwrap_err()).contains("study.json: query pair-0002"));
    }

    /// What the program wrote before there were editions and sets; the id is the one that its pages have.
    #[test]
    fn a_study_of_the_first_edition_keeps_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.json");
        let text = r#"{"format":"rldiff-study-1","title":"A study","models":[{"name":"model 0","digest":""},{"name":"model 1","digest":""}],"drawing":{"seed":3,"steps":2,"guidance_scale":1.0,"eta":0.0,"negative":"","height":null,"width":null},"raters":5,"queries":[{"id":"pair-0001","form":"pair","prompt":"prompt 0","left":1,"right":0,"first_sample":0}]}"#;
        std::fs::write(&path, text).unwrap();
        let study = Study::read(&path).unwrap();
        assert_eq!(study.edition, Edition::First);
        assert_eq!(serde_json::to_string(&study).unwrap(), text);
        assert_eq!(study.id(), digest::of_bytes(text.as_bytes())[..32]);
        std::fs::write(&path, text.replace("study-1", "study-9")).unwrap();
        let error = format!("{:#}", Study::read(&path).unwrap_err());
        assert!(error.contains("unknown variant `rldiff-study-9`"), "{error}");
    }

    #[test]
    fn a_study_that_is_shared_out_comes_back_and_wrong_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("study.json");
        let study = example(2, 4, 0).shared_out(Some(2)).unwrap();
        assert_eq!((study.assignments.len(), study.per_rater), (10, Some(2)));
        assert_ne!(study.id(), example(2, 4, 0).id());
        study.write(&path).unwrap();
        assert_eq!(Study::read(&path).unwrap(), study);
        let wrong = |change: &dyn Fn(&mut Study)| {
            let mut study = study.clone();
            change(&mut study);
            study.write(&path).unwrap();
            format!("{:#}", Study::read(&path).unwrap_err())
        };
        let error = wrong(&|study| study.assignments[1].queries[0].query = "pair-0009".into());
        assert!(error.ends_with("study.json: rater 2 has the query pair-0009, which is not there"), "{error}");
        let error = wrong(&|study| study.assignments[1].queries[0].instead_of = Some(1));
        assert!(error.contains("from nobody who had it"), "{error}");
        let error = wrong(&|study| study.assignments.swap(0, 1));
        assert!(error.ends_with("rater 2 stands at place 1"), "{error}");
        let error = wrong(&|study| study.assignments.clear());
        assert!(error.ends_with("per_rater and assignments go together"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        let model = |name: &str| Model { name: name.into(), digest: String::new() };
        let prompts = [Prompt { text: "p".to_owned(), set: None }];
        let plan = |models: Vec<Model>, prompts: &[Prompt], raters| {
            Study::plan("t", models, Pairing::All, prompts, &[], raters, drawing(0)).unwrap_err().to_string()
        };
        assert!(plan(vec![model("a")], &prompts, 5).contains("--model at least twice"));
        assert!(plan(vec![model("a"), model("a")], &prompts, 5).contains("--model a is given twice"));
        assert!(plan(vec![model("a"), model("b")], &[], 5).contains("nothing to ask"));
        assert!(plan(vec![model("a"), model("b")], &prompts, 0).contains("--raters"));
    }
}
