//! What stands on the page, in its order.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{
    charts, config_difference,
    html::{self, escape, image, image_of_png, table},
    run_data::RunData,
    svg::{Line, Look},
};
use crate::{
    excerpt::{one_line, IN_MESSAGES},
    run::no_signal,
    telemetry::{names, picture_size, Estimate, Picture, Reason},
};

/// Pictures of samples are made smaller than this, in pixels.
const LARGEST: usize = 256;

pub struct Section {
    pub id: &'static str,
    pub title: &'static str,
    pub body: String,
}

pub fn all(runs: &[RunData]) -> Result<Vec<Section>> {
    let section = |id, title, body| Section { id, title, body };
    let sections = vec![
        section("runs", "Runs", overview(runs)),
        section("results", "Reward on held-out prompts", results(runs)),
        section("rewards", "Reward in training", rewards(runs)),
        section("tricks", "What the reward does to the pictures", tricks(runs)),
        section("samples", "Samples in the course of training", samples(runs)?),
        section("before-after", "Before and after", before_after(runs)?),
        section("time", "Time", time(runs)),
        section("config", "Settings", config(runs)),
        section("metrics", "All metrics", metrics(runs)),
    ];
    Ok(sections.into_iter().filter(|section| !section.body.is_empty()).collect())
}

/// A run's name in its colour.
fn name(runs: &[RunData], index: usize) -> String {
    let swatch = if runs.len() > 1 { format!("<span class=\"swatch s{}\"></span>", index % 6) } else { String::new() };
    format!("{swatch}{}", escape(&runs[index].name))
}

/// Names of the tasks of all runs, in the order in which they appear.
fn tasks(runs: &[RunData]) -> Vec<String> {
    let mut tasks: Vec<String> = Vec::new();
    for task in runs.iter().flat_map(RunData::tasks) {
        if !tasks.contains(&task) {
            tasks.push(task);
        }
    }
    tasks
}

fn number(value: f64) -> String {
    match value.abs() {
        size if size.is_nan() => "–".to_owned(),
        0.0 => "0".to_owned(),
        size if !(1e-3..1e5).contains(&size) => format!("{value:.2e}"),
        size => format!("{value:.*}", if size < 10.0 { 3 } else { 1 }),
    }
    .replace('-', "−")
}

fn overview(runs: &[RunData]) -> String {
    let dash = || "–".to_owned();
    let rows: Vec<Vec<String>> = (0..runs.len())
        .map(|i| {
            let run = &runs[i];
            let summary = run.summary.as_ref();
            let done = run.history.last().map_or(0, |m| m.iteration + 1);
            let planned = run.setting("run", "iterations").unwrap_or_default();
            let saturated =
                summary.and_then(|s| s.ended.as_ref()).is_some_and(|ended| ended.reason == Reason::Saturated);
            let state = match summary {
                None => " (not finished)",
                Some(_) if saturated => " (saturated)",
                Some(_) => "",
            };
            vec![
                name(runs, i),
                format!("<code>{}</code>", escape(&run.folder.display().to_string())),
                format!("{done} of {}{state}", escape(&planned)),
                run.setting("run", "seed").map_or(dash(), |seed| escape(&seed)),
                summary.map_or(dash(), |s| s.world_size.to_string()),
                summary.map_or(dash(), |s| number(s.samples_per_second)),
                summary.map_or(dash(), |s| number(s.wall_seconds)),
                summary.map_or(dash(), |s| number(s.ratio_drift)),
            ]
        })
        .collect();
    let heading =
        ["run", "folder", "iterations", "seed", "ranks", "samples/s", "seconds in all", "largest ratio drift"];
    table(&heading, &rows) + &endings(runs) + &without_signal(runs)
}

/// Why runs ended before their last iteration, and which have diverged.
fn endings(runs: &[RunData]) -> String {
    let of_run = |run: &RunData| {
        let of = if runs.len() > 1 { format!("{}: ", run.name) } else { String::new() };
        let ended = run.summary.iter().filter_map(|s| s.ended.as_ref()).filter(|e| e.reason == Reason::Saturated);
        let ended = ended.map(|ended| format!("<p>{}</p>\n", escape(&format!("{of}{}", ended.words))));
        let fallen = run.fallen_back();
        let fallen =
            fallen.iter().map(|fallen| format!("<p class=\"warning\">{}</p>\n", escape(&format!("{of}{fallen}"))));
        ended.chain(fallen).collect::<String>()
    };
    runs.iter().map(of_run).collect()
}

