//! Charts of metrics: one curve per run, each with its running mean.

use super::{
    run_data::RunData,
    svg::{chart, Line, Look},
};
use crate::telemetry::{mean_window, names, running_mean};

/// A curve of more points is drawn by the means of equally many neighbours.
const POINTS: usize = 400;
/// Curves of at most this many points show each.
const DOTS: usize = 40;
const X_NAME: &str = "iterations";

/// A metric of one run: (iterations done, value) of every line of metrics that has it.
fn series(run: &RunData, name: &str) -> Vec<(f64, f64)> {
    let points = run.history.iter().filter_map(|m| Some(((m.iteration + 1) as f64, m.get(name)?)));
    points.collect()
}

/// Means of equally many neighbours, so that at most [`POINTS`] are left.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let bucket = points.len().div_ceil(POINTS).max(1);
    let mean = |bucket: &[(f64, f64)]| {
        let n = bucket.len() as f64;
        (bucket.iter().map(|p| p.0).sum::<f64>() / n, bucket.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(bucket).map(mean).collect()
}

/// A metric of all runs that have it, with running means; empty where none has.
pub fn metric(runs: &[RunData], name: &str, title: &str, levels: &[Line]) -> String {
    let mut lines = levels.to_vec();
    for (color, run) in runs.iter().enumerate() {
        let points = series(run, name);
        if points.is_empty() {
            continue;
        }
        let line = |look, points| Line { label: run.name.clone(), color, look, points };
        if points.len() < 4 {
            lines.push(line(Look::Dots, points));
            continue;
        }
        lines.push(line(Look::Raw, thinned(&points)));
        lines.push(line(Look::Main, thinned(&running_mean(&points, mean_window(points.len())))));
    }
    if lines.len() == levels.len() {
        return String::new();
    }
    chart(title, unit(name), X_NAME, &lines)
}

/// What the evaluations in the course of training found of a task; it begins with the model before training.
pub fn evaluations(runs: &[RunData], task: &str, name: &str, title: &str) -> String {
    let mut lines = Vec::new();
    for (color, run) in runs.iter().enumerate() {
        let base = names::of_task(task, &format!("base_{name}"));
        let mut points: Vec<_> =
            run.history.iter().find_map(|m| m.get(&base)).map(|value| (0.0, value)).into_iter().collect();
        points.extend(series(run, &names::of_task(task, name)));
        if points.is_empty() {
            continue;
        }
        let look = if points.len() <= DOTS { Look::Dots } else { Look::Main };
        lines.push(Line { label: run.name.clone(), color, look, points });
    }
    if lines.is_empty() {
        return String::new();
    }
    chart(title, unit(name), X_NAME, &lines)
}

/// In what a metric is measured; nothing for plain numbers.
pub fn unit(name: &str) -> &'static str {
    let last = name.rsplit('/').next().unwrap_or(name);
    match last {
        _ if name.starts_with("seconds/") || last.ends_with("_seconds") => "s",
        names::SAMPLES_PER_SECOND => "samples/s",
        names::TFLOPS => "TFLOP/s",
        names::APPROX_KL => "nats² per latent element",
        names::BAD_REWARDS => "samples",
        names::DIVERSITY | "base_diversity" => "RMS distance of two pictures",
        names::HIGH_FREQUENCY | "base_high_frequency" => "share of spectral energy",
        names::CLIP_FRACTION | "bad_reward_share" | "miss_rate" | "all_present" => "share",
        _ if last.starts_with("share_") => "share",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_are_thinned_to_means() {
        let points: Vec<_> = (0..1000).map(|i| (f64::from(i), 2.0 * f64::from(i))).collect();
        let thin = thinned(&points);
        assert_eq!(thin.len(), 334);
        assert_eq!((thin[0], thin[333]), ((1.0, 2.0), (999.0, 1998.0)));
        assert_eq!(thinned(&points[..400]), &points[..400]);
    }

    #[test]
    fn units_are_those_of_the_metrics() {
        for (name, expected) in [
            ("seconds/update", "s"),
            ("background/save_seconds", "s"),
            ("samples_per_second", "samples/s"),
            ("composition/clip_fraction", "share"),
            ("parity/share_dark", "share"),
            ("preference/reward_mean", ""),
        ] {
            assert_eq!(unit(name), expected, "{name}");
        }
    }
}
