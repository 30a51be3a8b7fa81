//! The paper's Tables 1 to 5 for the models of a study, and its findings.

use std::fmt::Write;

use anyhow::{Context, Result};
use serde::Serialize;
use tch::Device;

use super::{
    course::Course,
    findings::{Finding, Verdict},
    statistics::{BySeed, Interval, Resampling},
    Member, Plan, BASE,
};
use crate::{
    comm::Local,
    config::{MethodConfig, RewardConfig},
    evaluation::ModelResult,
    task::Task,
};

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

/// The values of all models by name, set and metric, and the draws behind intervals.
struct Figures<'a> {
    plan: &'a Plan,
    results: &'a [ModelResult],
}

impl Figures<'_> {
    /// A value per prompt of each seed; the base model has one seed.
    fn values(&self, run: &str, set: &str, metric: &str) -> Result<BySeed> {
        let names = match run {
            BASE => vec![BASE.to_string()],
            run => self.plan.config.study.seeds.iter().map(|seed| format!("{run}-seed{seed}")).collect(),
        };
        let of = |name: &String| {
            let model = self.results.iter().find(|model| model.model == *name);
            let set =
                model.and_then(|model| model.set(set)).with_context(|| format!("no result of {name} on {set}"))?;
            Ok(set.units(metric))
        };
        names.iter().map(of).collect()
    }

    fn interval(&self, models: &[&BySeed], quantity: impl Fn(&[f64]) -> f64) -> Interval {
        let study = &self.plan.config.study;
        Resampling::new(study.seeds.len(), models[0][0].len(), study.resamplings).interval(models, quantity)
    }

    fn value(&self, run: &str, set: &str, metric: &str) -> Result<Interval> {
        Ok(self.interval(&[&self.values(run, set, metric)?], |means| means[0]))
    }

    /// By how much `run` is above `other`.
    fn gain(&self, run: &str, other: &str, set: &str, metric: &str) -> Result<Interval> {
        let (run, other) = (self.values(run, set, metric)?, self.values(other, set, metric)?);
        Ok(self.interval(&[&run, &other], |means| means[0] - means[1]))
    }

    /// Sets and metrics whose reward is as wanted, in the evaluation's order.
    fn metrics(&self, wanted: impl Fn(&str, &RewardConfig) -> bool) -> Vec<(String, String)> {
        let sets = self.plan.evaluation.sets.iter();
        let all = sets.flat_map(|set| set.metrics.iter().map(move |metric| (set, metric)));
        all.filter(|(_, metric)| wanted(&metric.name, &metric.reward))
            .map(|(set, metric)| (set.name.clone(), metric.name.clone()))
            .collect()
    }

    /// Value and gain over the base model on each of `metrics`, a row for each of `runs` and the base model.
    fn comparison(&self, title: &str, note: &str, runs: &[&str], metrics: &[(String, String)]) -> Result<Table> {
        let mut columns = vec!["model".to_string()];
        for (set, metric) in metrics {
            columns.extend([format!("{metric} on {set}"), "gain".to_string()]);
        }
        let mut rows = Vec::new();
        for run in [BASE].iter().chain(runs) {
            let mut row = vec![Cell::Text(run.to_string())];
            for (set, metric) in metrics {
                row.push(Cell::Value(self.value(run, set, metric)?));
                row.push(match *run {
                    BASE => Cell::Text(String::new()),
                    run => Cell::Gain(self.gain(run, BASE, set, metric)?),
                });
            }
            rows.push(row);
        }
        Ok(Table { title: title.to_string(), note: note.to_string(), columns, rows })
    }
}

/// Members of the first seed: one for each run.
fn runs(plan: &Plan) -> Vec<&Member> {
    plan.members.iter().filter(|member| member.seed == plan.config.study.seeds[0]).collect()
}

fn trained(member: &Member) -> Vec<&str> {
    member.config.trained_tasks().map(|(_, task)| task.name.as_str()).collect()
}

fn is_ours(member: &Member) -> bool {
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
        if let Some(ours) = alone.iter().find(|run| is_ours(run)) {
            for (set, metric) in &of_compared {
                for other in alone.iter().filter(|run| !is_ours(run)) {
                    let difference = figures.gain(&ours.name, &other.name, set, metric)?;
                    let claim = format!("the paper's method reaches more {metric} on {set} than {}", other.name);
                    findings.push(Finding::at_least(claim, "difference", difference, 0.0));
                }
            }
        }
        tables.push(time_and_generality(plan, &alone, &compared, &mut findings)?);

        let parity = figures.metrics(|_, reward| matches!(reward, RewardConfig::Parity { .. }));
        if !parity.is_empty() {
            let note = "0 is even, −0.866 one tone only.";
            tables.push(figures.comparison("Table 3. Skin-tone parity", note, &names, &parity)?);
        }
        let detection = figures.metrics(|_, reward| {
            matches!(reward, RewardConfig::MiniatureComposition {} | RewardConfig::Composition(_))
        });
        if !detection.is_empty() {
            let note = "Mean confidence of the prompts' objects, those seen in training and those held out.";
            tables.push(figures.comparison("Table 4. Detection of the prompts' objects", note, &names, &detection)?);
        }
        let singles: Vec<&Member> =
            runs.iter().copied().filter(|run| is_ours(run) && trained(run).len() == 1).collect();
        for single in &singles {
            let reward = trained(single)[0];
            for (set, metric) in figures.metrics(|metric, _| metric == reward) {
                let gain = figures.gain(&single.name, BASE, &set, &metric)?;
                let claim = format!("training on {reward} alone raises {metric} on {set}");
                findings.push(Finding::at_least(claim, "gain", gain, 0.0));
            }
        }
        if let Some(joint) = joint {
            tables.push(joint_against_single(&figures, joint, &singles, &mut findings)?);
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
        text.push_str("\n## The paper's findings\n\n| finding | here | figure |\n|---|---|---|\n");
        for finding in &self.findings {
            let _ = writeln!(text, "| {} | {} | {} |", finding.claim, finding.verdict.words(), finding.evidence);
        }
        text.push('\n');
        text
    }
}

