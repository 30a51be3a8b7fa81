//! What was measured beside what the model says, and the model's prediction for more ranks.

use std::{fmt::Write, fs, path::Path};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    measurement::{Iterations, MeasuredSection, Measurement},
    model::{fit_network, iteration_seconds, Network, Section, Sum},
};
use crate::{
    cli::bench::median,
    folders::outputs,
    telemetry::{plot_series, write_atomic, Series},
};

/// Numbers of ranks that are predicted.
const PREDICTED: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 512, 1024];

#[derive(clap::Args)]
pub struct Machine {
    /// Predict for the machine in this file, which has the form of the report's model.json, instead of for this one.
    #[arg(long, value_name = "FILE", requires = "report")]
    model: Option<std::path::PathBuf>,
}

/// A machine and a recipe: all that a prediction needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Where the numbers are from.
    pub origin: String,
    /// Lanes of the batch that ranks share (strong scaling).
    pub lanes: usize,
    /// Lanes of each rank where the batch grows (weak scaling).
    pub lanes_per_rank: usize,
    pub network: Network,
    pub sections: Vec<Section>,
}

/// Writes plot and model to `folder`; the text for the screen.
pub fn write(folder: &Path, machine: &Machine) -> Result<String> {
    let measured = read(folder)?;
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
    let mut text = measured_table(&measured, own.as_ref())?;
    let given = machine.model.as_ref().map(|path| read_model(path)).transpose()?;
    if let Some(model) = given.as_ref().or(own.as_ref()) {
        text.push_str(&predicted_table(model)?);
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
    ensure!(!measured.is_empty(), "{} holds no ranks-N.json", folder.display());
    let same = measured.iter().all(|m| m.config == measured[0].config);
    ensure!(same, "{} holds measurements of several configs", folder.display());
    Ok(measured)
}

fn read_model(path: &Path) -> Result<Model> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&text).with_context(|| path.display().to_string())
}

/// Work from one rank, which no other disturbs; spread and network from the smallest number of ranks above one.
fn model_of(measured: &[Measurement]) -> Result<Model> {
    let alone = measured.iter().find(|m| m.ranks == 1).context("there is no measurement on one rank")?;
    let strong = alone.strong.as_ref().context("one rank shares every batch")?;
    let several = measured.iter().find(|m| m.ranks > 1).context("there is no measurement on several ranks")?;
    let counts = [strong.sections.len(), alone.weak.sections.len(), several.weak.sections.len()];
    ensure!(counts.iter().all(|&c| c == counts[0]), "the measurements differ in their collective operations");
    let sections = strong.sections.iter().zip(&alone.weak.sections).zip(&several.weak.sections);
    let lanes = (alone.weak.lanes_per_rank as f64, strong.lanes_per_rank as f64);
    Ok(Model {
        origin: format!("{}: work measured on 1 rank, spread and network on {} ranks", alone.config, several.ranks),
        lanes: strong.lanes_per_rank,
        lanes_per_rank: alone.weak.lanes_per_rank,
        network: fit_network(
            several.ranks,
            several.empty_sum_seconds,
            several.gradient_bytes as f64,
            several.gradient_sum_seconds,
        ),
        sections: sections.map(|((whole, one), among)| section(whole, one, among, lanes)).collect(),
    })
}

