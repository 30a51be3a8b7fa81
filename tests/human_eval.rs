//! Human evaluation as its users do it: a study is built, answered in a real browser, and counted.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{browser::run_script, empty_folder, files_below, rldiff, run_within, runs, Finished};
use serde_json::Value;

/// For what draws a few small pictures; two seconds were observed.
const LIMIT: Duration = Duration::from_secs(120);

const BUILD: [&str; 16] = [
    "human-eval",
    "--model",
    "embedded",
    "--model",
    "tuned",
    "--prompt",
    "a carrot next to a book",
    "--prompt",
    "a kite at the \"beach\" </script> & co",
    "--group-prompt",
    "a portrait of a nurse",
    "--steps",
    "2",
    "--guidance",
    "3",
    "--eta=1",
];

/// A folder with a run `tuned`, whose model differs from the embedded one.
fn folder_with_two_models(name: &str) -> PathBuf {
    let folder = empty_folder(name);
    runs::train(
        1,
        &folder.join("tuned"),
        &["run.iterations=1", "update.learning_rate=0.001", "update.warmup_steps=0"],
        &[],
    );
    folder
}

fn human_eval(ranks: usize, folder: &Path, arguments: &[&str]) -> Finished {
    let mut command = rldiff(ranks, folder);
    command.args(arguments);
    run_within(command, LIMIT)
}

fn build(ranks: usize, folder: &Path, out: &str, more: &[&str]) -> Finished {
    human_eval(ranks, folder, &[&BUILD[..], more, &["--out", out]].concat())
}

/// Files below `root` by their path in it.
fn content(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files_below(root).into_iter().map(|(path, bytes)| (path.strip_prefix(root).unwrap().to_path_buf(), bytes)).collect()
}

/// Prompts from the sets of an evaluation and of an experiment, and what is wrong with naming one.
#[test]
fn prompts_come_from_evaluations() {
    let folder = folder_with_two_models("human_eval_sets");
    let evaluation = concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/miniature-evaluation.toml");
    let experiment = concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/miniature-joint.toml");
    let (places, seen) = (format!("{evaluation}:places:3"), format!("{evaluation}:seen"));
    let portraits = format!("{experiment}:parity");
    let models = ["human-eval", "--model", "embedded", "--model", "tuned", "--steps", "1", "--guidance", "1"];
    let sets = ["--prompt-set", &places, "--prompt-set", &seen, "--prompt-count", "1"];
    let groups = ["--group-prompt-set", &portraits, "--group-prompt-count", "1"];
    for (ranks, out) in [(1, "one"), (2, "two")] {
        let done = human_eval(ranks, &folder, &[&models[..], &sets, &groups, &["--out", out]].concat());
        let done = done.expect_success("sets");
        assert!(done.stdout.contains("5 queries for 5 raters"), "{}", done.stdout);
    }
    assert!(content(&folder.join("one")) == content(&folder.join("two")), "one and two ranks: other files");
    let study: Value = serde_json::from_slice(&fs::read(folder.join("one/study.json")).unwrap()).unwrap();
    let prompts: Vec<&str> =
        study["queries"].as_array().unwrap().iter().map(|q| q["prompt"].as_str().unwrap()).collect();
    let sets: Vec<&str> = study["queries"].as_array().unwrap().iter().map(|q| q["set"].as_str().unwrap()).collect();
    assert_eq!(sets, ["places", "places", "places", "seen", "parity"]);
    assert!(prompts.iter().any(|prompt| prompt.contains(" shirt")), "{prompts:?}");
    for (named, wanted) in [
        (format!("{evaluation}:nobody"), "has no set nobody; it has seen, unseen, occupations, workers, places"),
        ("places".to_string(), "places: CONFIG:SET is wanted"),
        (format!("{evaluation}:places:0"), "places:0: 0 prompts; 1 to 16777216 are possible"),
        ("none.toml:places".to_string(), "cannot read none.toml"),
    ] {
        let done = human_eval(2, &folder, &[&models[..], &["--prompt-set", &named, "--out", "no"]].concat());
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        assert!(done.stderr.matches("error: ").count() == 1 && done.stderr.contains(wanted), "{}", done.stderr);
        assert!(!folder.join("no").exists());
    }
}

