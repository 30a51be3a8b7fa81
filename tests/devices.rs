//! What the program computes on where some of its ranks see a GPU: over a double of NVIDIA's driver that shows one and can do
//! nothing with it.

mod common;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use common::{empty_folder, mpirun, one_at_a_time, run_within, runs::TINY, say, set, Finished, SMALL};
use rldiff::{device::parts, host};

/// The folder of the double, compiled once per process.
fn double() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = empty_folder("driver-double");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let output = Command::new(&compiler)
            .args(["-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", "-o"])
            .arg(folder.join("libcuda.so.1"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/devices/cuda_double.cpp"))
            .output()
            .unwrap_or_else(|e| panic!("cannot start {compiler}: {e}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder
    })
}

/// Two ranks, of which those in `with` see the double's GPU; `device` is --device's word.
fn two_ranks(with: [bool; 2], device: &str) -> Option<Finished> {
    if parts::gpus().is_ok() {
        say("SKIPPED: this machine has a GPU of its own");
        return None;
    }
    let _alone = one_at_a_time();
    let folder = empty_folder("devices");
    let mut command = mpirun(1);
    command.current_dir(&folder);
    for (rank, sees) in with.into_iter().enumerate() {
        if rank > 0 {
            command.args([":", "-n", "1"]);
        }
        let mut search = vec![double().to_path_buf()];
        search.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
        let search = std::env::join_paths(&search[usize::from(!sees)..]).unwrap();
        command.arg("env").arg(format!("LD_LIBRARY_PATH={}", search.to_string_lossy()));
        command.arg(env!("CARGO_BIN_EXE_rldiff")).args(["train", "--device", device, "--out", "run"]);
        command.args(set(&SMALL)).args(set(&TINY)).args(["--set", "run.iterations=1"]);
    }
    Some(run_within(command, Duration::from_secs(120)))
}

#[test]
fn a_gpu_that_only_some_ranks_have_ends_the_run_and_names_the_host() {
    let host = host::name().unwrap();
    for (device, begins) in
        [("auto", "error: some ranks have a GPU"), ("cuda", "error: --device cuda: some ranks have a GPU")]
    {
        for with in [[true, false], [false, true]] {
            let Some(done) = two_ranks(with, device) else { return };
            let (seeing, blind) = if with[0] { (0, 1) } else { (1, 0) };
            assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
            let lines: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
            assert_eq!(lines.len(), 1, "{}", done.stderr);
            let named = format!("rank {seeing} on {host} have; rank {blind} on {host} (no NVIDIA driver");
            assert!(lines[0].starts_with(begins) && lines[0].contains(&named), "{}", lines[0]);
        }
    }
}

#[test]
fn gpus_that_nobody_can_use_are_said_and_the_first_line_names_the_cpu() {
    let Some(done) = two_ranks([true, true], "auto") else { return };
    let done = done.expect_success("two ranks with a useless GPU");
    let warnings = done.stderr.matches("computing on the CPU, though there are GPUs: ").count();
    assert_eq!(warnings, 1, "rank 0 alone says it\n{}", done.stderr);
    assert!(done.stderr.contains("on 2 ranks, on the CPU"), "{}", done.stderr);
    // who asks for the CPU gets it without a word about GPUs
    let asked = two_ranks([true, false], "cpu").unwrap().expect_success("--device cpu");
    assert!(asked.stderr.contains("on 2 ranks, on the CPU") && !asked.stderr.contains("GPU"), "{}", asked.stderr);
}
