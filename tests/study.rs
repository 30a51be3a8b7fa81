//! `rldiff study`: the whole quick study on the miniature, and one that is cut off.

mod common;

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use common::{empty_folder, one_at_a_time, rldiff, run_within, say};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(300);

fn study(ranks: usize, config: &Path, out: &Path) -> std::process::Command {
    let mut command = rldiff(ranks, Path::new(env!("CARGO_MANIFEST_DIR")));
    command.arg("study").arg(config).args(["--quick", "--out"]).arg(out);
    command
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// The tables but the second, whose figures are times; and the findings.
fn computed(out: &Path) -> Value {
    let mut study = json(&out.join("study.json"));
    study["tables"].as_array_mut().unwrap().retain(|t| !t["title"].as_str().unwrap().starts_with("Table 2"));
    study
}

#[test]
fn the_quick_study_writes_every_table_and_finding() {
    let _alone = one_at_a_time();
    let out = empty_folder("study-quick").join("study");
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm/miniature-study.toml");
    let done = run_within(study(2, &config, &out), LIMIT).expect_success("study");
    say(&format!("the quick study took {:.0} s on 2 ranks", done.took.as_secs_f64()));

    let found = json(&out.join("study.json"));
    let titles: Vec<&str> = found["tables"].as_array().unwrap().iter().map(|t| t["title"].as_str().unwrap()).collect();
    let wanted = ["Table 1.", "Table 2.", "Table 3.", "Table 4.", "Table 5.", "Table 5, continued.", "Appendix G."];
    assert_eq!(titles.len(), wanted.len());
    for (beginning, title) in wanted.iter().zip(&titles) {
        assert!(title.starts_with(beginning), "{titles:?}");
    }
    // base, the method and its four rivals, joint; the methods; base, what is trained on parity, and on composition; base, single
    // runs and joint; what joint keeps of three rewards; base, with and without L_pre
    let rows: Vec<usize> =
        found["tables"].as_array().unwrap().iter().map(|t| t["rows"].as_array().unwrap().len()).collect();
    assert_eq!(rows, [7, 5, 5, 5, 5, 3, 3]);
    let markdown = fs::read_to_string(out.join("study.md")).unwrap();
    for finding in found["findings"].as_array().unwrap() {
        let verdict = finding["verdict"].as_str().unwrap();
        assert!(["reproduced", "not_reproduced", "undecided"].contains(&verdict), "{finding}");
        assert!(markdown.contains(finding["claim"].as_str().unwrap()), "{finding}");
    }
    assert!(markdown.contains("| refl cannot train on every reward | generalises to any reward: yes or no (Table 2) | reproduced | it needs a gradient; 2 of 3"));
    assert!(done.stdout.contains("## The paper's findings"), "{}", done.stdout);

    let page = fs::read_to_string(out.join("study.html")).unwrap();
    for elsewhere in ["src=\"http", "href=\"http", "src=\"/", "url(", "@import"] {
        assert!(!page.contains(elsewhere), "the page needs something from elsewhere: {elsewhere}");
    }
    for id in ["findings", "tables", "curves", "pictures"] {
        assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    // four prompts of six sets, drawn by fourteen models; two charts for each of three rewards
    assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 4 * 6 * 14);
    assert_eq!(page.matches("<figure class=\"chart\">").count(), 6);
}

/// Two small runs: stopped in the first, then in the second, then gone on with on two ranks, against one that ran through.
#[test]
fn a_study_that_is_cut_off_goes_on() {
    let _alone = one_at_a_time();
    let folder = empty_folder("study-cut-off");
    let whole = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("slurm/miniature-study.toml")).unwrap();
    let head = whole.split("[[run]]").next().unwrap().replace("seeds = [1, 2, 3]", "seeds = [3]");
    let run = |name: &str, config: &str, more: &str| {
        format!("[[run]]\nname = \"{name}\"\nconfig = \"slurm/miniature-{config}.toml\"\nset = []\nquick = [\"run.iterations=12\"{more}]\n")
    };
    let config = folder.join("study.toml");
    // a model that no run makes is a row of its own
    let head = head + "[[model]]\nname = \"again\"\npath = \"miniature\"\nlora = \"\"\n\n";
    fs::write(&config, head + &run("preference", "preference", ", \"method.timesteps=1\"") + &run("refl", "refl", ""))
        .unwrap();

    let (through, cut) = (folder.join("through"), folder.join("cut"));
    run_within(study(1, &config, &through), LIMIT).expect_success("study");
    let table_1 = computed(&through)["tables"][0]["rows"].clone();
    let columns: Vec<&Value> = table_1.as_array().unwrap().iter().map(|row| &row[0]).collect();
    assert_eq!(columns, ["base", "again", "preference", "refl"]);
    assert_eq!(table_1[0][2], table_1[1][2], "the same model");
    assert_eq!((table_1[1][1].as_str(), table_1[2][1].as_str()), (Some(""), Some("preference")));
    for until in ["runs/preference-seed3/metrics.jsonl", "runs/refl-seed3/metrics.jsonl"] {
        let mut started = study(1, &config, &cut);
        let mut child = started.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let begun = Instant::now();
        while fs::read_to_string(cut.join(until)).map_or(0, |text| text.lines().count()) == 0 {
            assert!(begun.elapsed() < LIMIT, "{until} does not appear");
            std::thread::sleep(Duration::from_millis(2));
        }
        // SAFETY: a signal to a child that has not been waited for.
        unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
        assert_eq!(child.wait().unwrap().code(), Some(75), "{until}");
        assert!(!cut.join("study.json").exists());
    }
    run_within(study(2, &config, &cut), LIMIT).expect_success("study");
    assert_eq!(computed(&through), computed(&cut));
    // once more: nothing is left to do
    let again = run_within(study(1, &config, &cut), LIMIT).expect_success("study");
    assert_eq!(again.stdout.matches("iterations are done").count(), 2, "{}", again.stdout);
    assert_eq!(computed(&through), computed(&cut));
}