#[test]
fn a_study_is_the_same_on_any_number_of_ranks_and_goes_on_where_it_was_interrupted() {
    let folder = folder_with_two_models("human_eval_build");
    let done = build(1, &folder, "one", &[]).expect_success("one rank");
    assert!(done.stdout.contains("3 queries for 5 raters in one/pages"), "{}", done.stdout);
    build(2, &folder, "two", &[]).expect_success("two ranks");
    let one = content(&folder.join("one"));
    assert!(one == content(&folder.join("two")), "one and two ranks: other files");
    let pictures =
        |folder: &str| one.iter().filter(|(path, _)| path.parent().is_some_and(|p| p.ends_with(folder))).count();
    assert_eq!(pictures("pages/images"), 2 * 2 + 2 * 6);
    assert_eq!(pictures("pages/guidelines"), 10 + 2, "worked examples of pairs and of sets");
    // the models differ, so the pictures do; and nothing for the raters says which is which
    let bytes = |name: &str| fs::read(folder.join("one/pages/images").join(name)).unwrap();
    assert_ne!(bytes("pair-0001-left-1.png"), bytes("pair-0001-right-1.png"));
    for (path, bytes) in &one {
        let names = ["embedded", "tuned"].iter().any(|name| bytes.windows(name.len()).any(|w| w == name.as_bytes()));
        assert_eq!(names, path.ends_with("study.json"), "{}", path.display());
    }

    // interrupted: some pictures and the pages are missing
    fs::remove_file(folder.join("two/pages/index.html")).unwrap();
    for name in ["pair-0002-right-1.png", "group-0001-left-4.png"] {
        fs::remove_file(folder.join("two/pages/images").join(name)).unwrap();
    }
    build(1, &folder, "two", &[]).expect_success("gone on");
    assert!(one == content(&folder.join("two")), "gone on: other files");
    let again = build(1, &folder, "two", &[]).expect_success("again");
    assert!(again.stdout.contains("they were there already"), "{}", again.stdout);

    for (out, more, expected) in [
        ("two", &["--seed", "9"][..], "error: two holds another study: give another --out\n"),
        ("tuned", &[], "error: tuned is not empty: give another --out\n"),
        ("x", &["--model", "nowhere"], "error: model folder nowhere does not exist\n"),
        ("x", &["--model", "embedded"], "error: --model embedded is given twice\n"),
        ("x", &["--prompts", "empty.txt"], "error: empty.txt holds no prompt\n"),
        ("x", &["--width", "31"], "error: --width 31 must be a positive multiple of"),
    ] {
        fs::write(folder.join("empty.txt"), "\n\n").unwrap();
        let refused = build(1, &folder, out, more);
        assert_eq!(refused.status.code(), Some(2), "{more:?}: {}", refused.stderr);
        // warnings of a prompt that is too long may come first
        let lines: Vec<&str> = refused.stderr.lines().filter(|line| !line.starts_with("warn: ")).collect();
        assert!(lines.len() == 1 && lines[0].starts_with(expected.trim_end()), "{}", refused.stderr);
        assert!(!folder.join("x").exists());
    }
    let alone = human_eval(1, &folder, &["human-eval", "--model", "embedded", "--prompt", "x"]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(alone.stderr.contains("two models or more"), "{}", alone.stderr);
}

/// A file of votes as the pages export it: this rater says the same everywhere.
fn write_votes(folder: &Path, study: &Value, id: &str, number: u64, answer: &str) {
    let rater = [&study["assignments"], &study["again"]]
        .into_iter()
        .flat_map(|raters| raters.as_array().cloned().unwrap_or_default())
        .find(|rater| rater["number"] == number)
        .unwrap();
    let mut answers = Vec::new();
    for asked in rater["queries"].as_array().unwrap() {
        let query = asked["query"].as_str().unwrap();
        let questions =
            if query.starts_with("pair") { &["fidelity", "alignment", "preference"][..] } else { &["diversity"] };
        for question in questions {
            answers.push(serde_json::json!({"query": query, "question": question, "answer": answer, "seconds": 2.0}));
        }
    }
    let votes = serde_json::json!({
        "format": "rldiff-votes-1", "study": id, "rater": format!("person {number}"), "number": number,
        "session": format!("session {number}"), "started": "", "exported": "", "answers": answers,
    });
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(format!("{number}.json")), votes.to_string()).unwrap();
}

