//! The paper-size experiments against the paper: Table 6, Appendix A, the two lists, and which prompts are trained on.

use std::{fs, path::Path};

use toml::Value;

fn experiment(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm").join(format!("{name}.toml"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.parse::<toml::Table>().unwrap().into()
}

/// The paper-size runs.
const RUNS: [&str; 12] = [
    "joint",
    "parity",
    "preference",
    "composition",
    "refl",
    "reward_weighted",
    "reward_weighted-parity",
    "reward_weighted-composition",
    "raft",
    "raft-parity",
    "raft-composition",
    "draft",
];

fn names<'a>(config: &'a Value, of: &str) -> Vec<&'a str> {
    config[of].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect()
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
        ("reward_weighted-parity", 1e-5, 16, 16, 50),
        ("reward_weighted-composition", 1e-5, 16, 16, 50),
        ("raft", 3e-6, 32, 32, 50),
        ("raft-parity", 3e-6, 32, 32, 50),
        ("raft-composition", 3e-6, 32, 32, 50),
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
    for of in ["", "-parity", "-composition"] {
        assert_eq!(number(&experiment(&format!("reward_weighted{of}"))["pretrain"]["weight"]), 0.5, "{of}");
        assert_eq!(number(&method(&format!("raft{of}"), "accept_one_in")), 24.0, "{of}");
    }
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
    for name in ["eval-preference", "eval-parity", "eval-composition", "evaluation"] {
        let rollout = experiment(name)["rollout"].clone();
        assert_eq!((number(&rollout["steps"]), number(&rollout["guidance_scale"])), (50.0, 7.0), "{name}");
    }
}

/// A run of the paper's size has its own name, trains on what its name says, and has its batch script.
#[test]
fn every_run_is_what_its_name_says() {
    for name in RUNS {
        let config = experiment(name);
        assert_eq!(config["run"]["name"].as_str(), Some(name));
        let trained = tasks(&config).iter().filter(|task| task["train"].as_bool().unwrap());
        let trained: Vec<&str> = trained.map(|task| task["name"].as_str().unwrap()).collect();
        let (method, on) = match name.split_once('-') {
            Some(both) => both,
            None if ["preference", "parity", "composition"].contains(&name) => ("ours", name),
            None if name == "joint" => ("ours", "all"),
            None => (name, "preference"),
        };
        assert_eq!(config["method"]["name"].as_str(), Some(method), "{name}");
        match on {
            "all" => assert_eq!(trained.len(), 3, "{name}"),
            on => assert_eq!(trained, [on], "{name}"),
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm").join(format!("{name}.sh"));
        let text = fs::read_to_string(&script).unwrap_or_else(|e| panic!("{}: {e}", script.display()));
        assert!(
            text.ends_with(&format!("\ntrain {name}\n")) && text.contains(&format!("--job-name={name}\n")),
            "{name}"
        );
    }
}

/// Tables 1, 3, 4 and 5: their rows and columns, Table 5's 15 cells among them.
#[test]
fn every_cell_of_the_papers_tables_is_evaluated() {
    for (file, rows, cells) in [
        (
            "eval-preference",
            &["sd-1.5", "base", "refl", "raft", "draft", "reward_weighted", "preference"][..],
            &[("diffusiondb", &["image_reward", "aesthetic"][..]), ("partiprompts", &["image_reward", "aesthetic"])][..],
        ),
        (
            "eval-parity",
            &["sd-1.5", "base", "raft-parity", "reward_weighted-parity", "parity"],
            &[("occupations", &["parity"]), ("hrs", &["parity"])],
        ),
        (
            "eval-composition",
            &["sd-1.5", "base", "raft-composition", "reward_weighted-composition", "composition"],
            &[("unseen", &["detection"]), ("seen", &["detection"])],
        ),
    ] {
        let config = experiment(file);
        let models = names(&config, "model");
        for row in rows.iter().chain(&["preference", "composition", "parity", "joint"]) {
            assert!(models.contains(row), "{file}: {row}");
        }
        assert_eq!(models[0], "base", "{file}");
        for model in config["model"].as_array().unwrap().iter().skip(2) {
            let name = model["name"].as_str().unwrap();
            assert!(RUNS.contains(&name) && model["path"].as_str() == Some(&format!("runs/{name}")), "{file}: {model}");
        }
        for (set, metrics) in cells {
            let all = config["set"].as_array().unwrap();
            let own = all.iter().find(|entry| entry["name"].as_str() == Some(set)).unwrap();
            assert_eq!(names(own, "metrics"), **metrics, "{file}: {set}");
        }
    }
}

/// `slurm/study.toml` has every row, and its evaluation the sets and rewards of the three for single tables.
#[test]
fn the_study_is_the_papers() {
    let study = experiment("study");
    let mut runs = names(&study, "run");
    for run in study["run"].as_array().unwrap() {
        let name = run["name"].as_str().unwrap();
        // Appendix G
        let name = name.strip_suffix("_without_l_pre").unwrap_or(name);
        assert_eq!(run["config"].as_str(), Some(format!("slurm/{name}.toml").as_str()));
    }
    let mut all = [&RUNS[..], &["preference_without_l_pre"]].concat();
    runs.sort_unstable();
    all.sort_unstable();
    assert_eq!(runs, all);
    assert_eq!(names(&study, "model"), ["sd-1.5"]);
    let evaluation = experiment("evaluation");
    let renamed = |name: &str| match name {
        "preference" => "image_reward".to_string(),
        "composition" => "detection".to_string(),
        name => name.to_string(),
    };
    let mut sets = evaluation["set"].as_array().unwrap().clone();
    for metric in sets.iter_mut().flat_map(|set| set["metrics"].as_array_mut().unwrap()) {
        metric["name"] = renamed(metric["name"].as_str().unwrap()).into();
    }
    let of_parts = ["eval-preference", "eval-parity", "eval-composition"].map(|name| experiment(name)["set"].clone());
    let of_parts: Vec<Value> = of_parts.iter().flat_map(|sets| sets.as_array().unwrap().clone()).collect();
    assert_eq!(sets, of_parts);
}

/// Section 4.2: parity trains on captions of people without words of ethnicity; the occupations are tests only.
#[test]
fn the_occupations_are_tests_only() {
    for name in RUNS {
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
