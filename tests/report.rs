//! Evaluations in the course of a run, and the page that shows them.

mod common;

use std::{fs, path::Path, time::Duration};

use common::{
    browser::run_script,
    empty_folder, files_below, rldiff, run_within,
    runs::{assert_same_run, checkpoint, computed_lines, train, TINY},
    Finished,
};
use rldiff::telemetry::{names, read_metrics, RunFiles, SampleSheet};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);
/// Evaluations after 0, 2 and, the last, 3 iterations.
const COURSE: [&str; 5] = [
    "run.iterations=3",
    "evaluation.every=2",
    "evaluation.prompts=2",
    "evaluation.images=3",
    "update.learning_rate=0.001",
];

fn course() -> Vec<&'static str> {
    [&TINY[..], &COURSE].concat()
}

fn report(folder: &Path, arguments: &[&str]) -> Finished {
    let mut command = rldiff(1, folder);
    command.arg("report").args(arguments);
    run_within(command, LIMIT)
}

/// Every sheet's path in the run and its bytes.
fn sheets(files: &RunFiles) -> Vec<(String, Vec<u8>)> {
    let inside = |path: &Path| path.strip_prefix(files.root()).unwrap().display().to_string();
    files_below(&files.samples("")).into_iter().map(|(path, bytes)| (inside(&path), bytes)).collect()
}

#[test]
fn evaluations_have_the_same_bits_on_any_number_of_ranks_and_after_a_resume() {
    let folder = empty_folder("report_course");
    let [one, two, resumed] = ["one", "two", "resumed"].map(|name| RunFiles::new(folder.join(name)));
    train(1, one.root(), &course(), &[]);
    train(2, two.root(), &course(), &[]);
    assert_same_run(&one, &two, 3);
    assert!(sheets(&one) == sheets(&two), "one and two ranks: other samples");
    let from = checkpoint(&one, 2);
    train(1, resumed.root(), &course(), &["--resume", from.to_str().unwrap()]);
    assert_same_run(&one, &resumed, 3);
    assert!(sheets(&one) == sheets(&resumed), "resumed: other samples");

    // what is there: which iterations, how many pictures, which numbers
    let history = read_metrics(&one.metrics()).unwrap();
    for (task, images) in [("composition", 3), ("parity", 2), ("preference", 3)] {
        let listed = SampleSheet::list(&one.samples(task)).unwrap();
        assert_eq!(listed.iter().map(|(done, _)| *done).collect::<Vec<_>>(), [0, 2, 3]);
        let rows = SampleSheet::read(&listed[0].1).unwrap().rows;
        assert_eq!(rows.iter().map(|row| row.pictures.len()).collect::<Vec<_>>(), [images; 2]);
        assert_ne!(rows[0].caption, rows[1].caption);
        for name in [names::EVALUATION_REWARD, names::HIGH_FREQUENCY, names::DIVERSITY] {
            let value = |line: usize, prefix: &str| history[line].get(&format!("{task}/{prefix}{name}"));
            let base = value(0, "base_").unwrap();
            assert_eq!([value(0, ""), value(1, "base_"), value(2, "base_")], [None; 3], "{task} {name}");
            let after = value(1, "").unwrap();
            assert!(base.is_finite() && after.is_finite() && value(2, "").unwrap().is_finite(), "{task} {name}");
            // a reward may have few values; what is measured on pixels differs
            assert!(after != base || name == names::EVALUATION_REWARD, "{task} {name}");
        }
    }
    // the numbers are those of the pictures on the sheet, but for their 8 bits: half a step of 1/255 in each pixel of two
    // pictures shifts a distance by at most 0.004; observed below 0.001
    let sheet = SampleSheet::read(&SampleSheet::list(&one.samples("parity")).unwrap()[2].1).unwrap();
    let distance = |row: &rldiff::telemetry::GridRow| {
        let (a, b) = (row.pictures[0].rgb(), row.pictures[1].rgb());
        let squares = a.iter().zip(b).map(|(a, b)| ((f64::from(*a) - f64::from(*b)) / 255.0).powi(2));
        (squares.sum::<f64>() / a.len() as f64).sqrt()
    };
    let expected = sheet.rows.iter().map(distance).sum::<f64>() / 2.0;
    let logged = history[2].get("parity/diversity").unwrap();
    assert!((expected - logged).abs() < 0.004, "{expected} {logged}");
    // and evaluating changes nothing of the training
    let without = RunFiles::new(folder.join("without"));
    train(1, without.root(), &[&course()[..], &["evaluation.every=0"]].concat(), &[]);
    let trained = |files: &RunFiles| rldiff::store::digest(&checkpoint(files, 3)).unwrap();
    assert_eq!(trained(&one), trained(&without));
    assert!(computed_lines(&without).iter().all(|(_, line)| line.iter().all(|(name, _)| !name.ends_with("diversity"))));

    tensorboard_has_the_samples(&one);
}

fn tensorboard_has_the_samples(files: &RunFiles) {
    let Some(read) = run_script("read_tensorboard.py", [files.tensorboard()]) else { return };
    let text = read.stdout;
    let lines: Vec<&str> = text.lines().collect();
    for task in ["composition", "parity", "preference"] {
        assert!(lines.contains(&format!("samples/{task} [0, 2, 3]").as_str()), "{text}");
    }
    assert_eq!(lines.last(), Some(&"[1, 2]"), "{text}");
}