/// Queries are shared out, one rater is missing, his queries go to another, and he sends his votes after all.
#[test]
fn queries_are_shared_out_counted_and_handed_out_again() {
    let folder = folder_with_two_models("human_eval_shared");
    let read = |path: &str| -> Value { serde_json::from_slice(&fs::read(folder.join(path)).unwrap()).unwrap() };
    fs::write(folder.join("own.md"), "# Look\n\nLook *twice*. ![x](x.png)\n").unwrap();
    let shared = ["--raters", "2", "--per-rater", "2"];
    let done = build(2, &folder, "study", &[&shared[..], &["--guidelines", "own.md", "--prompt-count", "3"]].concat());
    let done = done.expect_success("shared out");
    assert!(done.stdout.contains("3 queries with 2 votes each for 3 raters in study/raters\n"), "{}", done.stdout);
    for warning in [
        "own.md: 1 picture is shown as words: the pages load nothing from elsewhere",
        "--prompt-count 3 has no effect: it is for the sets of --prompt-set, none is given",
    ] {
        assert_eq!(done.stderr.matches(warning).count(), 1, "{}", done.stderr);
    }
    build(1, &folder, "one", &[&shared[..], &["--guidelines", "own.md"]].concat()).expect_success("one rank");
    assert!(content(&folder.join("study")) == content(&folder.join("one")), "one and two ranks: other files");
    let index = fs::read_to_string(folder.join("study/raters/003/index.html")).unwrap();
    assert!(index.contains("<p>Look <em>twice</em>. x</p>") && !index.contains("guidelines-pair"), "{index}");

    let study = read("study/study.json");
    let script = fs::read_to_string(folder.join("study/raters/001/study.js")).unwrap();
    let id = script.split("\"id\":\"").nth(1).unwrap().split('"').next().unwrap().to_owned();
    let votes = folder.join("votes");
    write_votes(&votes, &study, &id, 1, "left");
    write_votes(&votes, &study, &id, 2, "not_sure");
    let count = || {
        let tally = human_eval(1, &folder, &["human-eval", "tally", "study", "votes", "--json", "tally.json"]);
        (tally.expect_success("tally").stdout, read("tally.json"))
    };
    let (text, tally) = count();
    assert!(text.contains("1 raters have sent nothing: 3. `rldiff human-eval again STUDY VOTES` hands out"), "{text}");
    assert_eq!((&tally["queries_with_fewer"], &tally["absent_raters"]), (&2.into(), &serde_json::json!([3])));

    let again = human_eval(1, &folder, &["human-eval", "again", "study", "votes"]).expect_success("again");
    assert!(again.stdout.starts_with("rater 4 has 2 queries of 3 in study/raters/004\n"), "{}", again.stdout);
    let study = read("study/study.json");
    write_votes(&votes, &study, &id, 4, "not_sure");
    let (text, before) = count();
    assert!(!text.contains("have fewer") && !text.contains("sent nothing"), "{text}");
    assert_eq!((&before["queries_with_fewer"], &before["answers_left_out"]), (&0.into(), &0.into()));
    write_votes(&votes, &study, &id, 3, "left");
    let (text, after) = count();
    assert!(text.contains("more answers are not counted: another rater got the query again"), "{text}");
    assert_eq!((&before["comparisons"], &before["ranks"]), (&after["comparisons"], &after["ranks"]));
    // always left is as often left as it was said, whatever the sides of the query
    let of_left = after["comparisons"][0]["left_of_decided"]["share"].as_f64();
    assert!(of_left.is_none_or(|share| share == 1.0), "{after}");

    fs::write(folder.join("empty.md"), " \n").unwrap();
    for (arguments, expected) in [
        (
            ["--out", "x", "--per-rater", "4"],
            "error: --per-rater 4: there are 3 queries, and a rater votes once on each",
        ),
        (["--out", "x", "--guidelines", "none.md"], "error: cannot read none.md"),
        (["--out", "x", "--guidelines", "empty.md"], "error: empty.md is empty: raters would read nothing"),
        (["again", "study", "--missing", "3"], "error: the queries of rater 3 were handed out again before, to 4"),
        (["again", "study", "--missing", "9"], "error: there is no rater 9: the study has the raters 1 to 4"),
        (["again", "study", "votes", "--missing=1"], "error: no vote is missing: there is nothing to hand out again"),
    ] {
        let all = if arguments[0] == "again" { vec!["human-eval"] } else { BUILD.to_vec() };
        let refused = human_eval(1, &folder, &[&all[..], &arguments].concat());
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", refused.stderr);
        assert!(refused.stderr.starts_with(expected) && refused.stderr.lines().count() == 1, "{}", refused.stderr);
        assert!(!folder.join("x").exists());
    }
}