#[test]
fn mistakes_are_found_before_any_work() {
    let _alone = one_at_a_time();
    let folder = empty_folder("study-mistakes");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let whole = fs::read_to_string(root.join("slurm/miniature-study.toml")).unwrap();
    let config = folder.join("study.toml");
    // an evaluation whose metrics have other names than the tasks
    let other = folder.join("other.toml");
    let evaluation = fs::read_to_string(root.join("slurm/miniature-evaluation.toml")).unwrap();
    let renamed = evaluation.replace("{ name = \"composition\"", "{ name = \"detection\"");
    fs::write(&other, renamed.replace("{ name = \"preference\"", "{ name = \"colour\"")).unwrap();
    let other = other.display().to_string();
    for (from, to, wanted) in [
        ("seeds = [1, 2, 3]", "seeds = []", "study.seeds"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "study.seeds names 1 twice"),
        ("slurm/miniature-raft.toml", "slurm/nowhere.toml", "run raft: cannot read config slurm/nowhere.toml"),
        ("name = \"raft\"", "name = \"refl\"", "two runs are named refl"),
        ("slurm/miniature-evaluation.toml", "slurm/miniature-joint.toml", "slurm/miniature-joint.toml"),
        (
            "slurm/miniature-evaluation.toml",
            "OTHER",
            "run composition trains on composition, and no metric of OTHER is named composition (they are colour, detection, likeness, \
             parity): Table 4 and Table 5 would be empty",
        ),
        ("evaluation.images=8", "evaluation.image=8", "unknown key image"),
        (
            "[\"method.timesteps=1\"]",
            "[\"task.preference.reward={ name = 'random' }\", \"method.timesteps=9\"]",
            "method.timesteps = 9",
        ),
        (
            "quick = []",
            "quick = [\"task.preference.reward={ name = 'random' }\"]",
            "run refl: task.preference.reward: random is not differentiable",
        ),
    ] {
        let (to, wanted) = (to.replace("OTHER", &other), wanted.replace("OTHER", &other));
        fs::write(&config, whole.replacen(from, &to, 1)).unwrap();
        let done = run_within(study(1, &config, &folder.join("out")), LIMIT);
        assert_eq!(done.status.code(), Some(2), "{to}: {}", done.stderr);
        assert_eq!(done.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{}", done.stderr);
        assert!(done.stderr.contains(&wanted), "{to}: {}", done.stderr);
        assert!(!folder.join("out").exists(), "{to} wrote something");
    }
}