/// The straight line through the work at two numbers of lanes; both its parts are at least 0.
fn section(whole: &MeasuredSection, one: &MeasuredSection, among: &MeasuredSection, lanes: (f64, f64)) -> Section {
    let (few, many) = lanes;
    let slope = if many > few { (whole.work_seconds - one.work_seconds) / (many - few) } else { f64::INFINITY };
    let seconds_per_lane = slope.clamp(0.0, whole.work_seconds / many);
    Section {
        operation: whole.operation,
        bytes: one.bytes,
        fixed_seconds: whole.work_seconds - seconds_per_lane * many,
        seconds_per_lane,
        spread: among.work_deviation / among.work_seconds.max(f64::MIN_POSITIVE),
    }
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
            let predicted = prediction.map(|model| {
                let lanes = i.lanes_per_rank as f64;
                iteration_seconds(&model.sections, model.network, Sum::Halving, m.ranks, lanes)
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

/// Weak: the same work per rank. Strong: the whole batch shared, up to one lane per rank.
fn weak_efficiency(model: &Model, sum: Sum, ranks: usize) -> f64 {
    let seconds = |n| iteration_seconds(&model.sections, model.network, sum, n, model.lanes_per_rank as f64);
    seconds(1) / seconds(ranks)
}

fn strong_efficiency(model: &Model, sum: Sum, ranks: usize) -> Option<f64> {
    let seconds = |n| iteration_seconds(&model.sections, model.network, sum, n, model.lanes as f64 / n as f64);
    (model.lanes % ranks == 0).then(|| seconds(1) / (ranks as f64 * seconds(ranks)))
}

fn predicted_table(model: &Model) -> Result<String> {
    let mut text = String::new();
    let Network { latency, bandwidth } = model.network;
    let bytes = model.sections.iter().map(|s| s.bytes).fold(0.0, f64::max);
    writeln!(text, "\npredicted: {}", model.origin)?;
    writeln!(
        text,
        "latency {:.1} µs, bandwidth {:.2} GB/s, largest sum {:.1} MB, {} meetings of all ranks per iteration",
        latency * 1e6,
        bandwidth / 1e9,
        bytes / 1e6,
        model.sections.len()
    )?;
    writeln!(
        text,
        "{:>6}  {:>12} {:>10} {:>10}   {:>16} {:>10}",
        "ranks",
        format!("weak ({}/rank)", model.lanes_per_rank),
        "halving",
        "ring",
        format!("strong ({} lanes)", model.lanes),
        "halving"
    )?;
    for ranks in PREDICTED {
        let lanes = model.lanes_per_rank as f64;
        let seconds = iteration_seconds(&model.sections, model.network, Sum::Halving, ranks, lanes);
        let shared = model.lanes as f64 / ranks as f64;
        let strong = strong_efficiency(model, Sum::Halving, ranks);
        let strong_seconds =
            strong.map(|_| iteration_seconds(&model.sections, model.network, Sum::Halving, ranks, shared));
        writeln!(
            text,
            "{ranks:>6}  {:>12} {:>10.3} {:>10.3}   {:>16} {:>10}",
            format!("{seconds:.3} s"),
            weak_efficiency(model, Sum::Halving, ranks),
            weak_efficiency(model, Sum::Ring, ranks),
            strong_seconds.map_or("-".into(), |s| format!("{s:.3} s")),
            strong.map_or("-".into(), |e| format!("{e:.3}")),
        )?;
    }
    Ok(text)
}

fn plot(path: &Path, model: &Model, measured: &[Measurement]) -> Result<()> {
    let x = |ranks: usize| (ranks as f64).log2();
    let powers = || (0..=10).map(|k| 1usize << k);
    let predicted = |label: &str, dashed, efficiency: &dyn Fn(usize) -> Option<f64>| Series {
        label: label.into(),
        points: powers().filter_map(|ranks| Some((x(ranks), efficiency(ranks)?))).collect(),
        dashed,
    };
    let mut series = vec![
        predicted("weak", false, &|n| Some(weak_efficiency(model, Sum::Halving, n))),
        predicted("weak, ring", true, &|n| Some(weak_efficiency(model, Sum::Ring, n))),
        predicted("strong", false, &|n| strong_efficiency(model, Sum::Halving, n)),
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
    use super::*;
    use crate::comm::Operation;

    fn measured(work_seconds: f64) -> MeasuredSection {
        MeasuredSection {
            operation: Operation::Sum,
            bytes: 8e6,
            work_seconds,
            work_deviation: 0.1 * work_seconds,
            operation_seconds: 0.0,
        }
    }

    /// A machine of known parts: 0.2 s + 0.5 s per lane, α = 10 µs, β = 1 GB/s.
    fn measurement(ranks: usize) -> Measurement {
        let network = Network { latency: 1e-5, bandwidth: 1e9 };
        let sum = |bytes| super::super::model::operation_seconds(Operation::Sum, bytes, network, Sum::Halving, ranks);
        let iterations = |lanes: usize| Iterations {
            lanes_per_rank: lanes,
            samples: 16 * lanes * ranks,
            seconds: vec![0.2 + 0.5 * lanes as f64 + sum(8e6)],
            sections: vec![measured(0.2 + 0.5 * lanes as f64)],
        };
        Measurement {
            config: "test".into(),
            ranks,
            threads: 1,
            strong: Some(iterations(8 / ranks)),
            weak: iterations(1),
            empty_sum_seconds: sum(0.0),
            gradient_sum_seconds: sum(8e6),
            gradient_bytes: 8_000_000,
            start_up_seconds: vec![1.0; ranks],
            private_bytes: vec![70_000_000; ranks],
        }
    }

    #[test]
    fn the_parts_of_the_work_and_the_network_are_found_again() {
        let model = model_of(&[measurement(1), measurement(2)]).unwrap();
        let s = &model.sections[0];
        assert!((s.fixed_seconds - 0.2).abs() < 1e-12 && (s.seconds_per_lane - 0.5).abs() < 1e-12, "{s:?}");
        assert!((s.spread - 0.1).abs() < 1e-12);
        assert!((model.network.bandwidth / 1e9 - 1.0).abs() < 1e-9 && (model.network.latency - 1e-5).abs() < 1e-12);
        assert_eq!((model.lanes, model.lanes_per_rank), (8, 1));
        // 0.2 s of 4.2 s are not shared: 8 ranks × 0.7 s, and stragglers on top
        let strong = strong_efficiency(&model, Sum::Halving, 8).unwrap();
        assert!(strong < 4.2 / (8.0 * 0.7) && strong > 0.6, "{strong}");
        assert!(strong_efficiency(&model, Sum::Halving, 16).is_none());
    }

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

        fs::remove_file(folder.path().join("ranks-0002.json")).unwrap();
        assert!(write(folder.path(), &Machine { model: None }).unwrap().contains("no prediction"));
        fs::remove_file(folder.path().join("ranks-0001.json")).unwrap();
        assert!(write(folder.path(), &Machine { model: None }).unwrap_err().to_string().contains("no ranks-N.json"));
    }
}
