//! `rldiff eval`: the same figures at every number of ranks and after a cut, for folders, runs and checkpoints.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use common::{empty_folder, files_below, one_at_a_time, rldiff, run_within, runs, set, SMALL};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(240);

/// The study's evaluation but for its second sets of a kind, with `count` prompts of each set and these models, in `folder`.
fn config(folder: &Path, count: usize, models: &[(&str, &str)]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("slurm/miniature-evaluation.toml")).unwrap();
    let head = text.split("[[model]]").next().unwrap();
    let is_second =
        |set: &&str| ["workers", "pairs_in_places"].iter().any(|s| set.contains(&format!("name = \"{s}\"")));
    let sets: Vec<&str> = text.split("[[set]]").skip(1).filter(|set| !is_second(set)).collect();
    assert_eq!(sets.len(), 4);
    let sets = sets.join("[[set]]");
    let models: String = models
        .iter()
        .map(|(name, path)| format!("[[model]]\nname = \"{name}\"\npath = \"{path}\"\nlora = \"\"\n"))
        .collect();
    let sets: Vec<String> = sets
        .lines()
        .map(|line| if line.starts_with("count = ") { format!("count = {count}") } else { line.to_string() })
        .collect();
    let path = folder.join("eval.toml");
    fs::write(&path, format!("{head}{models}[[set]]{}\n", sets.join("\n"))).unwrap();
    path
}

fn eval(ranks: usize, folder: &Path, config: &Path, out: &str) -> Command {
    let mut command = rldiff(ranks, folder);
    command.arg("eval").arg(config).args(["--out", out]);
    command
}

fn results(folder: &Path, out: &str) -> Vec<u8> {
    fs::read(folder.join(out).join("results.json")).unwrap()
}

#[test]
fn the_same_figures_at_every_number_of_ranks_and_after_a_cut() {
    let _alone = one_at_a_time();
    let folder = empty_folder("evaluation");
    runs::train(1, &folder.join("run"), &["run.iterations=1", "evaluation.every=0"], &[]);
    let models = [("base", "miniature"), ("tuned", "run"), ("checkpoint", "run/checkpoints/iteration-000001")];
    let config = config(&folder, 34, &models);
    let done = run_within(eval(1, &folder, &config, "one"), LIMIT).expect_success("eval");
    assert!(done.stdout.contains("## seen: 34 prompts, 1 each"), "{}", done.stdout);
    run_within(eval(2, &folder, &config, "two"), LIMIT).expect_success("eval");
    assert_eq!(results(&folder, "one"), results(&folder, "two"));

    // killed after the first pieces; the rest on two ranks, and what was there is not made again
    let mut child = eval(1, &folder, &config, "cut").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let parts = || {
        let entries = fs::read_dir(folder.join("cut/base/occupations")).into_iter().flatten();
        entries.filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "json")).count()
    };
    let begun = Instant::now();
    while parts() < 5 {
        assert!(begun.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.join("cut/results.json").exists());
    let seen = fs::metadata(folder.join("cut/base/seen.json")).unwrap().modified().unwrap();
    let pictures = || -> Vec<SystemTime> {
        let of = |i: usize| folder.join(format!("cut/base/occupations/{i:05}-000.png"));
        (0..4).map(|i| fs::metadata(of(i)).unwrap().modified().unwrap()).collect()
    };
    let before = pictures();
    run_within(eval(2, &folder, &config, "cut"), LIMIT).expect_success("eval");
    assert_eq!(results(&folder, "one"), results(&folder, "cut"));
    assert_eq!(fs::metadata(folder.join("cut/base/seen.json")).unwrap().modified().unwrap(), seen);
    assert_eq!(pictures(), before, "pieces that were there were made again");
    // the pieces are gone, the pictures of the sheets stay
    let files = files_below(&folder.join("cut"));
    let names = || files.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap());
    assert_eq!(names().filter(|name| name.starts_with("part-")).count(), 0);
    assert_eq!(names().filter(|name| name.ends_with("-000.png")).count(), 3 * 4 * 8);

    // the tuned model and its last checkpoint are the same weights
    let figures: Value = serde_json::from_slice(&results(&folder, "one")).unwrap();
    assert_eq!(figures[1]["sets"], figures[2]["sets"]);
    assert_ne!(figures[0]["sets"], figures[1]["sets"]);
    // all again: found, not computed
    let again = run_within(eval(1, &folder, &config, "one"), LIMIT).expect_success("eval");
    assert!(again.took < done.took / 2, "{:?} after {:?}", again.took, done.took);

    // other noise under the same name is made anew
    let text = fs::read_to_string(&config).unwrap().replace("seed = 1234", "seed = 4321");
    fs::write(&config, text).unwrap();
    run_within(eval(2, &folder, &config, "one"), LIMIT).expect_success("eval");
    assert_ne!(results(&folder, "one"), results(&folder, "two"));
}

