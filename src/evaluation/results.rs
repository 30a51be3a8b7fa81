//! What an evaluation found, and the files and tables that say it.

use std::{collections::BTreeMap, fmt::Write, path::Path};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::set::picture_file;
use crate::{
    config::{eval::is_evaluation, EvalConfig},
    folders::{
        can_be_folder, can_take,
        outputs::{is_json_with, is_own_png, may_replace, png_has},
    },
    telemetry::{image_grid, mosaic, number, read_png, save_png, write_atomic, Estimate, GridRow, Picture},
};

/// Values that may be no numbers: JSON gets them as text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values(pub Vec<f64>);

impl Serialize for Values {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|&value| number::to_value(value)))
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = Vec::<Value>::deserialize(deserializer)?;
        let number = |value| number::from_value(value).ok_or_else(|| serde::de::Error::custom("not a number"));
        Ok(Values(values.iter().map(number).collect::<Result<_, D::Error>>()?))
    }
}

/// A model on a set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetResult {
    pub set: String,
    /// What the values depend on.
    pub key: Value,
    pub prompts: Vec<String>,
    pub images_per_prompt: usize,
    /// Its prompts are those that are trained on, as its settings say.
    #[serde(default)]
    pub of_training: bool,
    /// By metric: one value per picture, prompt after prompt.
    pub metrics: BTreeMap<String, Values>,
    /// By `<metric>/<diagnostic>`: one per picture, or one per prompt.
    pub diagnostics: BTreeMap<String, Values>,
    /// Share of fine detail in every picture.
    pub high_frequency: Values,
    /// How different the pictures of each prompt are; none where a prompt has one.
    pub diversity: Values,
}

impl SetResult {
    /// A metric's mean of each prompt over its pictures, in the order of the prompts: what statistics are over, since
    /// pictures of one prompt are no independent draws. NaN where a value is not finite.
    pub fn units(&self, metric: &str) -> Vec<f64> {
        self.by_prompt(self.metrics.get(metric).map_or(&[][..], |values| &values.0))
    }

    /// The mean share of fine detail of each prompt.
    pub fn fine_detail(&self) -> Vec<f64> {
        self.by_prompt(&self.high_frequency.0)
    }

    fn by_prompt(&self, values: &[f64]) -> Vec<f64> {
        values
            .chunks(self.images_per_prompt)
            .map(|of_prompt| of_prompt.iter().sum::<f64>() / of_prompt.len() as f64)
            .collect()
    }

