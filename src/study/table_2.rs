//! Table 2: how long a method trains until its reward saturates, whether it diverges, and which rewards it can
//! train on.

use anyhow::Result;
use tch::Device;

use super::{
    course::{Course, Saturation},
    findings::Finding,
    tables::{is_ours, Cell, Table},
    Member, Plan,
};
use crate::{
    comm::Local,
    config::{MethodConfig, RewardSource},
    convergence::Criterion,
    task::Task,
};

const GENERALITY: &str = "generalises to any reward: yes or no (Table 2)";

/// Table 2 of the runs that are trained on `reward` alone, and what the paper finds there.
pub(super) fn time_and_generality(
    plan: &Plan,
    alone: &[&Member],
    reward: &str,
    findings: &mut Vec<Finding>,
) -> Result<Table> {
    let differentiable = differentiable(alone[0])?;
    let criterion = plan.config.saturation.as_ref().map(|settings| settings.rule());
    let share = plan.config.study.converged_at;
    let (mut ours, mut draft) = (Vec::new(), Vec::new());
    let mut rows = Vec::new();
    for run in alone {
        let of_run = plan.members.iter().filter(|member| member.name == run.name);
        let courses = of_run.map(Course::read).collect::<Result<Vec<_>>>()?;
        let each = |text: &dyn Fn(&Course) -> String| courses.iter().map(text).collect::<Vec<_>>().join(", ");
        let saturated: Vec<Saturation> =
            courses.iter().map(|course| course.saturation(reward, &course.judge(criterion))).collect();
        let method = &run.config.method;
        if matches!(method, MethodConfig::Raft(_)) {
            findings.push(raft_diverges(&courses, reward, criterion));
        }
        if is_ours(run) {
            ours.clone_from(&saturated);
        }
        if matches!(method, MethodConfig::Draft(_)) {
            draft.clone_from(&saturated);
        }
        let can: Vec<&str> = differentiable
            .iter()
            .filter(|(_, differentiable)| *differentiable || !method.needs_gradient_of_reward())
            .map(|(name, _)| *name)
            .collect();
        if method.needs_gradient_of_reward() {
            let claim = format!("{} cannot train on every reward", run.name);
            let evidence = format!("it needs a gradient; {} of {} rewards have one", can.len(), differentiable.len());
            findings.push(Finding::that(claim, GENERALITY.into(), evidence, &[can.len() < differentiable.len()]));
        } else if is_ours(run) {
            let claim = "the paper's method trains on every reward".to_string();
            let evidence = format!("{} of {}", can.len(), differentiable.len());
            findings.push(Finding::that(claim, GENERALITY.into(), evidence, &[can.len() == differentiable.len()]));
        }
        rows.push(vec![
            Cell::Text(run.name.clone()),
            Cell::Text(each(&|course| until_saturation(course, reward, criterion))),
            Cell::Text(each(&|course| match course.convergence(reward, share) {
                Some((iterations, seconds)) => format!("{seconds:.0} s ({iterations} iterations)"),
                None => "never rises".to_string(),
            })),
            Cell::Text(each(&|course| format!("{:.0} s", course.seconds))),
            Cell::Text(each(&|course| course.samples.to_string())),
            Cell::Text(if method.needs_gradient_of_reward() { "yes" } else { "no" }.to_string()),
            Cell::Text(can.join(", ")),
        ]);
    }
    if !draft.is_empty() && !ours.is_empty() {
        findings.push(before_draft(&ours, &draft));
    }
    let columns = [
        "method".to_string(),
        "time to saturation of the training reward".to_string(),
        format!("to {:.0} % of the gain on held-out prompts", 100.0 * share),
        "training".to_string(),
        "samples drawn".to_string(),
        "needs the reward's gradient".to_string(),
        "rewards".to_string(),
    ];
    Ok(Table {
        title: "Table 2. Time to converge, and generality".to_string(),
        note: note(reward, criterion),
        columns: columns.to_vec(),
        rows,
    })
}

fn note(reward: &str, criterion: Option<Criterion>) -> String {
    let windows = match criterion {
        Some(c) => format!(
            "none of the newest {} windows of {} iterations is above the best one before by more than {} times the \
             standard error; diverged: the last window is more than {} standard errors",
            c.patience, c.window, c.rise, c.fall
        ),
        None => "none of the newest two windows (of a sixth of the run, 4 to 50 iterations) is more than one standard error above \
                 the best one before; diverged: the last window is more than four standard errors"
            .to_string(),
    };
    format!(
        "Measured on this machine, per seed. The mean {reward} of what a run samples in training has saturated where {windows}, and \
         a tenth of its gain, below the best (the reward-weighted method samples from the original model: of it the evaluations on \
         a few held-out prompts are looked at). Evaluations are not counted."
    )
}

/// The rewards of a run's tasks, and whether they have a gradient.
fn differentiable(run: &Member) -> Result<Vec<(&str, bool)>> {
    let config = &run.config;
    let of = |(i, task)| {
        let mut built = Task::new(task, i, config.run.seed, Device::Cpu, &Local)?;
        Ok((task.name.as_str(), built.reward.differentiable().is_some()))
    };
    config.tasks.iter().enumerate().map(of).collect()
}

fn until_saturation(course: &Course, reward: &str, criterion: Option<Criterion>) -> String {
    let judge = course.judge(criterion);
    let of = if judge.source == RewardSource::Evaluation { " by evaluations" } else { "" };
    let time = match course.saturation(reward, &judge) {
        Saturation { at: Some((iterations, seconds)), .. } => format!("{seconds:.0} s ({iterations} iterations{of})"),
        Saturation { at: None, of: iterations } => {
            format!("more than {:.0} s ({iterations} iterations{of})", course.seconds)
        }
    };
    match course.fallen_back(reward, &judge).flatten() {
        Some(fallen) => format!("{time} diverged after iteration {}", fallen.best_iterations[1]),
        None => time,
    }
}

fn raft_diverges(courses: &[Course], reward: &str, criterion: Option<Criterion>) -> Finding {
    let fallen = courses.iter().filter_map(|course| course.fallen_back(reward, &course.judge(criterion)));
    let diverged: Vec<bool> = fallen.map(|fallen| fallen.is_some()).collect();
    let evidence = format!("{} of {} seeds", diverged.iter().filter(|d| **d).count(), courses.len());
    Finding::that("raft diverges".into(), "diverged (Table 2)".into(), evidence, &diverged)
}

fn before_draft(ours: &[Saturation], draft: &[Saturation]) -> Finding {
    let pairs = || ours.iter().zip(draft);
    let each: Vec<String> =
        pairs().map(|(ours, draft)| format!("{} against {}", ours.in_words(), draft.in_words())).collect();
    let holds: Vec<bool> = pairs().filter_map(|(ours, draft)| ours.before(draft)).collect();
    let claim = "the paper's method saturates in fewer iterations than draft".to_string();
    let paper = "about 1,000 against about 4,000 (section 4.1)".to_string();
    Finding::that(claim, paper, format!("iterations by seed: {}", each.join(", ")), &holds)
}
