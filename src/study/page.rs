//! The study as one self-contained page: tables, findings, curves of training, pictures from the same noise.

use anyhow::Result;

use super::{course::Course, evaluation_folder, findings::Verdict, tables::Cell, Member, Plan, Study};
use crate::{
    evaluation::{read_group, ModelResult},
    report::{
        document,
        html::{escape, image, table},
        svg::{chart, Line, Look},
        Section,
    },
    telemetry::names,
};

pub fn page(plan: &Plan, study: &Study, results: &[ModelResult]) -> Result<String> {
    let section = |id, title, body| Section { id, title, body };
    let sections = [
        section("findings", "The paper's findings", findings(study)),
        section("tables", "Tables", tables(study)),
        section("curves", "Curves of training", curves(plan)?),
        section("pictures", "The same noise", pictures(plan, results)?),
    ];
    Ok(document(&study.name, &sections))
}

fn findings(study: &Study) -> String {
    let mark = |verdict: Verdict| match verdict {
        Verdict::NotReproduced => format!("<strong>{}</strong>", verdict.words()),
        verdict => verdict.words().to_string(),
    };
    let rows: Vec<Vec<String>> = study
        .findings
        .iter()
        .map(|f| vec![escape(&f.claim), escape(&f.paper), mark(f.verdict), escape(&f.evidence)])
        .collect();
    let seeds: Vec<String> = study.seeds.iter().map(|seed| seed.to_string()).collect();
    format!(
        "<p>Seeds {}. All models draw the same prompts from the same noise. Intervals are 95 %, from draws of prompts and seeds \
         with replacement; what few seeds say of the seeds' share in them is little.</p>\n<div class=\"sentences\">\n{}</div>\n",
        seeds.join(", "),
        table(&["the paper finds", "its figure", "here", "our figure"], &rows)
    )
}

fn tables(study: &Study) -> String {
    let one = |found: &super::Table| {
        let heading: Vec<&str> = found.columns.iter().map(String::as_str).collect();
        // values of several seeds below each other: beside each other they make a table too wide for a page
        let shown = |cell: &Cell| match cell {
            Cell::Text(list) => escape(list).replace(", ", ",<br>"),
            interval => escape(&interval.text()),
        };
        let rows: Vec<Vec<String>> = found.rows.iter().map(|row| row.iter().map(shown).collect()).collect();
        format!("<h3>{}</h3>\n<p>{}</p>\n{}", escape(&found.title), escape(&found.note), table(&heading, &rows))
    };
    study.tables.iter().map(one).collect()
}

/// For each reward two charts, each with a line per run and seed: the evaluations over the time, and the reward of what was
/// sampled over the iterations.
fn curves(plan: &Plan) -> Result<String> {
    let courses = plan
        .members
        .iter()
        .map(|member| Ok((member, Course::read(member)?)))
        .collect::<Result<Vec<(&Member, Course)>>>()?;
    let color = |member: &Member| plan.config.runs.iter().position(|run| run.name == member.name).unwrap_or(0);
    let mut tasks: Vec<&str> = Vec::new();
    for (_, task) in plan.members.iter().flat_map(|member| member.config.trained_tasks()) {
        if !tasks.contains(&task.name.as_str()) {
            tasks.push(&task.name);
        }
    }
    let mut charts = String::new();
    for task in tasks {
        let trained = || courses.iter().filter(|(m, _)| m.config.trained_tasks().any(|(_, t)| t.name == task));
        let line = |member: &Member, look: Look, points: Vec<(f64, f64)>| Line {
            label: member.name.clone(),
            color: color(member),
            look,
            points,
        };
        let evaluated: Vec<Line> = trained()
            .map(|(member, course)| {
                let points = course.evaluations(task).into_iter().map(|(_, seconds, reward)| (seconds, reward));
                line(member, Look::Dots, points.collect())
            })
            .collect();
        let name = names::reward_mean(task);
        let sampled: Vec<Line> = trained()
            .map(|(member, course)| {
                let of = |m: &crate::telemetry::Metrics| Some(((m.iteration + 1) as f64, m.get(&name)?));
                line(member, Look::Main, course.history.iter().filter_map(of).collect())
            })
            .collect();
        charts.push_str(&chart(&format!("{task}: a few held-out prompts"), "", "seconds of training", &evaluated));
        charts.push_str(&chart(&format!("{task}: sampled in training"), "", "iteration", &sampled));
    }
    Ok(format!(
        "<p>A line for each seed. In the course of training a run draws as its own settings say (DRaFT without noise, ReFL's \
         training without guidance where its settings say so), so curves of different methods begin at different heights; the \
         tables compare all models with one sampler.</p>\n<div class=\"charts\">{charts}</div>\n"
    ))
}

/// For each set its first prompts with all their pictures, a column for each run of the first seed.
fn pictures(plan: &Plan, results: &[ModelResult]) -> Result<String> {
    let seed = plan.config.study.seeds[0];
    let others = &plan.config.models;
    let wanted = |name: &str| {
        name == super::BASE || name.ends_with(&format!("-seed{seed}")) || others.iter().any(|model| model.name == name)
    };
    let shown: Vec<_> = plan.evaluation.models.iter().zip(results).filter(|(model, _)| wanted(&model.name)).collect();
    let mut html = String::new();
    for set in &results[0].sets {
        let mut heading = vec!["prompt".to_string()];
        heading.extend(shown.iter().map(|(model, _)| model.name.trim_end_matches(&format!("-seed{seed}")).to_string()));
        let mut rows = Vec::new();
        for prompt in 0..plan.evaluation.eval.pictures.min(set.prompts.len()) {
            let mut row = vec![escape(&set.prompts[prompt])];
            for (model, _) in &shown {
                let folder = evaluation_folder(&plan.out).join(model.folder()).join(&set.set);
                let group = read_group(&folder, prompt, set.images_per_prompt)?;
                row.push(image(&group, &format!("{}: {}", model.name, set.prompts[prompt]))?);
            }
            rows.push(row);
        }
        let heading: Vec<&str> = heading.iter().map(String::as_str).collect();
        let sheet = table(&heading, &rows).replacen("<div class=\"wide\">", "<div class=\"wide sheet\">", 1);
        html.push_str(&format!("<h3>{}</h3>\n{sheet}", escape(&set.set)));
    }
    Ok(html)
}