/// A training experiment's tasks are sets, and give what the run itself finds.
#[test]
fn a_runs_own_evaluation_is_found_again() {
    let _alone = one_at_a_time();
    let folder = empty_folder("evaluation-of-run");
    let settings = ["run.iterations=1", "evaluation.every=0", "rollout.steps=3", "method.timesteps=1"];
    runs::train(1, &folder.join("run"), &settings, &[]);
    let mut command = rldiff(2, &folder);
    command.args(["eval", "--model", "miniature", "--model", "run", "--json", "figures.json"]);
    command.args(set(&SMALL)).args(set(&settings));
    run_within(command, LIMIT).expect_success("eval");
    let figures: Value = serde_json::from_slice(&fs::read(folder.join("figures.json")).unwrap()).unwrap();
    let summary = rldiff::telemetry::Summary::read(&folder.join("run/summary.json")).unwrap();
    for (i, task) in summary.tasks.iter().enumerate() {
        for (model, expected) in [(0, &task.base), (1, &task.tuned)] {
            let mean = figures[model]["sets"][i]["metrics"][0]["mean"].as_f64().unwrap();
            assert_eq!(figures[model]["sets"][i]["set"], task.name.as_str());
            // the same rewards; a mean of means rounds otherwise
            assert!((mean - expected.mean).abs() < 1e-12, "{}: {mean} and {}", task.name, expected.mean);
        }
    }
}

#[test]
fn mistakes_are_one_line_and_write_nothing() {
    let _alone = one_at_a_time();
    let folder = empty_folder("evaluation-mistakes");
    let path = config(&folder, 4, &[("base", "miniature")]);
    let sound = fs::read_to_string(&path).unwrap();
    fs::write(folder.join("empty.txt"), "\n").unwrap();
    let text =
        "{ source = \"text\", path = \"empty.txt\", key = \"\", held_out = 0, split_seed = 1, drop_words = \"\" }";
    let metric = "{ name = \"image_reward\", weights = \"none.pt\", vocabulary = \"none.txt\" }";
    for (from, to, wanted) in [
        ("path = \"miniature\"", "path = \"nowhere\"", "nowhere"),
        ("{ source = \"miniature_places\" }", text, "empty.txt"),
        ("{ name = \"colorfulness\" }", metric, "set.places.metrics.preference.reward.weights: none.pt does not exist"),
        ("split = \"train\"", "split = \"test\"", "unknown variant `test`"),
        ("images_per_prompt = 1\n", "images_per_prompts = 1\n", "images_per_prompts"),
        ("count = 4", "count = 9999", "set seen: count = 9999, there are 280 prompts"),
        ("lora = \"\"", "lora = \"none.safetensors\"", "none.safetensors"),
    ] {
        assert!(sound.contains(from), "{from}");
        fs::write(&path, sound.replacen(from, to, 1)).unwrap();
        let done = run_within(eval(1, &folder, &path, "out"), LIMIT);
        assert_eq!(done.status.code(), Some(2), "{to}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{to}: {}", done.stderr);
        assert!(done.stderr.contains(wanted), "{to}: {}", done.stderr);
        assert!(!folder.join("out").exists(), "{to} wrote something");
    }
}

/// `check` shows what `--set` made of an evaluation.
#[test]
fn settings_change_an_evaluation_and_mistakes_are_named() {
    let _alone = one_at_a_time();
    let folder = empty_folder("evaluation-settings");
    let path = config(&folder, 4, &[("base", "miniature")]);
    let check = |path: &Path, setting: &str| {
        let mut command = rldiff(1, &folder);
        command.arg("check").arg(path).args(["--set", setting]);
        run_within(command, LIMIT)
    };
    let done = check(&path, "set.seen.count=3").expect_success("--set");
    assert!(done.stdout.contains("3 prompts") && done.stdout.matches("4 prompts").count() > 0, "{}", done.stdout);
    let study = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm/miniature-study.toml");
    for (path, setting, wanted) in [
        (&path, "set.nobody.count=3", "there is no set named nobody"),
        (&path, "set.seen.counts=3", "unknown key counts"),
        (&path, "eval.threads=0", "eval.threads"),
        (&study, "study.name=x", "is a study"),
    ] {
        let done = check(path, setting);
        assert_eq!(done.status.code(), Some(2), "{setting}: {}{}", done.stdout, done.stderr);
        assert!(done.stderr.lines().count() == 1 && done.stderr.contains(wanted), "{setting}: {}", done.stderr);
    }
}
