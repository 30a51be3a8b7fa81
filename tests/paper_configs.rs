//! The paper-size experiments against the paper: Table 6, Appendix A, the two lists, and which prompts are trained on.

use std::{fs, path::Path};

use toml::Value;

fn experiment(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm").join(format!("{name}.toml"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse::<toml::Table>().unwrap().into()
}

fn number(value: &Value) -> f64 {
    value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64)).unwrap_or_else(|| panic!("{value}"))
}

fn tasks(config: &Value) -> &[Value] {
    config["task"].as_array().unwrap()
}

/// (file, learning rate, batch per GPU, pretraining batch, denoising steps): the rows of Table 6. RAFT's 32 are those that are
/// drawn; DRaFT has no pretraining batch there.
#[test]
fn table_6() {
    for (name, learning_rate, batch, pretraining, steps) in [
        ("refl", 1e-5, 12, 12, 40),
        ("reward_weighted", 1e-5, 16, 16, 50),
        ("raft", 3e-6, 32, 32, 50),
        ("draft", 5e-5, 3, 0, 50),
        ("joint", 2e-6, 16, 16, 50),
        ("preference", 2e-6, 16, 16, 50),
        ("parity", 2e-6, 16, 16, 50),
        ("composition", 2e-6, 16, 16, 50),
    ] {
        let config = experiment(name);
        assert_eq!(number(&config["update"]["learning_rate"]), learning_rate, "{name}");
        for (key, wanted) in [("beta1", 0.9), ("beta2", 0.999), ("epsilon", 1e-8), ("weight_decay", 1e-2)] {
            assert_eq!(number(&config["update"][key]), wanted, "{name}: update.{key}");
        }
        assert_eq!(number(&config["rollout"]["steps"]), f64::from(steps), "{name}");
        assert_eq!(number(&config["rollout"]["guidance_scale"]), 7.0, "{name}");
        assert_eq!(number(&config["run"]["lanes"]), 128.0, "{name}");
        for task in tasks(&config).iter().filter(|task| task["train"].as_bool().unwrap()) {
            assert_eq!(number(&task["samples"]), f64::from(128 * batch), "{name}");
        }
        match pretraining {
            0 => assert_eq!(config["pretrain"]["mode"].as_str(), Some("off"), "{name}"),
            pairs => assert_eq!(number(&config["pretrain"]["batch_per_lane"]), f64::from(pairs), "{name}"),
        }
        assert_eq!(number(&config["pretrain"]["data"]["score_min"]), 6.0, "{name}");
    }
    let method = |name: &str, key: &str| experiment(name)["method"][key].clone();
    for name in ["joint", "preference", "parity", "composition"] {
        assert_eq!((number(&method(name, "timesteps")), number(&method(name, "clip_range"))), (5.0, 1e-4), "{name}");
    }
    assert_eq!(method("refl", "last_steps"), Value::Array(vec![1.into(), 10.into()]));
    assert_eq!(number(&method("refl", "scale")), 1e-3);
    assert_eq!(number(&experiment("reward_weighted")["pretrain"]["weight"]), 0.5);
    assert_eq!(number(&method("raft", "accept_one_in")), 24.0);
    assert_eq!(number(&experiment("draft")["lora"]["rank"]), 32.0);
    assert_eq!(number(&method("draft", "truncation")), 1.0);
}

/// Section 4.1 and Table 2: every method but RAFT, which diverged, is trained until its reward saturates; `run.iterations` allows
/// what the paper needed.
#[test]
fn trainings_end_where_they_have_converged() {
    // the seconds of an iteration of the paper's method: 12.1 hours for 1,000; operations of one sample of it
    const TFLOPS: f64 = 16.0 * 107.0 / 43.6;
    // (file, hours of Table 2, TFLOP of an iteration per GPU); the paper gives iterations for DRaFT and its own method only
    let (drawn, pair) = (80.4 + 2.5, 3.0 * 0.804);
    let refl = 34.5 * 0.804 + pair + 3.0 * 2.51;
    for (name, needed) in [
        ("joint", 1000.0),
        ("preference", 1000.0),
        ("parity", 1000.0),
        ("composition", 1000.0),
        ("draft", 4000.0),
        ("refl", 6.9 * 3600.0 * TFLOPS / (12.0 * (refl + pair))),
        ("reward_weighted", 33.8 * 3600.0 * TFLOPS / (16.0 * (drawn + 2.0 * pair))),
        ("raft", 5.5 * 3600.0 * TFLOPS / (32.0 * drawn + 32.0 / 24.0 * pair + 32.0 * pair)),
    ] {
        let config = experiment(name);
        let most = number(&config["run"]["iterations"]);
        println!("{name}: {needed:.0} iterations of the paper, at most {most}");
        assert!(needed <= most && most <= 1.6 * needed, "{name}: {needed} of {most}");
        let stop =
            config.get("stop").map(|stop| (stop["criterion"].as_str().unwrap(), stop["reward"].as_str().unwrap()));
        let wanted = match name {
            "raft" => None,
            "reward_weighted" => Some(("saturation", "evaluation")),
            _ => Some(("saturation", "training")),
        };
        assert_eq!(stop, wanted, "{name}");
    }
    // the other reading of RAFT's batch of 32: so many kept, one in 24
    let kept = 5.5 * 3600.0 * TFLOPS / (24.0 * 32.0 * drawn);
    assert!((12.0..13.0).contains(&kept), "{kept}");
}

/// Appendix A: pictures are compared with 50 steps and guidance 7.
#[test]
fn evaluations_draw_as_appendix_a_says() {
    for name in ["eval-preference", "eval-parity", "eval-composition"] {
        let rollout = experiment(name)["rollout"].clone();
        assert_eq!((number(&rollout["steps"]), number(&rollout["guidance_scale"])), (50.0, 7.0), "{name}");
    }
}

/// Section 4.2: parity trains on captions of people without words of ethnicity; the occupations are tests only.
#[test]
fn the_occupations_are_tests_only() {
    for name in ["joint", "parity", "preference", "composition", "refl", "reward_weighted", "raft", "draft"] {
        let config = experiment(name);
        for task in tasks(&config).iter().filter(|task| task["train"].as_bool().unwrap()) {
            let prompts = &task["prompts"];
            assert_ne!(prompts["source"].as_str(), Some("occupations"), "{name}");
            if task["name"].as_str() == Some("parity") {
                assert_eq!(prompts["drop_words"].as_str(), Some("slurm/ethnicity-words.txt"), "{name}");
            }
        }
    }
    let words = rldiff::word_list::WordList::load(&format!("{}/slurm/ethnicity-words.txt", env!("CARGO_MANIFEST_DIR")));
    let words = words.unwrap();
    for (caption, dropped) in [
        ("a Black woman in a red coat", true),
        ("an African-American man with a hat", true),
        ("two asian children on a beach", true),
        ("a woman in a black dress", false),
        ("a man in a white shirt", false),
    ] {
        assert_eq!(words.matches(caption), dropped, "{caption}");
    }
}
