//! The paper's Tables 1 to 5 for the models of a study, and its findings.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use super::{
    figures::Figures,
    findings::Finding,
    joint,
    paper::{self, Kind},
    statistics::Interval,
    table_2, Member, Plan,
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

/// Members of the first seed: one for each run.
pub(super) fn runs(plan: &Plan) -> Vec<&Member> {
    plan.members.iter().filter(|member| member.seed == plan.config.study.seeds[0]).collect()
}

pub(super) fn trained(member: &Member) -> Vec<&str> {
    member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect()
}

pub(super) fn is_ours(member: &Member) -> bool {
    matches!(member.config.method, MethodConfig::Ours(_))
}

impl Study {
    pub fn new(plan: &Plan, results: &[ModelResult]) -> Result<Self> {
        let figures = Figures { plan, results };
        let runs = runs(plan);
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        let joint = runs.iter().copied().find(|run| is_ours(run) && trained(run).len() > 1);
        // the reward that the rivals were trained on, or else the first one
        let rival = runs.iter().copied().find(|run| !is_ours(run)).unwrap_or(runs[0]);
        let compared = trained(rival)[0].to_string();
        let alone: Vec<&Member> = runs.iter().copied().filter(|run| trained(run) == [compared.as_str()]).collect();
        let (mut tables, mut findings) = (Vec::new(), Vec::new());

        let of_compared = figures.metrics(|metric, _| metric == compared);
        let mut methods: Vec<&str> = alone.iter().map(|run| run.name.as_str()).collect();
        methods.extend(joint.map(|joint| joint.name.as_str()));
        let note = format!("Trained on {compared} alone, but for the joint run; mean over prompts and seeds.");
        tables.push(figures.comparison(&format!("Table 1. {compared} by method"), &note, &methods, &of_compared)?);
        order_of_methods(&figures, &alone, &of_compared, &mut findings)?;
        tables.push(table_2::time_and_generality(plan, &alone, &compared, &mut findings)?);

        let parity = figures.metrics(|_, reward| Kind::of(reward) == Kind::Parity);
        if !parity.is_empty() {
            let note = "0 is even, 0.866 one tone only.";
            tables.push(figures.comparison("Table 3. Skin-tone parity", note, &names, &parity)?);
        }
        let detection = figures.metrics(|_, reward| Kind::of(reward) == Kind::Composition);
        if !detection.is_empty() {
            let note =
                "Mean confidence of the prompts' objects, pairs of objects seen in training and pairs of unseen ones.";
            tables.push(figures.comparison("Table 4. Detection of the prompts' objects", note, &names, &detection)?);
        }
        joint::table_5(&figures, &mut tables, &mut findings)?;
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

/// Table 1: on the reward that all are trained on ReFL is first and the paper's method before the others.
fn order_of_methods(
    figures: &Figures,
    alone: &[&Member],
    metrics: &[(String, String)],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let Some(ours) = alone.iter().find(|run| is_ours(run)) else { return Ok(()) };
    for (set, metric) in metrics {
        for other in alone.iter().filter(|run| !is_ours(run)) {
            let first = matches!(other.config.method, MethodConfig::Refl(_));
            let (higher, lower) = if first { (*other, *ours) } else { (*ours, *other) };
            let difference = figures.gain(&higher.name, &lower.name, std::slice::from_ref(set), metric)?;
            let called = |run: &Member| if is_ours(run) { "the paper's method".to_string() } else { run.name.clone() };
            let claim = format!("{} reaches more {metric} on {set} than {}", called(higher), called(lower));
            findings.push(Finding::at_least(claim, imagereward_of(higher, lower), "difference", difference, 0.0));
        }
    }
    Ok(())
}

/// Two methods in the paper's Table 1.
fn imagereward_of(higher: &Member, lower: &Member) -> String {
    let of = |run: &Member| paper::image_reward(run.config.method.name());
    let (Some(higher), Some(lower)) = (of(higher), of(lower)) else { return "not in the paper".to_string() };
    format!(
        "ImageReward {:.3} against {:.3} on DiffusionDB, {:.3} against {:.3} on PartiPrompts (Table 1)",
        higher[0], lower[0], higher[1], lower[1]
    )
}

/// What a run's task is of the paper's three.
pub(super) fn reward_kind(member: &Member, task: &str) -> Kind {
    let task = member.config.tasks.iter().find(|other| other.name == task).expect("a task of the run");
    Kind::of(&task.reward)
}
