//! What was measured beside what the model says, and the model's prediction for more ranks.

use std::{fmt::Write, fs, path::Path};

use anyhow::{ensure, Context, Result};

use super::{
    fitted::{model_of, Model},
    measurement::{Iterations, Measurement},
    model::iteration_seconds,
    network::Sum,
    prediction::{self, strong_efficiency, sums, weak_efficiency},
};
use crate::{
    cli::bench::median,
    folders::outputs,
    telemetry::{plot_series, write_atomic, Series},
};

#[derive(clap::Args)]
pub struct Machine {
    /// Predict for the machine in this file, which has the form of the report's model.json, instead of for this one.
    #[arg(long, value_name = "FILE", requires = "report")]
    model: Option<std::path::PathBuf>,
}

/// Writes plot and model to `folder`; the text for the screen.
pub fn write(folder: &Path, machine: &Machine) -> Result<String> {
    let given = machine.model.as_ref().map(|path| read_model(path)).transpose()?;
    let measured = read(folder)?;
    let same = measured.iter().all(|m| m.config == measured[0].config);
    ensure!(same, "{} holds measurements of several configs", folder.display());
    ensure!(given.is_some() || !measured.is_empty(), "{} holds no ranks-N.json", folder.display());
    let own = measured.iter().any(|m| m.ranks > 1).then(|| model_of(&measured)).transpose()?;
    // none of these names is a user's by chance, but a file may be
    let is_plot = |bytes: &[u8]| outputs::png_has(bytes, "Title", |_| true);
    outputs::may_replace(&folder.join("model.json"), outputs::is_json_with(&["origin", "network", "sections"]))?;
    ["scaling.png", "scaling-predicted.png"]
        .iter()
        .try_for_each(|name| outputs::may_replace(&folder.join(name), is_plot))?;
    if let Some(model) = &own {
        write_atomic(&folder.join("model.json"), &serde_json::to_vec_pretty(model)?)?;
    }
    let mut text = match measured.is_empty() {
        true => String::new(),
        false => measured_table(&measured, own.as_ref())?,
    };
    if let Some(model) = given.as_ref().or(own.as_ref()) {
        text.push_str(&prediction::table(model)?);
        // measured points belong into the plot of this machine only
        let shown = if given.is_some() { &[][..] } else { &measured[..] };
        let name = if given.is_some() { "scaling-predicted.png" } else { "scaling.png" };
        plot(&folder.join(name), model, shown)?;
        writeln!(text, "\nplot in {}", folder.join(name).display())?;
    } else {
        text.push_str("\nno prediction: the network's speed needs a measurement on 2 ranks or more, or --model\n");
    }
    Ok(text)
}

fn read(folder: &Path) -> Result<Vec<Measurement>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut measured: Vec<Measurement> = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ranks-") && name.ends_with(".json") {
            let text = fs::read(&path).with_context(|| path.display().to_string())?;
            measured.push(serde_json::from_slice(&text).with_context(|| path.display().to_string())?);
        }
    }
    measured.sort_by_key(|m| m.ranks);
    Ok(measured)
}

fn read_model(path: &Path) -> Result<Model> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

pub fn one_line(m: &Measurement) -> String {
    let of = |name: &str, i: &Iterations| format!("{name} {:.3} s ({} samples)", median(i.seconds.clone()), i.samples);
    let strong = m.strong.as_ref().map_or("strong: the ranks cannot share the lanes".into(), |i| of("strong", i));
    let largest = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    format!(
        "{} ranks: {}, {strong}; start {:.1} s (slowest {:.1} s), {:.0} MB per rank",
        m.ranks,
        of("weak", &m.weak),
        median(m.start_up_seconds.clone()),
        largest(&m.start_up_seconds),
        median(m.private_bytes.iter().map(|&b| b as f64).collect()) / 1e6,
    )
}

