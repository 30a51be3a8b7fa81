//! The order of the methods: on the reward that they are trained on (Tables 1, 3 and 4), on judges that nobody trains on
//! (Table 1), and what methods that see the reward's gradient do to the pictures (Fig. 4).

use anyhow::Result;

use super::{
    figures::{Figures, FINE_DETAIL},
    findings::Finding,
    paper::{self, Kind, Measure},
    tables::{is_ours, reward_kind, runs, trained},
    Member, BASE,
};
use crate::config::MethodConfig;

/// On every reward that the paper's method and others are trained on alone: the paper's method is above the others, but for
/// ReFL on preference.
pub fn on_trained_rewards(figures: &Figures, findings: &mut Vec<Finding>) -> Result<()> {
    let members = runs(figures.plan);
    for ours in members.iter().filter(|run| is_ours(run) && trained(run).len() == 1) {
        let task = trained(ours)[0];
        let kind = reward_kind(ours, task);
        let measure = Measure::of(kind);
        for (set, metric) in figures.metrics(|name, _| name == task) {
            for other in members.iter().filter(|run| !is_ours(run) && trained(run) == [task]) {
                let first = kind == Kind::Preference && matches!(other.config.method, MethodConfig::Refl(_));
                let (higher, lower) = if first { (*other, *ours) } else { (*ours, *other) };
                let difference = figures.gain(&higher.name, &lower.name, std::slice::from_ref(&set), &metric)?;
                let claim = format!("{} reaches more {metric} on {set} than {}", called(higher), called(lower));
                let paper = measure.beside(higher.config.method.name(), lower.config.method.name());
                findings.push(Finding::at_least(claim, paper, "difference", difference, 0.0));
            }
        }
    }
    Ok(())
}

fn called(run: &Member) -> &str {
    if is_ours(run) {
        "the paper's method"
    } else {
        &run.name
    }
}

/// Sets and judges of Table 1 that no run is trained on.
fn untrained<'a>(figures: &Figures, of_table_1: &'a [(String, String)]) -> Vec<&'a (String, String)> {
    let members = runs(figures.plan);
    let is_trained = |metric: &str| members.iter().any(|member| trained(member).contains(&metric));
    of_table_1.iter().filter(|(_, metric)| !is_trained(metric)).collect()
}

/// The sets of Table 1, each once.
fn sets_of(of_table_1: &[(String, String)]) -> Vec<String> {
    let mut sets: Vec<String> = of_table_1.iter().map(|(set, _)| set.clone()).collect();
    sets.dedup();
    sets
}

/// Table 1: on a judge that nobody trains on the paper's method is above all others, the base model among them. `alone`
/// are the runs on the compared reward.
pub fn on_other_judges(
    figures: &Figures,
    alone: &[&Member],
    of_table_1: &[(String, String)],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let Some(ours) = alone.iter().find(|run| is_ours(run)) else { return Ok(()) };
    for (set, judge) in untrained(figures, of_table_1) {
        let rivals = alone.iter().filter(|run| !is_ours(run)).map(|run| (run.name.as_str(), run.config.method.name()));
        for (name, method) in rivals.chain([(BASE, BASE)]) {
            let difference = figures.gain(&ours.name, name, std::slice::from_ref(set), judge)?;
            let claim = format!("on {judge}, which nobody trains on, the paper's method is above {name} on {set}");
            findings.push(Finding::at_least(
                claim,
                paper::AESTHETIC.beside("ours", method),
                "difference",
                difference,
                0.0,
            ));
        }
    }
    Ok(())
}

/// Section 4.1, Fig. 4 and 28: methods that follow the reward's gradient over-optimise it, with noise of high frequency in the
/// pictures.
pub fn over_optimisation(
    figures: &Figures,
    alone: &[&Member],
    of_table_1: &[(String, String)],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let Some(ours) = alone.iter().find(|run| is_ours(run)) else { return Ok(()) };
    let sets = sets_of(of_table_1);
    for run in alone.iter().filter(|run| run.config.method.needs_gradient_of_reward()) {
        let more = figures.gain(&run.name, &ours.name, &sets, FINE_DETAIL)?;
        let claim = format!(
            "{}, which sees the reward's gradient, over-optimises: more fine detail than the paper's method on {}",
            run.name,
            sets.join(", ")
        );
        let paper = "over-detailed pictures, no figure (section 4.1, Fig. 4 and 28)".to_string();
        findings.push(Finding::at_least(claim, paper, "share of fine detail, more by", more, 0.0));
    }
    Ok(())
}

/// Appendix G: without the pretraining loss pictures are less natural and grainy.
pub fn without_pretraining(
    figures: &Figures,
    of_table_1: &[(String, String)],
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let paper = || "less realistic, grainy pictures without it, no figure (Appendix G, Fig. 29)".to_string();
    for [with, without] in figures.plan.ablations() {
        let metrics = of_table_1.iter().filter(|(set, metric)| {
            Kind::Preference == figures.kind(set, metric) && !trained(with).contains(&metric.as_str())
        });
        for (set, metric) in metrics {
            let set = std::slice::from_ref(set);
            let more = figures.gain(&with.name, &without.name, set, metric)?;
            let claim = format!("with L_pre {} keeps more {metric} on {} than without", with.name, set[0]);
            findings.push(Finding::at_least(claim, paper(), "more by", more, 0.0));
        }
        let sets = sets_of(of_table_1);
        let more = figures.gain(&without.name, &with.name, &sets, FINE_DETAIL)?;
        let claim = format!("without L_pre {} draws more fine detail on {}", with.name, sets.join(", "));
        findings.push(Finding::at_least(claim, paper(), "share of fine detail, more by", more, 0.0));
    }
    Ok(())
}
