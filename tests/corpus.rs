//! What people's files and habits broke, as rows of tables: `tests/corpus/<kind>.toml` holds the cases of one kind, each
//! an input, a command and what must come of it. The next case is one row; `tests/corpus/README.md` says how to write it.
//!
//! `RLDIFF_CORPUS=WORD cargo test --test corpus` runs the rows whose kind or name contains the word.

mod common;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Duration,
};

use common::{empty_folder, run_within, say, Finished};
use serde::Deserialize;

/// One file of the corpus.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    case: Vec<Case>,
}

/// One row: an input, what is done with it, and what is expected.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// What broke, as a sentence in lower case with underscores.
    name: String,
    /// Where people met it: `repository#issue`, or in words.
    source: String,
    /// What must be at hand: `python` (numpy, h5py, safetensors), `tmpfs` (root may mount one), `goldens` (the folder
    /// that RLDIFF_GOLDENS names). Without it the row is skipped, loudly.
    #[serde(default)]
    needs: Vec<String>,
    /// Bash that makes the input, in an empty folder.
    #[serde(default)]
    given: String,
    /// Bash that is tried, in the same folder; its exit code counts (that of the first part of a pipe that fails).
    run: String,
    /// The expected exit code.
    code: i32,
    /// What standard output or standard error must contain.
    #[serde(default)]
    says: Vec<String>,
    /// What neither may contain.
    #[serde(default)]
    never: Vec<String>,
    /// Files and folders that must be there afterwards.
    #[serde(default)]
    leaves: Vec<PathBuf>,
    /// Files and folders that must not.
    #[serde(default)]
    absent: Vec<PathBuf>,
    /// Seconds that `run` may take on a busy machine.
    #[serde(default = "a_minute")]
    within: u64,
}

fn a_minute() -> u64 {
    60
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

/// All rows with their kinds, in the order of the files.
fn cases() -> Vec<(String, Case)> {
    let mut files: Vec<PathBuf> = fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ext| ext == "toml") && !path.ends_with("small.toml"));
    files.sort();
    let mut all = Vec::new();
    for path in files {
        let kind = path.file_stem().unwrap().to_str().unwrap().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let table: Table = toml::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        all.extend(table.case.into_iter().map(|case| (kind.clone(), case)));
    }
    let names: BTreeSet<_> = all.iter().map(|(kind, case)| (kind, &case.name)).collect();
    assert_eq!(names.len(), all.len(), "two rows of a kind have the same name");
    all
}

/// Why a row cannot be tried on this machine.
fn missing(case: &Case) -> Option<String> {
    case.needs.iter().find_map(|need| match need.as_str() {
        "python" => std::env::var_os("RLDIFF_TEST_PYTHON").is_none().then(|| "RLDIFF_TEST_PYTHON is not set".into()),
        "goldens" => std::env::var_os("RLDIFF_GOLDENS").is_none().then(|| "RLDIFF_GOLDENS is not set".into()),
        // SAFETY: asks for a number.
        "tmpfs" => (unsafe { libc::geteuid() } != 0).then(|| "only root mounts a tmpfs".into()),
        other => panic!("{}: nobody knows what {other:?} is", case.name),
    })
}

fn bash(script: &str, folder: &Path, limit: u64) -> Finished {
    let program = Path::new(env!("CARGO_BIN_EXE_rldiff"));
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("bash");
    command.args(["-o", "pipefail", "-c", script]).current_dir(folder);
    command.env("PATH", format!("{}:{path}", program.parent().unwrap().display()));
    command.env("OMP_NUM_THREADS", "1");
    command.env("CORPUS", corpus());
    command.env("SMALL", corpus().join("small.toml"));
    command.env("PROJECT", env!("CARGO_MANIFEST_DIR"));
    command.env("MINIATURE", Path::new(env!("CARGO_MANIFEST_DIR")).join("src/miniature/base"));
    run_within(command, Duration::from_secs(limit))
}

/// What is wrong with what came of a row.
fn complaints(case: &Case, folder: &Path) -> Vec<String> {
    if !case.given.is_empty() {
        let given = bash(&format!("set -e\n{}", case.given), folder, 60);
        if !given.status.success() {
            return vec![format!("its input could not be made: {}\n{}", given.status, given.stderr)];
        }
    }
    let done = match std::panic::catch_unwind(|| bash(&case.run, folder, case.within)) {
        Ok(done) => done,
        Err(_) => return vec![format!("still running after {} s", case.within)],
    };
    let printed = format!("{}{}", done.stdout, done.stderr);
    let mut wrong = Vec::new();
    if done.status.code() != Some(case.code) {
        wrong.push(format!("ended with {}, not with code {}", done.status, case.code));
    }
    wrong.extend(case.says.iter().filter(|text| !printed.contains(*text)).map(|text| format!("does not say {text:?}")));
    let never = case.never.iter().map(String::as_str).chain(["panicked at", "stack backtrace"]);
    wrong.extend(never.filter(|text| printed.contains(text)).map(|text| format!("says {text:?}")));
    if case.code == 2 && !printed.lines().any(|line| line.starts_with("error: ")) {
        wrong.push("has no line that begins with \"error: \"".to_string());
    }
    wrong
        .extend(case.leaves.iter().filter(|p| !folder.join(p).exists()).map(|p| format!("{} is missing", p.display())));
    wrong.extend(case.absent.iter().filter(|p| folder.join(p).exists()).map(|p| format!("{} is there", p.display())));
    if !wrong.is_empty() {
        let tail: Vec<&str> = printed.lines().rev().take(12).collect();
        wrong.extend(tail.into_iter().rev().map(|line| format!("| {}", line.chars().take(300).collect::<String>())));
    }
    wrong
}

#[test]
fn every_row_comes_out_as_expected() {
    let word = std::env::var("RLDIFF_CORPUS").unwrap_or_default();
    let rows: Vec<_> =
        cases().into_iter().filter(|(kind, case)| format!("{kind}/{}", case.name).contains(&word)).collect();
    assert!(!rows.is_empty(), "no row is called like {word:?}");
    let waiting = Mutex::new(rows.iter());
    let (failed, skipped) = (Mutex::new(Vec::new()), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| loop {
                let Some((kind, case)) = waiting.lock().unwrap().next() else { break };
                let name = format!("{kind}/{}", case.name);
                if let Some(why) = missing(case) {
                    say(&format!("SKIPPED: corpus {name}: {why}"));
                    *skipped.lock().unwrap() += 1;
                    continue;
                }
                let folder = empty_folder(&format!("corpus/{name}"));
                let wrong = complaints(case, &folder);
                if wrong.is_empty() {
                    // what failed stays, to be looked at
                    fs::remove_dir_all(&folder).unwrap();
                } else {
                    failed.lock().unwrap().push(format!("{name} ({}):\n  {}", case.source, wrong.join("\n  ")));
                }
            });
        }
    });
    let (failed, skipped) = (failed.into_inner().unwrap(), skipped.into_inner().unwrap());
    say(&format!("corpus: {} rows, {skipped} skipped, {} failed", rows.len(), failed.len()));
    assert!(failed.is_empty(), "\n{}", failed.join("\n\n"));
}
