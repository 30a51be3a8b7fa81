//! Runs in other ways than the embedded experiment's: every ratio a first one, adapters, bf16. Everything that should be
//! equal is compared bit for bit.

mod common;

use common::runs::{assert_same_run, train};
use rldiff::telemetry::{read_metrics, RunFiles};

/// Every timestep comes first sooner or later; none of them may have a ratio other than 1 before its update.
#[test]
fn the_first_ratio_is_one_at_every_timestep() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let settings =
        ["run.iterations=12", "method.timesteps=1", "method.max_sensitivity=0.0", "update.learning_rate=1e-3"];
    train(1, &out, &settings, &[]);
    let mut seen = std::collections::BTreeSet::new();
    for metrics in read_metrics(&RunFiles::new(&out).metrics()).unwrap() {
        for (name, value) in metrics.iter().filter(|(name, _)| name.starts_with("ratio_drift")) {
            assert_eq!(value, 0.0, "{name}");
            seen.insert(name.to_string());
        }
    }
    // the total and the six timesteps
    assert_eq!(seen.len(), 7, "{seen:?}");
}

/// Without a step of the weights every ratio is a first one: all samples at all timesteps, with and without adapters.
#[test]
fn the_first_ratio_is_one_for_every_sample_and_timestep() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        "run.iterations=2",
        "method.timesteps=6",
        "method.max_sensitivity=0.0",
        "update.learning_rate=0.0",
        "pretrain.mode=off",
    ];
    let mut ratios = 0;
    for (ranks, rank_of_adapters) in [(1, "lora.rank=0"), (2, "lora.rank=2")] {
        let out = folder.path().join(rank_of_adapters);
        train(ranks, &out, &[&settings[..], &[rank_of_adapters]].concat(), &[]);
        for metrics in read_metrics(&RunFiles::new(&out).metrics()).unwrap() {
            // ½(log w)² summed over samples and timesteps: 0 only where each w is exactly 1
            for name in ["approx_kl", "ratio_drift", "clip_fraction"] {
                assert_eq!(metrics.get(name), Some(0.0), "{name} of iteration {}", metrics.iteration);
            }
            for task in ["composition", "preference"] {
                let timesteps =
                    metrics.iter().filter(|(name, _)| name.starts_with(&format!("{task}/gradient_norm/t"))).count();
                assert_eq!(timesteps, 6, "{task}");
                ratios += 4 * timesteps;
            }
        }
    }
    assert_eq!(ratios, 192);
    println!("{ratios} of {ratios} first ratios (sample, timestep) are exactly 1");
}

#[test]
fn adapters_in_bf16_resume_to_the_same_bits_at_two_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let [through, halves] = ["through", "halves"].map(|name| RunFiles::new(folder.path().join(name)));
    let settings = ["lora.rank=2", "model.compute=bf16"];
    let to = |iterations: &'static str| [&settings[..], &[iterations]].concat();
    train(1, through.root(), &to("run.iterations=4"), &[]);
    // the last iteration of a run has an evaluation, which SMALL leaves out, so the half's log is that of the whole
    train(1, halves.root(), &to("run.iterations=2"), &[]);
    train(2, halves.root(), &to("run.iterations=4"), &["--resume", "auto"]);
    assert_same_run(&through, &halves, 4);
    assert!(through.lora().exists());
}