/// Table 2, measured: time to converge, and which of the study's rewards a method can train on.
fn time_and_generality(plan: &Plan, alone: &[&Member], reward: &str, findings: &mut Vec<Finding>) -> Result<Table> {
    let share = plan.config.study.converged_at;
    let tasks = &alone[0].config;
    let mut differentiable = Vec::new();
    for (i, task) in tasks.tasks.iter().enumerate() {
        let mut built = Task::new(task, i, tasks.run.seed, Device::Cpu, &Local)?;
        differentiable.push((task.name.as_str(), built.reward.differentiable().is_some()));
    }
    let mut rows = Vec::new();
    for run in alone {
        let courses = plan
            .members
            .iter()
            .filter(|member| member.name == run.name)
            .map(Course::read)
            .collect::<Result<Vec<_>>>()?;
        let each = |text: &dyn Fn(&Course) -> String| courses.iter().map(text).collect::<Vec<_>>().join(", ");
        let converged = each(&|course| match course.convergence(reward, share) {
            Some((iterations, seconds)) => format!("{seconds:.0} s ({iterations} iterations)"),
            None => "never rises".to_string(),
        });
        let method = &run.config.method;
        let can: Vec<&str> = differentiable
            .iter()
            .filter(|(_, differentiable)| *differentiable || !method.needs_gradient_of_reward())
            .map(|(name, _)| *name)
            .collect();
        if method.needs_gradient_of_reward() {
            let claim = format!("{} cannot train on every reward", run.name);
            let evidence = format!("it needs a gradient; {} of {} rewards have one", can.len(), differentiable.len());
            findings.push(Finding::that(claim, evidence, can.len() < differentiable.len()));
        } else if is_ours(run) {
            let claim = "the paper's method trains on every reward".to_string();
            let evidence = format!("{} of {}", can.len(), differentiable.len());
            findings.push(Finding::that(claim, evidence, can.len() == differentiable.len()));
        }
        rows.push(vec![
            Cell::Text(run.name.clone()),
            Cell::Text(converged),
            Cell::Text(each(&|course| format!("{:.0} s", course.seconds))),
            Cell::Text(each(&|course| course.samples.to_string())),
            Cell::Text(if method.needs_gradient_of_reward() { "yes" } else { "no" }.to_string()),
            Cell::Text(can.join(", ")),
        ]);
    }
    let columns = ["method", "time to converge", "training", "samples drawn", "needs the reward's gradient", "rewards"];
    Ok(Table {
        title: "Table 2. Time to converge, and generality".to_string(),
        note: format!(
            "Measured on this machine, per seed; converged: {:.0} % of a run's largest gain in {reward} on the few held-out \
             prompts that are evaluated in the course of training. Evaluations are not counted.",
            100.0 * share
        ),
        columns: columns.map(String::from).to_vec(),
        rows,
    })
}

/// Table 5.
fn joint_against_single(
    figures: &Figures,
    joint: &Member,
    singles: &[&Member],
    findings: &mut Vec<Finding>,
) -> Result<Table> {
    let mut rows = Vec::new();
    for single in singles {
        let reward = trained(single)[0];
        if !trained(joint).contains(&reward) {
            continue;
        }
        for (set, metric) in figures.metrics(|metric, _| metric == reward) {
            let base = figures.values(BASE, &set, &metric)?;
            let (of_single, of_joint) =
                (figures.values(&single.name, &set, &metric)?, figures.values(&joint.name, &set, &metric)?);
            let share = figures
                .interval(&[&of_joint, &of_single, &base], |means| (means[0] - means[2]) / (means[1] - means[2]));
            let gain = figures.gain(&joint.name, BASE, &set, &metric)?;
            let of_single = figures.gain(&single.name, BASE, &set, &metric)?;
            // a share of a gain that may be none says nothing
            let has_gain = of_single.low > 0.0;
            rows.push(vec![
                Cell::Text(format!("{metric} on {set}")),
                Cell::Value(figures.value(BASE, &set, &metric)?),
                Cell::Gain(of_single),
                Cell::Gain(gain),
                if has_gain { Cell::Value(share) } else { Cell::Text("the single run has no sure gain".to_string()) },
            ]);
            findings.push(Finding::at_least(format!("the joint run raises {metric} on {set}"), "gain", gain, 0.0));
            let claim = format!("the joint run keeps at least 80 % of the single run's gain in {metric} on {set}");
            findings.push(match has_gain {
                true => Finding::at_least(claim, "share", share, 0.8),
                false => Finding {
                    claim,
                    verdict: Verdict::Undecided,
                    evidence: format!("the single run has no sure gain: {}", of_single.text(true)),
                },
            });
        }
    }
    let columns = ["reward", "base", "gain of the single run", "gain of the joint run", "share kept"];
    Ok(Table {
        title: "Table 5. Joint against single-reward training".to_string(),
        note: "The paper's joint run keeps at least 80 % of each single run's gain.".to_string(),
        columns: columns.map(String::from).to_vec(),
        rows,
    })
}
