//! Tests whose ranks are the test executable itself: `mpirun` starts its ignored test `rank_body`, which a variable tells
//! what to do.

use std::{ffi::OsString, io::Write, time::Duration};

use rldiff::comm::{self, Communicator};

use super::{mpirun, one_at_a_time, run_within, Finished};

/// The case, for the ranks.
pub const CASE: &str = "RLDIFF_TEST_CASE";

/// Arguments that make a test executable run `rank_body`.
pub const RANK_BODY: [&str; 4] = ["--ignored", "--exact", "rank_body", "--nocapture"];

/// Runs `case` on `ranks` ranks; `more` are environment variables.
pub fn launch(ranks: usize, case: &str, more: &[(&str, OsString)]) -> Finished {
    let _alone = one_at_a_time();
    let mut command = mpirun(ranks);
    command.arg(std::env::current_exe().unwrap()).args(RANK_BODY);
    command.env(CASE, case).envs(more.iter().cloned());
    // messages of 64 MiB among four ranks take a minute on two cores that others use as well (observed)
    run_within(command, Duration::from_secs(180))
}

/// As [`launch`]; every rank must come to its end, and as one world, not as so many worlds of one.
pub fn succeeds(ranks: usize, case: &str, more: &[(&str, OsString)]) -> Finished {
    let done = launch(ranks, case, more).expect_success(&format!("{case} on {ranks} ranks"));
    let ended = done.stdout.matches(&format!("{case} passed, world of {ranks}")).count();
    assert_eq!(ended, ranks, "{case} on {ranks} ranks\n{}\n{}", done.stdout, done.stderr);
    done
}

/// What `rank_body` does: `body` with the case that [`launch`] asked for; nothing where it was not started by it.
pub fn rank(body: impl FnOnce(&str, &dyn Communicator)) {
    let Ok(case) = std::env::var(CASE) else {
        println!("rank_body: {CASE} is not set, nothing to do");
        return;
    };
    comm::abort_world_on_panic();
    let comm = comm::start().unwrap();
    tch::set_num_threads(1);
    body(&case, comm.as_ref());
    tell(&format!("{case} passed, world of {}", comm.size()));
}

/// A line on stdout in one write, so that the lines of several ranks stay whole.
pub fn tell(line: &str) {
    std::io::stdout().write_all(format!("{line}\n").as_bytes()).unwrap();
}
