//! Scripts of tests/python, some of which drive a headless browser.

use std::{ffi::OsStr, path::Path, process::Command, time::Duration};

use super::{run_within, say, Finished};

/// For a script; ten seconds were observed.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs a script of tests/python with the Python of the tests. `None`, said loudly, where there is no such Python or the
/// script says that something it needs is absent.
pub fn run_script<A: AsRef<OsStr>>(script: &str, arguments: impl IntoIterator<Item = A>) -> Option<Finished> {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|python| !python.is_empty()) else {
        say(&format!("SKIPPED {script}: RLDIFF_TEST_PYTHON is not set (make test sets it)"));
        return None;
    };
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script)).args(arguments);
    let done = run_within(command, LIMIT);
    if done.status.code() == Some(3) && done.stdout.starts_with("ABSENT") {
        say(&format!("SKIPPED {script}: {}", done.stdout.trim()));
        return None;
    }
    Some(done.expect_success(script))
}