#[test]
fn a_report_holds_everything_and_needs_nothing() {
    let folder = empty_folder("report_page");
    let (a, b) = (RunFiles::new(folder.join("a")), RunFiles::new(folder.join("b")));
    train(1, a.root(), &course(), &[]);
    train(1, b.root(), &[&TINY[..], &["run.iterations=5", "run.seed=7"]].concat(), &[]);

    let done = report(&folder, &["a"]).expect_success("one run");
    assert_eq!(done.stdout, "a/report.html\n");
    let one = fs::read_to_string(folder.join("a/report.html")).unwrap();
    for id in ["runs", "results", "rewards", "tricks", "samples", "before-after", "time", "config", "metrics"] {
        assert!(one.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    // sheets of 2 prompts at 3 evaluations for each of 3 tasks, and the sheet of before and after
    let of_prompts: usize = ["composition", "parity", "preference"]
        .map(|task| SampleSheet::read(&SampleSheet::list(&a.samples(task)).unwrap()[0].1).unwrap())
        .iter()
        .flat_map(|sheet| &sheet.rows)
        .map(|row| row.pictures.len())
        .sum();
    assert!(of_prompts > 3 * 2, "several pictures of a prompt");
    assert_eq!(one.matches("<img").count(), 3 * of_prompts + 1);
    assert!(!one.contains("setting that differs"));
    let two = report(&folder, &["a", "b", "--out", "two.html"]).expect_success("two runs");
    assert_eq!(two.stdout, "two.html\n");
    let two = fs::read_to_string(folder.join("two.html")).unwrap();
    let row = "<th scope=\"row\"><code>run.seed</code></th><td><code>1</code></td><td><code>7</code></td>";
    assert!(two.contains(row) && !two.contains("<code>run.lanes</code>"));
    for page in [&one, &two] {
        // the only address is the name of the SVG language
        assert!(!page.replace("http://www.w3.org/2000/svg", "").contains("http"));
        // numbers that are none are dashes; what begins a piece here is a picture's data
        let words: String = page
            .split("base64,")
            .enumerate()
            .map(|(i, piece)| if i == 0 { piece } else { piece.split_once('"').unwrap().1 })
            .collect();
        assert!(!words.contains("NaN") && page.ends_with("</html>\n"));
    }

    // a run that is not done has neither summary nor sheet
    fs::create_dir(folder.join("begun")).unwrap();
    for file in ["config.toml", "metrics.jsonl"] {
        fs::copy(a.root().join(file), folder.join("begun").join(file)).unwrap();
    }
    report(&folder, &["begun"]).expect_success("a run that is not done");
    let begun = fs::read_to_string(folder.join("begun/report.html")).unwrap();
    assert!(begun.contains("3 of 3 (not finished)") && !begun.contains("<section id=\"results\">"));
    assert!(begun.contains("<section id=\"tricks\">") && begun.matches("<img").count() == 0);

    fs::create_dir(folder.join("fresh")).unwrap();
    fs::copy(a.config(), folder.join("fresh/config.toml")).unwrap();
    fs::write(folder.join("fresh/metrics.jsonl"), "").unwrap();
    for (runs, expected) in [
        (&["nowhere"][..], "error: cannot read nowhere/config.toml"),
        (&["a", "a/../a"], "error: a/../a is given twice"),
        (&["fresh"], "error: fresh/metrics.jsonl holds no iteration yet"),
    ] {
        let refused = report(&folder, runs);
        assert_eq!(refused.status.code(), Some(2), "{}", refused.stderr);
        assert!(refused.stderr.starts_with(expected) && refused.stderr.lines().count() == 1, "{}", refused.stderr);
    }
    look_at_it(&folder, &a);
}

fn look_at_it(folder: &Path, run: &RunFiles) {
    let page = run.root().join("report.html");
    if run_script("read_report.py", [page.as_path(), folder]).is_none() {
        return;
    }
    let seen: Value = serde_json::from_slice(&fs::read(folder.join("seen.json")).unwrap()).unwrap();
    for screen in ["desk", "phone"] {
        assert_eq!(seen[screen]["complaints"], serde_json::json!([]));
        assert_eq!(seen[screen]["requested"], serde_json::json!([format!("file://{}", page.display())]));
        assert_eq!(seen[screen]["images"], fs::read_to_string(&page).unwrap().matches("<img").count());
        assert!(seen[screen]["charts"].as_u64().unwrap() > 30, "{}", seen[screen]["charts"]);
    }
    // the first chart: three iterations of composition; five digits
    let history = read_metrics(&run.metrics()).unwrap();
    let shown = |iteration: usize| {
        let value = history[iteration].get(&names::reward_mean("composition")).unwrap();
        let value = format!("{value:.4e}").parse::<f64>().unwrap();
        format!("iterations {}\na\n{value}", iteration + 1)
    };
    assert_eq!(seen["pointer"], shown(1));
    assert_eq!(seen["away"], false);
    assert_eq!(seen["home"], shown(0));
    assert_eq!(seen["right"], shown(1));
}
