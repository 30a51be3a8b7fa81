//! Whether a study's runs and its evaluation go together: what is trained on is judged by the metric of the same name.

use anyhow::{ensure, Result};

use super::{
    paper::Kind,
    tables::{compared, is_ours, of_table_1, reward_kind, runs, trained},
    Plan,
};

/// # Errors
/// A task that runs train on and that no metric is named as, or whose metric judges something else: the tables that need it
/// would be empty.
pub fn check(plan: &Plan) -> Result<()> {
    let file = &plan.config.study.evaluation;
    let members = runs(plan);
    let metrics: Vec<_> =
        plan.evaluation.sets.iter().flat_map(|set| set.metrics.iter().map(move |metric| (set, metric))).collect();
    let mut names: Vec<&str> = metrics.iter().map(|(_, metric)| metric.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    for member in &members {
        for task in trained(member) {
            let (run, kind) = (&member.name, reward_kind(member, task));
            let named: Vec<_> = metrics.iter().filter(|(_, metric)| metric.name == task).collect();
            ensure!(
                !named.is_empty(),
                "run {run} trains on {task}, and no metric of {file} is named {task} (they are {}): {} would be empty",
                names.join(", "),
                tables_of(plan, task, kind)
            );
            for (set, metric) in named {
                let judged = Kind::of(&metric.reward);
                ensure!(
                    judged == kind,
                    "run {run} trains on {task}, which is {}, and the metric {task} of set {} of {file} is {}: they cannot \
                     stand in one column of {}",
                    kind.words(),
                    set.name,
                    judged.words(),
                    tables_of(plan, task, kind)
                );
            }
        }
    }
    Ok(())
}

/// The tables that need the metric of a task.
fn tables_of(plan: &Plan, task: &str, kind: Kind) -> String {
    let members = runs(plan);
    let mut tables = Vec::new();
    if compared(&members) == task {
        tables.push("Table 1");
    }
    match kind {
        Kind::Parity => tables.push("Table 3"),
        Kind::Composition => tables.push("Table 4"),
        Kind::Preference => {}
    }
    if tables.is_empty() || members.iter().any(|member| is_ours(member) && trained(member).contains(&task)) {
        tables.push("Table 5");
    }
    tables.join(" and ")
}

/// What the tables lack of the paper's, and metrics that are in none: a sentence each.
pub fn lacks(plan: &Plan) -> Vec<String> {
    let file = &plan.config.study.evaluation;
    let members = runs(plan);
    let compared = compared(&members);
    let of_table_1 = of_table_1(plan, compared);
    let mut found = Vec::new();
    if of_table_1.iter().all(|(_, metric)| metric == compared) {
        found.push(format!(
            "Table 1 lacks a second metric: the sets of {file} that have {compared} are judged by nothing that nobody trains on"
        ));
    }
    let sets_of = |kind: Kind| -> Vec<&str> {
        let sets = plan.evaluation.sets.iter();
        sets.filter(|set| set.metrics.iter().any(|metric| Kind::of(&metric.reward) == kind))
            .map(|set| set.name.as_str())
            .collect()
    };
    let of_compared: Vec<&str> =
        of_table_1.iter().filter(|(_, metric)| metric == compared).map(|(set, _)| set.as_str()).collect();
    for (table, metric, sets) in [
        ("Table 1", compared, of_compared),
        ("Table 3", "parity", sets_of(Kind::Parity)),
        ("Table 4", "composition", sets_of(Kind::Composition)),
    ] {
        match sets.as_slice() {
            [] => found.push(format!("there is no {table}: no set of {file} has a metric of {metric}")),
            [set] => found.push(format!("{table} lacks a second set: {set} alone has a metric of {metric} in {file}")),
            _ => {}
        }
    }
    for set in &plan.evaluation.sets {
        for metric in &set.metrics {
            let is_in_table_1 = of_table_1.iter().any(|(other, name)| *other == set.name && *name == metric.name);
            let is_trained = members.iter().any(|member| trained(member).contains(&metric.name.as_str()));
            if !is_in_table_1 && !is_trained && Kind::of(&metric.reward) == Kind::Preference {
                found.push(format!("the metric {} of set {} of {file} is in no table", metric.name, set.name));
            }
        }
    }
    found
}