/// A rater's session in the browser; false where there is none.
fn answer(folder: &Path, url: &str, rater: &str, mode: &str, requests_start: &str) -> bool {
    answer_study(folder, "study", url, &[rater, mode], requests_start, None)
}

/// The same in a study of this name, by the rater with a number.
fn answer_study(
    folder: &Path,
    study: &str,
    url: &str,
    [rater, mode]: &[&str; 2],
    requests_start: &str,
    number: Option<&str>,
) -> bool {
    let downloads = folder.join(format!("downloads-{mode}{}", number.unwrap_or("")));
    fs::create_dir(&downloads).unwrap();
    let study = folder.join(study).join("study.json");
    let arguments = [url, study.to_str().unwrap(), rater, mode, downloads.to_str().unwrap()];
    if run_script("answer_study.py", arguments.into_iter().chain(number)).is_none() {
        return false;
    }
    let seen: Value = serde_json::from_slice(&fs::read(downloads.join("seen.json")).unwrap()).unwrap();
    assert_eq!(seen["complaints"], serde_json::json!([]));
    let requested = seen["requested"].as_array().unwrap();
    assert!(requested.len() > 6, "{requested:?}");
    for address in requested {
        assert!(address.as_str().unwrap().starts_with(requests_start), "{address}");
    }
    true
}