    /// Whether a metric is the parity reward, which is minus the statistical parity SP that tables show (Eq. 12).
    fn is_parity(&self, metric: &str) -> bool {
        let metrics = self.key["metrics"].as_array().into_iter().flatten();
        metrics.filter(|own| own["name"] == metric).any(|own| own["reward"]["name"] == "parity")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelResult {
    pub model: String,
    pub path: String,
    pub sets: Vec<SetResult>,
}

impl ModelResult {
    pub fn set(&self, name: &str) -> Option<&SetResult> {
        self.sets.iter().find(|set| set.set == name)
    }
}

/// A model's figures on one metric.
pub struct Figure {
    pub mean: Estimate,
    /// To the first model, prompt by prompt.
    pub difference: Option<Estimate>,
    /// Prompts with a value that is not finite; they are left out.
    pub bad: usize,
}

pub fn figure(units: &[f64], first: Option<&[f64]>) -> Figure {
    let finite: Vec<f64> = units.iter().copied().filter(|v| v.is_finite()).collect();
    let difference = first.map(|first| {
        let pairs = units.iter().zip(first).map(|(a, b)| a - b).filter(|d| d.is_finite());
        Estimate::of(&pairs.collect::<Vec<_>>())
    });
    Figure { mean: Estimate::of(&finite), difference, bad: units.len() - finite.len() }
}

/// The figures as JSON: a list of models with their sets and metrics, every prompt's value among them.
pub fn to_json(results: &[ModelResult]) -> Value {
    let models = results.iter().enumerate().map(|(i, model)| {
        let sets = model.sets.iter().map(|set| {
            let metrics = set.metrics.keys().map(|metric| {
                let units = set.units(metric);
                let first = (i > 0).then(|| results[0].set(&set.set).map(|first| first.units(metric))).flatten();
                let figure = figure(&units, first.as_deref());
                json!({
                    "metric": metric, "mean": number::to_value(figure.mean.mean),
                    "stderr": number::to_value(figure.mean.stderr), "difference_to_first": figure.difference,
                    "prompts_left_out": figure.bad, "prompts": Values(units),
                })
            });
            json!({
                "set": set.set, "images_per_prompt": set.images_per_prompt, "of_training": set.of_training, "metrics": metrics.collect::<Vec<_>>(),
                "high_frequency": Estimate::of(&set.high_frequency.0), "diversity": Estimate::of(&set.diversity.0),
            })
        });
        json!({"model": model.model, "path": model.path, "sets": sets.collect::<Vec<_>>()})
    });
    Value::Array(models.collect())
}

/// The tables, as text that is Markdown too: one for each set, a row for each model.
pub fn to_markdown(results: &[ModelResult]) -> String {
    let mut text = String::new();
    let Some(first) = results.first() else { return text };
    for set in &first.sets {
        let pictures = set.images_per_prompt;
        let of_training = if set.of_training { ", of those that are trained on" } else { "" };
        let _ = writeln!(text, "## {}: {} prompts, {pictures} each{of_training}\n", set.set, set.prompts.len());
        let metrics: Vec<&String> = set.metrics.keys().collect();
        let column = |metric: &String| match set.is_parity(metric) {
            true => format!(" {metric}: SP, lower is better | to the first |"),
            false => format!(" {metric} | to the first |"),
        };
        let head: String = metrics.iter().map(|metric| column(metric)).collect();
        let _ = writeln!(text, "| model |{head} fine detail | diversity |");
        let _ = writeln!(text, "|---|{}---|---|", "---|---|".repeat(metrics.len()));
        for (i, model) in results.iter().enumerate() {
            let Some(of_model) = model.set(&set.set) else { continue };
            let mut row = format!("| {} |", model.model);
            for metric in &metrics {
                // the paper prints SP, the reward is minus it
                let sign = if set.is_parity(metric) { -1.0 } else { 1.0 };
                let units = |of: &SetResult| of.units(metric).into_iter().map(|unit| sign * unit).collect::<Vec<_>>();
                let first = units(set);
                let f = figure(&units(of_model), (i > 0).then_some(&first));
                let left_out = if f.bad > 0 { format!(" ({} prompts left out)", f.bad) } else { String::new() };
                let _ = write!(row, " {:.4} ± {:.4}{left_out} |", f.mean.mean, f.mean.stderr);
                match f.difference {
                    Some(d) => write!(row, " {:+.4} ± {:.4} |", d.mean, d.stderr),
                    None => write!(row, " |"),
                }
                .expect("text grows");
            }
            let detail = Estimate::of(&of_model.high_frequency.0).mean;
            let diversity = if of_model.diversity.0.is_empty() {
                String::from(" ")
            } else {
                format!("{:.4}", Estimate::of(&of_model.diversity.0).mean)
            };
            let _ = writeln!(text, "{row} {detail:.4} | {diversity} |");
        }
        text.push('\n');
    }
    text
}

/// Whether the results may go to `out`: what is in their places was written by an evaluation.
///
/// # Errors
/// Names the first file that was not.
pub fn check_place(config: &EvalConfig, out: &Path) -> Result<()> {
    let of_models: Vec<String> = config.models.iter().map(|model| model.folder()).collect();
    can_take(out, |name| ["config.toml", "results.json"].contains(&name) || of_models.iter().any(|own| own == name))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    may_replace(&out.join("config.toml"), |bytes| is_evaluation(&text(bytes)))?;
    may_replace(&out.join("results.json"), is_json_with(&["model", "path", "sets"]))?;
    may_replace(&out.join("results.md"), |bytes| {
        text(bytes).starts_with("## ") && text(bytes).contains("| fine detail |")
    })?;
    // sheets had no mark once, and are written after the results
    let done = out.join("results.json").is_file();
    for set in &config.sets {
        may_replace(&out.join(format!("{}.png", set.name)), |bytes| is_own_png(bytes) || done)?;
        for model in &config.models {
            let folder = out.join(model.folder());
            let file = folder.join(format!("{}.json", set.name));
            may_replace(&file, is_json_with(&["set", "key", "prompts"]))?;
            if !file.is_file() {
                check_pictures(&folder.join(&set.name))?;
            }
        }
    }
    Ok(())
}

/// Whether the pictures of a set that was not finished are those of an evaluation.
fn check_pictures(folder: &Path) -> Result<()> {
    can_be_folder(folder)?;
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        match path.extension().map(|extension| extension.to_string_lossy().into_owned()).as_deref() {
            Some("json") => may_replace(&path, is_json_with(&["key", "first", "rewards"]))?,
            Some("png") => may_replace(&path, |bytes| png_has(bytes, "prompt", |_| true))?,
            _ => {}
        }
    }
    Ok(())
}

/// All pictures of a prompt as one, from the folder of a set: a group is seen at a glance.
pub fn read_group(folder: &Path, prompt: usize, images_per_prompt: usize) -> Result<Picture> {
    let samples = (0..images_per_prompt).map(|image| prompt * images_per_prompt + image);
    let pictures = samples.map(|sample| Ok(read_png(&picture_file(folder, sample, images_per_prompt))?.0));
    mosaic(&pictures.collect::<Result<Vec<_>>>()?)
}

/// The files of rank 0: figures, tables, sheets.
pub fn write(config: &EvalConfig, out: &Path, results: &[ModelResult]) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(&to_json(results))?;
    json.push(b'\n');
    write_atomic(&out.join("results.json"), &json)?;
    write_atomic(&out.join("results.md"), to_markdown(results).as_bytes())?;
    write_atomic(&out.join("config.toml"), toml::to_string_pretty(config)?.as_bytes())?;
    let mark = [("software".to_string(), format!("rldiff {}", crate::CODE_VERSION))];
    let names: Vec<&str> = config.models.iter().map(|model| model.name.as_str()).collect();
    for set in &results[0].sets {
        let shown = config.eval.pictures.min(set.prompts.len());
        let rows = (0..shown).map(|prompt| {
            let pictures = config.models.iter().map(|model| {
                let folder = out.join(model.folder()).join(&set.set);
                read_group(&folder, prompt, set.images_per_prompt)
            });
            Ok(GridRow { caption: set.prompts[prompt].clone(), pictures: pictures.collect::<Result<_>>()? })
        });
        let rows: Vec<GridRow> = rows.collect::<Result<_>>()?;
        if !rows.is_empty() {
            let each = set.images_per_prompt;
            let groups = if each > 1 { format!(", {each} pictures of each prompt") } else { String::new() };
            let title = format!("{}{groups}, the same noise: {}", set.set, names.join(", "));
            save_png(&out.join(format!("{}.png", set.set)), &image_grid(&title, &rows)?, &mark)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(model: &str, values: &[f64]) -> ModelResult {
        let set = SetResult {
            set: "s".into(),
            key: json!({}),
            prompts: vec!["a".into(), "b".into(), "c".into()],
            images_per_prompt: 2,
            of_training: false,
            metrics: BTreeMap::from([("m".to_string(), Values(values.to_vec()))]),
            diagnostics: BTreeMap::new(),
            high_frequency: Values(vec![0.5; 6]),
            diversity: Values(vec![0.25; 3]),
        };
        ModelResult { model: model.into(), path: "p".into(), sets: vec![set] }
    }

    #[test]
    fn statistics_are_over_prompts_and_pairs() {
        let base = result("base", &[1.0, 3.0, 4.0, 4.0, 0.0, 2.0]);
        let tuned = result("tuned", &[2.0, 4.0, 4.0, 5.0, f64::NAN, 9.0]);
        assert_eq!(base.sets[0].units("m"), [2.0, 4.0, 1.0]);
        let (first, units) = (base.sets[0].units("m"), tuned.sets[0].units("m"));
        let f = figure(&units, Some(&first));
        assert_eq!((f.bad, f.mean.mean), (1, 3.75));
        // pairs 3 − 2 and 4.5 − 4
        assert_eq!(f.difference, Some(Estimate::of(&[1.0, 0.5])));
        let markdown = to_markdown(&[base.clone(), tuned.clone()]);
        assert!(markdown.contains("## s: 3 prompts, 2 each"), "{markdown}");
        assert!(
            markdown.contains("| tuned | 3.7500 ± 0.7500 (1 prompts left out) | +0.7500 ± 0.2500 | 0.5000 | 0.2500 |"),
            "{markdown}"
        );
        // what a parity reward gives is printed as the paper's SP
        let parity = |mut model: ModelResult| {
            let set = &mut model.sets[0];
            set.key = json!({"metrics": [{"name": "m", "reward": {"name": "parity"}}]});
            set.of_training = true;
            set.metrics.get_mut("m").unwrap().0.iter_mut().for_each(|value| *value = -*value);
            model
        };
        let printed = to_markdown(&[parity(base.clone()), parity(tuned.clone())]);
        assert!(printed.starts_with("## s: 3 prompts, 2 each, of those that are trained on\n"), "{printed}");
        assert!(printed.contains("| model | m: SP, lower is better | to the first |"), "{printed}");
        assert!(printed.contains("| tuned | 3.7500 ± 0.7500 (1 prompts left out) | +0.7500 ± 0.2500 |"), "{printed}");
        let back: ModelResult = serde_json::from_str(&serde_json::to_string(&tuned).unwrap()).unwrap();
        assert!(back.sets[0].metrics["m"].0[4].is_nan());
        let json = to_json(&[base, tuned]);
        assert_eq!(json[1]["sets"][0]["metrics"][0]["difference_to_first"]["mean"], 0.75);
        assert_eq!(json[1]["sets"][0]["metrics"][0]["prompts"][2], "NaN");
    }
}