/// Where rewards taught nothing.
fn without_signal(runs: &[RunData]) -> String {
    let of_run = |run: &RunData| {
        let of = if runs.len() > 1 { format!("{}: ", run.name) } else { String::new() };
        let line = |found: &no_signal::InAll| format!("<p class=\"warning\">{}</p>\n", escape(&format!("{of}{found}")));
        no_signal::in_all(&run.history).iter().map(line).collect::<String>()
    };
    runs.iter().map(of_run).collect()
}

fn results(runs: &[RunData]) -> String {
    let estimate = |e: &Estimate| format!("{} ± {}", number(e.mean), number(e.stderr));
    let mut rows = Vec::new();
    for task in tasks(runs) {
        for (i, run) in runs.iter().enumerate() {
            let of_task = run.summary.iter().flat_map(|s| &s.tasks).find(|t| t.name == task);
            if let Some(t) = of_task {
                let errors = t.standard_errors();
                rows.push(vec![
                    escape(&task),
                    name(runs, i),
                    estimate(&t.base),
                    estimate(&t.tuned),
                    format!("<strong>{}</strong>", estimate(&t.difference)),
                    if errors.is_finite() { number(errors) } else { "–".to_owned() },
                ]);
            }
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let heading = ["reward", "run", "base", "tuned", "difference", "in standard errors"];
    format!("<p>± one standard error; the difference pair by pair over the same noise.</p>\n{}", table(&heading, &rows))
}

fn grid(charts: impl Iterator<Item = String>) -> String {
    let charts: String = charts.collect();
    if charts.is_empty() {
        return charts;
    }
    format!("<div class=\"charts\">\n{charts}</div>\n")
}

fn rewards(runs: &[RunData]) -> String {
    let charts =
        grid(tasks(runs).iter().map(|task| charts::metric(runs, &names::reward_mean(task), task, &levels(runs, task))));
    let words =
        "<p>Mean reward of each iteration's batch (thin) with its running mean (thick). Dashed: the base model on \
                 held-out prompts. Point at a curve, or focus it and use the arrow keys, for its values.</p>\n";
    if charts.is_empty() {
        charts
    } else {
        format!("{words}{charts}")
    }
}

/// The base model's level; one, since it is the same model for runs that can be compared.
fn levels(runs: &[RunData], task: &str) -> Vec<Line> {
    let of_run = |run: &RunData| run.summary.as_ref()?.tasks.iter().find(|t| t.name == task).map(|t| t.base.mean);
    let last = runs.iter().filter_map(|run| Some(run.history.last()?.iteration + 1)).max().unwrap_or(1) as f64;
    let first = runs.iter().find_map(of_run).filter(|level| level.is_finite());
    let line = |level| Line {
        label: "base".to_owned(),
        color: 5,
        look: Look::Level,
        points: vec![(0.0, level), (last, level)],
    };
    first.map(line).into_iter().collect()
}

fn tricks(runs: &[RunData]) -> String {
    let rows: String = tasks(runs)
        .iter()
        .map(|task| {
            let charts = grid(
                [
                    (names::EVALUATION_REWARD, "reward"),
                    (names::HIGH_FREQUENCY, "fine detail"),
                    (names::DIVERSITY, "diversity"),
                ]
                .into_iter()
                .map(|(metric, title)| charts::evaluations(runs, task, metric, title)),
            );
            if charts.is_empty() {
                charts
            } else {
                format!("<h3>{}</h3>\n{charts}", escape(task))
            }
        })
        .collect();
    if rows.is_empty() {
        return "<p>There were no evaluations in the course of training (<code>evaluation.every</code>).</p>\n"
            .to_owned();
    }
    format!(
        "<p>On a few held-out prompts, always with the same noise; iteration 0 is the model before training. Fine detail is the \
         share of a picture's spectral energy above a quarter of a cycle per pixel: 0 for one colour, 0.80 for white noise. \
         Diversity is the mean root-mean-square distance between two pictures of one prompt. A reward that rises while fine \
         detail or diversity leave the model's own is being gained by a trick: look at the samples.</p>\n{rows}"
    )
}

fn samples(runs: &[RunData]) -> Result<String> {
    let mut body = String::new();
    for task in tasks(runs) {
        for (i, run) in runs.iter().enumerate() {
            let Some((_, sheets)) = run.samples.iter().find(|(name, _)| *name == task) else { continue };
            let mut heading = vec!["prompt".to_owned()];
            heading.extend(
                sheets.iter().map(|(done, _)| if *done == 0 { "base".to_owned() } else { format!("after {done}") }),
            );
            let prompts: Vec<&str> = sheets[0].1.rows.iter().map(|row| row.caption.as_str()).collect();
            let mut rows = Vec::new();
            for (r, prompt) in prompts.iter().enumerate() {
                let mut cells = vec![html::prompt(prompt)];
                for (done, sheet) in sheets {
                    let row = sheet.rows.get(r).filter(|row| row.caption == *prompt);
                    let alt = format!("{}, after {done} iterations", one_line(prompt, IN_MESSAGES));
                    cells.push(row.map(|row| pictures_of_prompt(&row.pictures, &alt)).transpose()?.unwrap_or_default());
                }
                rows.push(cells);
            }
            let of_run = if runs.len() > 1 { format!(": {}", name(runs, i)) } else { String::new() };
            let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
            body.push_str(&format!(
                "<h3>{}{of_run}</h3>\n<div class=\"sheet\">{}</div>",
                escape(&task),
                table(&heading, &rows)
            ));
        }
    }
    if !body.is_empty() {
        body.insert_str(
            0,
            "<p>The same prompts and the same noise at every evaluation; of each prompt several pictures, which become \
             alike where a reward is gained at the cost of diversity.</p>\n",
        );
    }
    Ok(body)
}

/// Pictures of one prompt from different noise, in two columns where there are several, which are half as large then.
fn pictures_of_prompt(pictures: &[Picture], alt: &str) -> Result<String> {
    let (class, largest) = if pictures.len() > 1 { ("several", LARGEST / 2) } else { ("one", LARGEST) };
    let images = pictures.iter().enumerate().map(|(i, picture)| {
        let smaller = picture.reduced(picture.width().max(picture.height()).div_ceil(largest));
        image(&smaller, &format!("{alt}, noise {}", i + 1))
    });
    Ok(format!("<div class=\"{class}\">{}</div>", images.collect::<Result<String>>()?))
}

fn before_after(runs: &[RunData]) -> Result<String> {
    let mut body = String::new();
    for (i, run) in runs.iter().enumerate() {
        let Some(png) = &run.before_after else { continue };
        let heading = if runs.len() > 1 { format!("<h3>{}</h3>\n", name(runs, i)) } else { String::new() };
        let alt = format!("{}: held-out prompts drawn by the base and the tuned model from the same noise", run.name);
        let picture = image_of_png(png, picture_size(png)?, &alt);
        body.push_str(&format!("{heading}<div class=\"wide\">{picture}</div>\n"));
    }
    Ok(body)
}

/// Mean seconds per iteration of each stage.
fn stages(run: &RunData) -> BTreeMap<&str, f64> {
    let mut stages = BTreeMap::new();
    for (metric, value) in run.history.iter().flat_map(|m| m.iter()) {
        if let Some(stage) = metric.strip_prefix("seconds/").filter(|stage| *stage != "iteration" && value.is_finite())
        {
            *stages.entry(stage).or_insert(0.0) += value / run.history.len() as f64;
        }
    }
    stages
}

fn time(runs: &[RunData]) -> String {
    let of_runs: Vec<_> = runs.iter().map(stages).collect();
    let mut stage_names: Vec<&str> = of_runs.iter().flat_map(|stages| stages.keys().copied()).collect();
    stage_names.sort_unstable();
    stage_names.dedup();
    let longest = of_runs.iter().map(|stages| stages.values().sum::<f64>()).fold(0.0, f64::max);
    let mut bars = String::new();
    let mut rows = Vec::new();
    for (i, stages) in of_runs.iter().enumerate() {
        let total: f64 = stages.values().sum();
        let mut parts = String::new();
        let mut from = 0.0;
        for (s, stage) in stage_names.iter().enumerate() {
            let seconds = stages.get(stage).copied().unwrap_or(0.0);
            let width = 1000.0 * seconds / longest.max(f64::MIN_POSITIVE);
            parts.push_str(&format!(
                "<rect class=\"f{}\" x=\"{from:.1}\" y=\"0\" width=\"{width:.1}\" height=\"22\"><title>{}: {} s</title></rect>",
                s % 6,
                escape(stage),
                number(seconds)
            ));
            from += width;
        }
        bars.push_str(&format!(
            "<div class=\"bar\"><span>{}</span><svg viewBox=\"0 0 1000 22\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{} s per iteration by stage; numbers below\">{parts}</svg></div>\n",
            name(runs, i),
            number(total)
        ));
        let mut cells = vec![name(runs, i)];
        cells.extend(stage_names.iter().map(|stage| match stages.get(stage) {
            Some(seconds) => format!("{} ({:.0} %)", number(*seconds), 100.0 * seconds / total),
            None => "–".to_owned(),
        }));
        cells.push(number(total));
        rows.push(cells);
    }
    let swatch =
        |(s, stage): (usize, &&str)| format!("<li><span class=\"swatch b{}\"></span>{}</li>", s % 6, escape(stage));
    let legend: String = stage_names.iter().enumerate().map(swatch).collect();
    let mut heading = vec!["run"];
    heading.extend(&stage_names);
    heading.push("all stages");
    let charts = grid(
        [
            (names::SAMPLES_PER_SECOND, "throughput"),
            (names::SECONDS, "seconds per iteration"),
            (names::TFLOPS, "achieved"),
        ]
        .into_iter()
        .map(|(metric, title)| charts::metric(runs, metric, title, &[])),
    );
    format!(
        "<p>Mean seconds per iteration of each stage on rank 0.</p>\n<ul class=\"legend\">{legend}</ul>\n{bars}{}{charts}",
        table(&heading, &rows)
    )
}

fn config(runs: &[RunData]) -> String {
    let mut body = String::new();
    if runs.len() > 1 {
        let differences = config_difference::differences(&runs.iter().map(|run| &run.config).collect::<Vec<_>>());
        if differences.is_empty() {
            body.push_str("<p>All runs have the same settings.</p>\n");
        } else {
            let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
            let heading: Vec<&str> = std::iter::once("setting that differs").chain(names).collect();
            let cell = |value: Option<String>| {
                value.map_or("–".to_owned(), |value| format!("<code>{}</code>", escape(&value)))
            };
            let rows: Vec<Vec<String>> = differences
                .into_iter()
                .map(|(key, values)| {
                    std::iter::once(format!("<code>{}</code>", escape(&key)))
                        .chain(values.into_iter().map(cell))
                        .collect()
                })
                .collect();
            body.push_str(&table(&heading, &rows));
        }
    }
    for (i, run) in runs.iter().enumerate() {
        body.push_str(&format!(
            "<details><summary>config.toml of {}</summary><pre>{}</pre></details>\n",
            name(runs, i),
            escape(&run.config_text)
        ));
    }
    body
}

fn metrics(runs: &[RunData]) -> String {
    // by what stands before the first slash
    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for (metric, _) in runs.iter().flat_map(|run| &run.history).flat_map(|m| m.iter()) {
        let group = metric.split_once('/').map_or("all tasks", |(group, _)| group);
        let at = groups.iter().position(|(name, _)| name == group).unwrap_or_else(|| {
            groups.push((group.to_owned(), Vec::new()));
            groups.len() - 1
        });
        if !groups[at].1.iter().any(|known| known == metric) {
            groups[at].1.push(metric.to_owned());
        }
    }
    let group = |(group, metrics): &(String, Vec<String>)| {
        let charts = grid(metrics.iter().map(|metric| charts::metric(runs, metric, metric, &[])));
        format!(
            "<details><summary>{} <span class=\"unit\">{} metrics</span></summary>\n{charts}</details>\n",
            escape(group),
            metrics.len()
        )
    };
    groups.iter().map(group).collect()
}
