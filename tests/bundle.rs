//! The portable bundle, packed from the binary under test and run in a chroot that has nothing else of this machine.

mod common;

use common::{empty_folder, run_within};
use std::{path::PathBuf, process::Command, time::Duration};

#[test]
fn the_bundle_runs_where_there_is_only_glibc_and_pytorch() {
    // SAFETY: no arguments, cannot fail
    let root = unsafe { libc::geteuid() } == 0;
    let torch = PathBuf::from(std::env::var_os("LIBTORCH").unwrap_or_default());
    let packed =
        std::env::var_os("RLDIFF_VENV").is_some_and(|venv| PathBuf::from(venv).join("lib/libmpi.so.12").exists());
    if !root || !packed || !torch.join("../nvidia").is_dir() {
        eprintln!("SKIPPED: the bundle's chroot needs root, and the MPICH and PyTorch of the set-up's venv");
        return;
    }
    let folder = empty_folder("bundle");
    let mut command = Command::new("tests/bundle.sh");
    command.arg(env!("CARGO_BIN_EXE_rldiff")).arg(torch).arg(&folder);
    let done = run_within(command, Duration::from_secs(180)).expect_success("tests/bundle.sh");
    assert!(done.stdout.contains("bundle: ran in a chroot"), "{}\n{}", done.stdout, done.stderr);
    assert!(done.stderr.contains("PyTorch 2.11 was not found"), "{}", done.stderr);
}
