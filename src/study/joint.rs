//! Table 5: every single-reward run and the joint run, judged by every reward; and what the paper finds there.

use anyhow::Result;

use super::{
    figures::Figures,
    findings::Finding,
    paper::{Kind, Trained},
    tables::{is_ours, reward_kind, runs, trained, Cell, Table},
    Member, BASE,
};

/// A run of the paper's method with what it is trained on.
struct Run<'a> {
    name: &'a str,
    on: Trained,
}

/// A metric with all sets that it judges.
struct Metric {
    name: String,
    kind: Kind,
    sets: Vec<String>,
}

/// Table 5 and the joint run's shares, and their findings; without a joint run the single runs' findings alone.
pub fn table_5(figures: &Figures, tables: &mut Vec<Table>, findings: &mut Vec<Finding>) -> Result<()> {
    let members = runs(figures.plan);
    let ours: Vec<Run> = members.iter().filter(|member| is_ours(member)).map(|member| run(member)).collect();
    let metrics = metrics(figures);
    single_runs(figures, &ours, &metrics, findings)?;
    let Some(joint) = ours.iter().find(|run| run.on == Trained::Jointly) else { return Ok(()) };
    tables.push(scores(figures, &ours, &metrics)?);
    tables.push(shares(figures, joint, &ours, &metrics, findings)?);
    Ok(())
}

fn run(member: &Member) -> Run<'_> {
    let tasks = trained(member);
    let on = if tasks.len() > 1 { Trained::Jointly } else { Trained::On(reward_kind(member, tasks[0])) };
    Run { name: &member.name, on }
}

/// The metrics that are named as a reward that is trained on, in the evaluation's order.
fn metrics(figures: &Figures) -> Vec<Metric> {
    let members = runs(figures.plan);
    let mut found: Vec<Metric> = Vec::new();
    for (set, metric) in figures.metrics(|name, _| members.iter().any(|member| trained(member).contains(&name))) {
        match found.iter_mut().find(|other| other.name == metric) {
            Some(other) => other.sets.push(set),
            None => found.push(Metric { kind: figures.kind(&set, &metric), name: metric, sets: vec![set] }),
        }
    }
    found
}

/// What the paper says of the runs that are trained on one reward: each raises its own and has the best score in it, and
/// may pay for it with another.
fn single_runs(figures: &Figures, ours: &[Run], metrics: &[Metric], findings: &mut Vec<Finding>) -> Result<()> {
    for metric in metrics {
        let Some(own) = ours.iter().find(|run| run.on == Trained::On(metric.kind)) else { continue };
        let name = &metric.name;
        let gain = figures.gain(own.name, BASE, &metric.sets, name)?;
        let claim = format!("training on {name} alone raises {name}");
        findings.push(Finding::at_least(claim, metric.kind.since_base(own.on), "gain", gain, 0.0));
        for other in ours.iter().filter(|run| run.name != own.name) {
            let ahead = figures.gain(own.name, other.name, &metric.sets, name)?;
            let claim = format!("the run on {name} alone has a better {name} than {}", other.name);
            findings.push(Finding::at_least(claim, metric.kind.against(own.on, other.on), "ahead by", ahead, 0.0));
        }
    }
    for (payer, loser) in [(Kind::Preference, Kind::Parity), (Kind::Parity, Kind::Preference)] {
        let run = ours.iter().find(|run| run.on == Trained::On(payer));
        let metric = metrics.iter().find(|metric| metric.kind == loser);
        if let (Some(run), Some(metric)) = (run, metric) {
            let loss = figures.gain(BASE, run.name, &metric.sets, &metric.name)?;
            let claim = format!("alignment tax: training on {} alone worsens {}", run.name, metric.name);
            findings.push(Finding::at_least(claim, loser.since_base(run.on), "worse by", loss, 0.0));
        }
    }
    Ok(())
}

/// The table as the paper has it: models by metrics, each the mean over the metric's sets.
fn scores(figures: &Figures, ours: &[Run], metrics: &[Metric]) -> Result<Table> {
    let mut columns = vec!["model".to_string()];
    columns.extend(metrics.iter().map(|metric| {
        let sets = metric.sets.join(", ");
        if metric.kind == Kind::Parity {
            format!("{} (SP, lower is better), mean over {sets}", metric.name)
        } else {
            format!("{}, mean over {sets}", metric.name)
        }
    }));
    let mut rows = Vec::new();
    for name in [BASE].into_iter().chain(ours.iter().map(|run| run.name)) {
        let mut row = vec![Cell::Text(name.to_string())];
        for metric in metrics {
            row.push(Cell::Value(figures.value(name, &metric.sets, &metric.name)?));
        }
        rows.push(row);
    }
    let note = "Every model of the paper's method by every metric; a metric's sets count equally.";
    Ok(Table { title: "Table 5. Joint against single-reward training".into(), note: note.into(), columns, rows })
}

/// What the joint run keeps of each single run's score (the paper's "over 80 %") and of its gain over the base model.
fn shares(
    figures: &Figures,
    joint: &Run,
    ours: &[Run],
    metrics: &[Metric],
    findings: &mut Vec<Finding>,
) -> Result<Table> {
    let mut rows = Vec::new();
    for metric in metrics {
        let kind = metric.kind;
        let Some(single) = ours.iter().find(|run| run.on == Trained::On(kind)) else { continue };
        let (name, sets) = (&metric.name, &metric.sets);
        let gain = figures.gain(joint.name, BASE, sets, name)?;
        let claim = format!("the joint run has a better {name} than the base model");
        findings.push(Finding::at_least(claim, kind.since_base(joint.on), "gain", gain, 0.0));
        let score = figures.ratio([joint.name, single.name], sets, name, |joint, single| match kind {
            Kind::Parity => single / joint,
            _ => joint / single,
        })?;
        let paper = format!("{:.3} of the score (from Table 5)", kind.score_kept());
        let claim = format!("the joint run has over 80 % of the single run's score in {name}");
        findings.push(Finding::at_least(claim, paper, "share of the score", score, 0.8));
        let of_single = figures.gain(single.name, BASE, sets, name)?;
        // a share of a gain that may be none says nothing
        let share_of_gain = if of_single.low > 0.0 {
            Cell::Value(figures.share_of_gain(joint.name, single.name, BASE, sets, name)?)
        } else {
            Cell::Text("the single run has no sure gain".to_string())
        };
        rows.push(vec![
            Cell::Text(name.clone()),
            Cell::Value(score),
            Cell::Text(format!("{:.3}", kind.score_kept())),
            Cell::Gain(of_single),
            Cell::Gain(gain),
            share_of_gain,
            Cell::Text(format!("{:.3}", kind.gain_kept())),
        ]);
    }
    let columns = [
        "reward",
        "share of the score",
        "the paper's",
        "gain of the single run",
        "gain of the joint run",
        "share of the gain",
        "the paper's",
    ];
    let note =
        "Share of the score: joint over single run, for SP single over joint; the paper's \"over 80 %\" is this one. \
                Gains are of the reward, so that higher is better for SP too.";
    Ok(Table {
        title: "Table 5, continued. What the joint run keeps".into(),
        note: note.into(),
        columns: columns.map(String::from).to_vec(),
        rows,
    })
}
