//! The paper's Tables 1 to 5 for the models of a study, and its findings.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::{
    figures::Figures, findings::Finding, joint, paper::Kind, rivals, statistics::Interval, table_2, Member, Plan,
};
use crate::{config::MethodConfig, evaluation::ModelResult};

/// What a study found.
#[derive(Clone, Debug, Serialize)]
pub struct Study {
    pub name: String,
    pub seeds: Vec<u64>,
    pub tables: Vec<Table>,
    pub findings: Vec<Finding>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Table {
    pub title: String,
    pub note: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Cell {
    Text(String),
    Value(Interval),
    /// A difference or a share; shown with its sign.
    Gain(Interval),
}

impl Cell {
    pub fn text(&self) -> String {
        match self {
            Cell::Text(text) => text.clone(),
            Cell::Value(interval) => interval.text(false),
            Cell::Gain(interval) => interval.text(true),
        }
    }
}

/// Members of the first seed, one for each run, but for ablations, which are in a table of their own.
pub(super) fn runs(plan: &Plan) -> Vec<&Member> {
    plan.of_first_seed().filter(|member| !member.ablation).collect()
}

pub(super) fn trained(member: &Member) -> Vec<&str> {
    member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect()
}

pub(super) fn is_ours(member: &Member) -> bool {
    matches!(member.config.method, MethodConfig::Ours(_))
}

/// The reward that most of the rivals are trained on (of two, the one that comes first), or the first run's.
pub(super) fn compared<'a>(runs: &[&'a Member]) -> &'a str {
    let of_rivals: Vec<&str> = runs.iter().filter(|run| !is_ours(run)).flat_map(|run| trained(run)).collect();
    let count = |task: &str| of_rivals.iter().filter(|other| **other == task).count();
    // `max_by_key` gives the last of equal ones
    of_rivals.iter().rev().max_by_key(|task| count(task)).copied().unwrap_or(trained(runs[0])[0])
}

/// Sets and metrics of Table 1: the reward that methods are compared by, and the other judges of a picture's beauty on the
/// same sets.
pub(super) fn of_table_1(plan: &Plan, compared: &str) -> Vec<(String, String)> {
    let sets = plan.evaluation.sets.iter().filter(|set| set.metrics.iter().any(|metric| metric.name == compared));
    let all = sets.flat_map(|set| set.metrics.iter().map(move |metric| (set, metric)));
    all.filter(|(_, metric)| metric.name == compared || Kind::of(&metric.reward) == Kind::Preference)
        .map(|(set, metric)| (set.name.clone(), metric.name.clone()))
        .collect()
}

impl Study {
    pub fn new(plan: &Plan, results: &[ModelResult]) -> Result<Self> {
        let figures = Figures { plan, results };
        let runs = runs(plan);
        let joint = runs.iter().copied().find(|run| is_ours(run) && trained(run).len() > 1);
        let compared = compared(&runs).to_string();
        let alone: Vec<&Member> = runs.iter().copied().filter(|run| trained(run) == [compared.as_str()]).collect();
        let (mut tables, mut findings) = (Vec::new(), Vec::new());

        let mut methods: Vec<&str> = alone.iter().map(|run| run.name.as_str()).collect();
        methods.extend(joint.map(|joint| joint.name.as_str()));
        let note = format!("Trained on {compared} alone, but for the joint run; mean over prompts and seeds.");
        let of_table_1 = of_table_1(plan, &compared);
        tables.push(figures.comparison(&format!("Table 1. {compared} by method"), &note, &methods, &of_table_1)?);
        rivals::on_trained_rewards(&figures, &mut findings)?;
        rivals::on_other_judges(&figures, &alone, &of_table_1, &mut findings)?;
        rivals::over_optimisation(&figures, &alone, &of_table_1, &mut findings)?;
        tables.push(table_2::time_and_generality(plan, &alone, &compared, &mut findings)?);

        for (kind, title, note) in [
            (Kind::Parity, "Table 3. Skin-tone parity", "0 is even, 0.866 one tone only."),
            (
                Kind::Composition,
                "Table 4. Detection of the prompts' objects",
                "Mean confidence of the prompts' objects, pairs of objects seen in training and pairs of unseen ones.",
            ),
        ] {
            let metrics = figures.metrics(|_, reward| Kind::of(reward) == kind);
            if !metrics.is_empty() {
                tables.push(figures.comparison(title, note, &trained_on(&runs, kind), &metrics)?);
            }
        }
        joint::table_5(&figures, &mut tables, &mut findings)?;
        if let Some(table) = without_pretraining(&figures, &of_table_1)? {
            tables.push(table);
            rivals::without_pretraining(&figures, &of_table_1, &mut findings)?;
        }
        Ok(Study { name: plan.config.study.name.clone(), seeds: plan.config.study.seeds.clone(), tables, findings })
    }

    /// The whole study as Markdown.
    pub fn markdown(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(|seed| seed.to_string()).collect();
        let mut text = format!("# {}\n\nSeeds {}. ", self.name, seeds.join(", "));
        text.push_str(
            "All models draw the same prompts from the same noise. Intervals are 95 %, from draws of prompts and seeds with \
             replacement; what few seeds say of the seeds' share in them is little.\n",
        );
        for table in &self.tables {
            let _ = write!(text, "\n## {}\n\n{}\n\n", table.title, table.note);
            let _ = writeln!(text, "| {} |", table.columns.join(" | "));
            let _ = writeln!(text, "|{}", "---|".repeat(table.columns.len()));
            for row in &table.rows {
                let cells: Vec<String> = row.iter().map(Cell::text).collect();
                let _ = writeln!(text, "| {} |", cells.join(" | "));
            }
        }
        text.push_str(
            "\n## The paper's findings\n\n| the paper finds | its figure | here | our figure |\n|---|---|---|---|\n",
        );
        for finding in &self.findings {
            let (claim, paper, verdict) = (&finding.claim, &finding.paper, finding.verdict.words());
            let _ = writeln!(text, "| {claim} | {paper} | {verdict} | {} |", finding.evidence);
        }
        text.push('\n');
        text
    }
}

/// The names of the runs that train on a reward of this kind; of all where none does.
fn trained_on<'a>(runs: &[&'a Member], kind: Kind) -> Vec<&'a str> {
    let trains = |run: &Member| trained(run).into_iter().any(|task| reward_kind(run, task) == kind);
    let there: Vec<&str> = runs.iter().filter(|run| trains(run)).map(|run| run.name.as_str()).collect();
    match there.is_empty() {
        true => runs.iter().map(|run| run.name.as_str()).collect(),
        false => there,
    }
}

/// Appendix G: the runs without their pretraining loss beside those that have it.
fn without_pretraining(figures: &Figures, metrics: &[(String, String)]) -> Result<Option<Table>> {
    let names: Vec<&str> = figures.plan.ablations().into_iter().flatten().map(|member| member.name.as_str()).collect();
    if names.is_empty() {
        return Ok(None);
    }
    let note = "The same run with the pretraining loss L_pre and without, after the same iterations.";
    figures.comparison("Appendix G. Effect of the pretraining loss", note, &names, metrics).map(Some)
}

/// What a run's task is of the paper's three.
pub(super) fn reward_kind(member: &Member, task: &str) -> Kind {
    let task = member.config.tasks.iter().find(|other| other.name == task).expect("a task of the run");
    Kind::of(&task.reward)
}
