//! The program says which commit it was built from, and so do its checkpoints; one of another version is gone on with.

mod common;

use std::{path::Path, process::Command};

use common::{
    empty_folder, one_at_a_time, rldiff, run_within,
    runs::{assert_same_run, command, copy_run, train, LIMIT, TINY},
};
use rldiff::{store::checkpoint::Manifest, telemetry::RunFiles, CODE_VERSION};

/// What git says about this checkout, if it is one.
fn commit() -> Option<String> {
    let git = |args: &[&str]| {
        let done = Command::new("git").args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        done.status.success().then(|| String::from_utf8(done.stdout).unwrap().trim().to_string())
    };
    git(&["rev-parse", "--show-prefix"])?.is_empty().then(|| git(&["rev-parse", "HEAD"]))?
}

#[test]
fn the_program_names_its_commit() {
    let version = env!("CARGO_PKG_VERSION");
    let short = CODE_VERSION.strip_prefix(&format!("{version} (")).and_then(|rest| rest.strip_suffix(')'));
    match (commit(), short) {
        (Some(hash), Some(short)) => assert!(short.len() >= 10 && hash.starts_with(short), "{CODE_VERSION}, {hash}"),
        (None, None) => assert_eq!(CODE_VERSION, version),
        (hash, _) => panic!("{CODE_VERSION}, but git says {hash:?}"),
    }
    let mut command = rldiff(1, Path::new("."));
    command.arg("--version");
    let said = run_within(command, LIMIT).expect_success("version");
    assert_eq!(said.stdout.trim(), format!("rldiff {CODE_VERSION}"));
}

#[test]
fn a_checkpoint_of_another_version_is_gone_on_with() {
    let _alone = one_at_a_time();
    let folder = empty_folder("code-version");
    let settings = |iterations| [&TINY[..], &[iterations]].concat();
    let [straight, saved, resumed] = ["straight", "saved", "resumed"].map(|name| RunFiles::new(folder.join(name)));
    train(1, straight.root(), &settings("run.iterations=2"), &[]);
    train(1, saved.root(), &settings("run.iterations=1"), &[]);
    let resume = |from_version: &str| {
        copy_run(&saved, &resumed);
        let checkpoint = resumed.checkpoints().join("iteration-000001");
        let mut manifest = Manifest::read(&checkpoint).unwrap();
        assert_eq!(manifest.code_version, CODE_VERSION);
        manifest.code_version = from_version.into();
        manifest.write(&checkpoint).unwrap();
        let mut inspect = rldiff(1, resumed.root());
        inspect.args(["inspect", "."]);
        let told = run_within(inspect, LIMIT).expect_success("inspect").stdout;
        assert!(told.contains(&format!("written by    rldiff {from_version}\n")), "{told}");
        let go_on = command(1, resumed.root(), &settings("run.iterations=2"), &["--resume", "auto"]);
        let log = run_within(go_on, LIMIT).expect_success("resumed").stderr;
        assert_same_run(&straight, &resumed, 2);
        std::fs::remove_dir_all(resumed.root()).unwrap();
        log
    };
    let log = resume("0.0.9 (fedcba9876)");
    let note = format!("it was written by rldiff 0.0.9 (fedcba9876); this is {CODE_VERSION}");
    assert_eq!(log.matches(&note).count(), 1, "{log}");
    assert!(!resume(CODE_VERSION).contains("it was written by"));
}