fn measured_table(measured: &[Measurement], model: Option<&Model>) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "measured: {}", measured[0].config)?;
    writeln!(
        text,
        "{:<7} {:>6} {:>9} {:>10} {:>10} {:>10} {:>7}   {:>8} {:>9}",
        "scaling", "ranks", "seconds", "samples/s", "efficiency", "predicted", "off by", "start, s", "MB/rank"
    )?;
    let (strong, weak): (Select, Select) = (|m| m.strong.as_ref(), |m| Some(&m.weak));
    for (name, select) in [("strong", strong), ("weak", weak)] {
        let base = measured.iter().find(|m| m.ranks == 1).and_then(select).map(rate);
        for m in measured {
            let Some(i) = select(m) else { continue };
            let seconds = median(i.seconds.clone());
            let efficiency = base.map_or("-".into(), |base| format!("{:.3}", rate(i) / (base * m.ranks as f64)));
            let prediction = model.filter(|_| m.ranks.is_power_of_two());
            // as the network was fitted
            let sum = match m.gpu {
                None => Sum::Halving,
                Some(_) => Sum::TwoLevels,
            };
            let predicted = prediction.map(|model| {
                let lanes = i.lanes_per_rank as f64;
                iteration_seconds(&model.sections, &model.network, sum, m.ranks, lanes)
            });
            writeln!(
                text,
                "{name:<7} {:>6} {seconds:>9.4} {:>10.2} {efficiency:>10} {:>10} {:>7}   {:>8.1} {:>9.0}",
                m.ranks,
                rate(i),
                predicted.map_or("-".into(), |p| format!("{p:.4}")),
                predicted.map_or("-".into(), |p| format!("{:+.1}%", 100.0 * (p / seconds - 1.0))),
                median(m.start_up_seconds.clone()),
                median(m.private_bytes.iter().map(|&b| b as f64).collect()) / 1e6,
            )?;
        }
    }
    Ok(text)
}

type Select = fn(&Measurement) -> Option<&Iterations>;

/// Samples per second.
fn rate(iterations: &Iterations) -> f64 {
    iterations.samples as f64 / median(iterations.seconds.clone())
}

fn plot(path: &Path, model: &Model, measured: &[Measurement]) -> Result<()> {
    let x = |ranks: usize| (ranks as f64).log2();
    let powers = || (0..=10).map(|k| 1usize << k);
    let predicted = |label: &str, dashed, efficiency: &dyn Fn(usize) -> Option<f64>| Series {
        label: label.into(),
        points: powers().filter_map(|ranks| Some((x(ranks), efficiency(ranks)?))).collect(),
        dashed,
    };
    let [(first, sum), (second, other)] = sums(model);
    let mut series = vec![
        predicted(&format!("weak, {first}"), false, &|n| Some(weak_efficiency(model, sum, n))),
        predicted(&format!("weak, {second}"), true, &|n| Some(weak_efficiency(model, other, n))),
        predicted(&format!("strong, {first}"), false, &|n| strong_efficiency(model, sum, n)),
    ];
    let (strong, weak): (Select, Select) = (|m| m.strong.as_ref(), |m| Some(&m.weak));
    for (label, select) in [("weak, measured", weak), ("strong, measured", strong)] {
        let base = measured.iter().find(|m| m.ranks == 1).and_then(select).map(rate);
        let point = |m: &Measurement| Some((x(m.ranks), rate(select(m)?) / (base? * m.ranks as f64)));
        let points: Vec<_> = measured.iter().filter_map(point).collect();
        if !points.is_empty() {
            series.push(Series { label: label.into(), points, dashed: true });
        }
    }
    plot_series(path, "Scaling", "log2 of the number of ranks", "efficiency", &series)
}

#[cfg(test)]
mod tests {
    use super::{super::fitted::tests::measurement, *};

    #[test]
    fn the_report_holds_both_tables_and_draws() {
        let folder = tempfile::tempdir().unwrap();
        for ranks in [1, 2] {
            let path = folder.path().join(format!("ranks-{ranks:04}.json"));
            fs::write(path, serde_json::to_vec(&measurement(ranks)).unwrap()).unwrap();
        }
        let text = write(folder.path(), &Machine { model: None }).unwrap();
        assert_eq!(text.matches("strong ").count() + text.matches("weak ").count(), 2 + 2 + 2, "{text}");
        assert!(text.lines().any(|line| line.trim_start().starts_with("1024 ")), "{text}");
        let model = folder.path().join("model.json");
        assert!(folder.path().join("scaling.png").is_file() && model.is_file());
        let again = write(folder.path(), &Machine { model: Some(model) }).unwrap();
        assert_eq!(text.replace("scaling.png", "scaling-predicted.png"), again);
        // a machine alone, where nothing was measured
        let empty = tempfile::tempdir().unwrap();
        fs::copy(folder.path().join("model.json"), empty.path().join("other.json")).unwrap();
        let alone = write(empty.path(), &Machine { model: Some(empty.path().join("other.json")) }).unwrap();
        assert!(alone.starts_with("\npredicted: ") && empty.path().join("scaling-predicted.png").is_file(), "{alone}");

        fs::remove_file(folder.path().join("ranks-0002.json")).unwrap();
        assert!(write(folder.path(), &Machine { model: None }).unwrap().contains("no prediction"));
        fs::remove_file(folder.path().join("ranks-0001.json")).unwrap();
        assert!(write(folder.path(), &Machine { model: None }).unwrap_err().to_string().contains("no ranks-N.json"));
    }
}