#[test]
fn raters_answer_in_a_browser_and_the_answers_are_counted() {
    let folder = folder_with_two_models("human_eval_browser");
    build(1, &folder, "study", &["--raters", "2"]).expect_success("build");
    let pages = folder.join("study/pages");

    // by keyboard from disk
    let from_disk = format!("file://{}/", pages.display());
    if !answer(&folder, &format!("{from_disk}index.html"), "anna b.", "keys", &from_disk) {
        return;
    }
    // by touch on a phone from a static server
    let server = StaticServer::start(&pages);
    assert!(answer(&folder, &server.address, "bob", "pointer", &server.address));

    // one of three raters of a study that is shared out
    build(1, &folder, "shared", &["--raters", "2", "--per-rater", "2"]).expect_success("shared out");
    let own = format!("file://{}/", folder.join("shared/raters/002").display());
    assert!(answer_study(&folder, "shared", &format!("{own}index.html"), &["carl", "keys"], &own, Some("2")));
    let downloads = folder.join("downloads-keys2");
    let sent = files_below(&downloads).into_iter().find(|(path, _)| path.to_str().unwrap().contains("votes-carl-"));
    let sent = sent.unwrap().0;
    let counted = ["human-eval", "tally", "shared", sent.to_str().unwrap(), "--json", "shared.json"];
    human_eval(1, &folder, &counted).expect_success("tally of one rater");
    let tally: Value = serde_json::from_slice(&fs::read(folder.join("shared.json")).unwrap()).unwrap();
    assert_eq!(tally["raters"][0]["number"], 2);
    let comparisons = tally["comparisons"].as_array().unwrap().iter();
    for comparison in comparisons.filter(|c| c["question"] == "alignment" || c["question"] == "diversity") {
        // the second model by the rule, on whatever side this rater saw it
        let share = &comparison["second_of_decided"];
        assert!(share.is_null() || share["share"] == 1.0, "{comparison}");
    }

    let votes = folder.join("votes");
    fs::create_dir(&votes).unwrap();
    for mode in ["keys", "pointer"] {
        let (path, bytes) = files_below(&folder.join(format!("downloads-{mode}")))
            .into_iter()
            .find(|(path, _)| path.file_name().unwrap().to_str().unwrap().starts_with("votes-"))
            .unwrap();
        fs::write(votes.join(path.file_name().unwrap()), bytes).unwrap();
    }
    let names: Vec<String> =
        files_below(&votes).iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    assert!(names[0].starts_with("votes-anna-b-") && names[1].starts_with("votes-bob-"), "{names:?}");

    let tally = ["human-eval", "tally", "study", "votes", "--json", "tally.json", "--markdown", "tally.md"];
    let counted = human_eval(1, &folder, &tally).expect_success("tally");
    assert_eq!(counted.stdout, fs::read_to_string(folder.join("tally.md")).unwrap());
    assert!(
        counted.stdout.contains(
            "2 raters, 3 queries, 14 answers. \
             2 of them say that a picture did not load and are in no other share.\n1 of 3 queries have"
        ),
        "{}",
        counted.stdout
    );
    let tally: Value = serde_json::from_slice(&fs::read(folder.join("tally.json")).unwrap()).unwrap();
    let of = |question: &str| -> Value {
        tally["comparisons"].as_array().unwrap().iter().find(|c| c["question"] == question).unwrap().clone()
    };
    // the rule by which the script answers
    assert_eq!(of("alignment")["second_preferred"]["share"], 1.0);
    assert_eq!(of("alignment")["second"], "tuned");
    // one of the two queries did not load: it is no vote
    assert_eq!((&of("fidelity")["votes"], &of("fidelity")["not_sure"]["share"]), (&2.into(), &1.0.into()));
    assert_eq!(of("fidelity")["did_not_load"]["share"], 0.5);
    assert_eq!(of("preference")["left_of_decided"]["share"], 1.0);
    // always left is each model once: two queries, two raters who agree
    assert_eq!(
        (&of("preference")["second_of_decided"]["share"], &of("preference")["alpha"]),
        (&0.5.into(), &1.0.into())
    );
    assert_eq!(of("diversity")["second_preferred"]["counted"], 2);
    assert_eq!(tally["queries_with_fewer"], 1);

    // what cannot be counted: twice the same session, another study's, a torn file
    fs::copy(votes.join(&names[0]), votes.join("zz-copy.json")).unwrap();
    let text = fs::read_to_string(votes.join(&names[1])).unwrap();
    fs::write(votes.join("zy-torn.json"), &text[..text.len() / 2]).unwrap();
    let id = tally["study"].as_str().unwrap();
    fs::write(votes.join("zx-other.json"), text.replace(id, "00000000000000000000000000000000")).unwrap();
    let refused = human_eval(1, &folder, &["human-eval", "tally", "study", "votes"]);
    assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(2), ""));
    let lines: Vec<&str> = refused.stderr.lines().collect();
    assert_eq!(lines.len(), 3, "{}", refused.stderr);
    assert!(lines[0].starts_with("error: votes/zx-other.json: belongs to the study 0000"), "{}", lines[0]);
    assert!(lines[1].starts_with("error: votes/zy-torn.json: is no file of votes"), "{}", lines[1]);
    assert_eq!(lines[2], format!("error: votes/zz-copy.json: is the same session as votes/{}", names[0]));
}

/// Python's own web server on a free port of the loopback.
struct StaticServer {
    process: std::process::Child,
    address: String,
}

impl StaticServer {
    fn start(folder: &Path) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new("python3")
            .args(["-m", "http.server", "--bind", "127.0.0.1", &port.to_string(), "--directory"])
            .arg(folder)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("python3 serves a folder");
        let server = StaticServer { process, address: format!("http://127.0.0.1:{port}/") };
        let connects = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        assert!(
            (0..200).any(|_| connects() || {
                std::thread::sleep(Duration::from_millis(50));
                false
            }),
            "no server"
        );
        server
    }
}

impl Drop for StaticServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
