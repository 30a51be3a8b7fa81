//! The measuring script for a lent GPU (`bench/gpu.sh`): whole at tiny size on the CPU, and its table, its limits and what
//! it does with a peer that fails, over doubles of the programs that it starts.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{empty_folder, rldiff, run_within, say, Finished};
use serde_json::Value;

/// A program of this text in `folder`.
fn program(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// nvidia-smi as it logs: a line every tenth of a second until it is ended. A card does not tell everything.
const NVIDIA_SMI: &str = r#"#!/bin/bash
case "$*" in *timestamp,index,clocks.sm*) ;; *) exit 9 ;; esac
while :; do
    stamp=$(date '+%Y/%m/%d %H:%M:%S.%3N')
    echo "$stamp, 0, 1500, 2619, 612.50, 61, 40960"
    echo "$stamp, 1, 210, 2619, [N/A], 30, 0"
    sleep 0.1
done
"#;

fn gpu_script(folder: &Path, arguments: &[&str]) -> Command {
    program(folder, "nvidia-smi", NVIDIA_SMI);
    let mut path = vec![folder.to_path_buf()];
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/bench/gpu.sh"));
    command.args(arguments).args(["--out", folder.join("out").to_str().unwrap()]);
    command.env("PATH", std::env::join_paths(path).unwrap());
    command
}

/// The lines of the table, which must be what gpu.json says.
fn lines(folder: &Path) -> Vec<Value> {
    let out = folder.join("out");
    let all: Value = serde_json::from_slice(&fs::read(out.join("gpu.json")).unwrap()).unwrap();
    let lines = all["lines"].as_array().unwrap().clone();
    let table = fs::read_to_string(out.join("gpu.txt")).unwrap();
    for line in &lines {
        let name = line["name"].as_str().unwrap();
        assert!(table.lines().any(|row| row.contains(name)), "{name} is not in\n{table}");
    }
    lines
}

fn named<'a>(lines: &'a [Value], part: u64, name: &str) -> &'a Value {
    let found = lines.iter().find(|line| line["part"] == part && line["name"] == name);
    found.unwrap_or_else(|| panic!("no line {name:?} of part {part} in {lines:#?}"))
}

fn outcome(line: &Value) -> (&str, &str) {
    (line["outcome"].as_str().unwrap(), line["remark"].as_str().unwrap())
}

/// About 25 s of work; seconds of it are Python's imports.
#[test]
fn both_parts_run_whole_on_the_cpu_at_tiny_size() {
    let folder = empty_folder("bench-gpu");
    let python = std::env::var("RLDIFF_TEST_PYTHON").ok().filter(|python| !python.is_empty());
    let tests = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    for part in ["1", "2"] {
        let mut command = gpu_script(&folder, &[part, "--device", "cpu", "--tiny", "--seconds", "900"]);
        command.env("RLDIFF", env!("CARGO_BIN_EXE_rldiff")).env("TESTS", &tests);
        command.env("PYTHON", python.as_deref().unwrap_or("python3")).env_remove("RLDIFF_REQUIRE_GPU");
        run_within(command, Duration::from_secs(920)).expect_success(&format!("bench/gpu.sh {part}"));
    }
    let lines = lines(&folder);

    for part in [1, 2] {
        let product = named(&lines, part, "product");
        assert!(product["tflops"].as_f64().unwrap() > 0.0, "{product}");
        for name in ["roll-out", "update"] {
            let line = named(&lines, part, name);
            assert_eq!(line["outcome"], "done");
            let of_product = line["of_product"].as_f64().unwrap();
            assert!(line["ms"].as_f64().unwrap() > 0.0 && of_product > 0.0 && line["first_s"].is_f64(), "{line}");
            assert!(line["peak_gb"].as_f64().unwrap() > 0.01 && line["of_nominal"].is_null(), "{line}");
            assert_eq!(line["card"]["sm_mhz"], 1500.0, "{line}");
            assert_eq!(line["card"]["celsius_most"], 61.0);
            assert_eq!(line["card"]["watt_mean"], 612.5);
        }
        assert_eq!(outcome(named(&lines, part, "roll-out, graph")), ("left out", "needs a GPU"));
    }
    assert!(outcome(named(&lines, 1, "update")).1.contains("ratio drift 0.0e+00"));
    let iteration = named(&lines, 1, "iteration");
    for part in ["with decoding", "reward ", "rollout "] {
        assert!(outcome(iteration).1.contains(part), "{iteration}");
    }
    for name in ["doctor", "kernels", "update, checkpointing"] {
        assert_eq!(named(&lines, 1, name)["outcome"], "done", "{name}");
    }
    // the test executables lie beside this one where all were built, and skip loudly without a GPU
    for name in ["test gpu_kernels", "test gpu"] {
        let (outcome, remark) = outcome(named(&lines, 1, name));
        let built = outcome == "done" && remark.contains("0 failed");
        assert!(built || (outcome == "left out" && remark.contains("no gpu")), "{name}: {outcome}, {remark}");
    }
    let compiled = lines.iter().filter(|line| line["name"].as_str().unwrap().starts_with("peer compiled"));
    assert_eq!(compiled.filter(|line| outcome(line) == ("left out", "not at tiny size")).count(), 4);

    if python.is_none() {
        say("SKIPPED: the peer of bench/gpu.sh, RLDIFF_TEST_PYTHON is not set (a Python with diffusers)");
        assert_eq!(named(&lines, 1, "peer eager")["outcome"], "failed");
        return;
    }
    for what in ["rollout", "update"] {
        for layout in ["contiguous", "channels-last"] {
            for weights in ["f32", "masters"] {
                let line = named(&lines, 1, &format!("peer {what}, eager, {layout}, {weights}"));
                assert!(line["times_ours"].as_f64().unwrap() > 0.0 && line["peak_gb"].is_f64(), "{line}");
            }
        }
    }
}

/// rldiff whose every figure is known: 8 TFLOP a step or update, 100 ms a step, 400 ms an update, 400 of 1,000 TFLOP/s.
const RLDIFF: &str = r#"#!/bin/bash
memory='"memory": {"host_peak_gb": 3.0, "peak_allocated_gb": 40.5, "peak_reserved_gb": 50.0}'
what=$2 steps=50 graph=false
while [ $# -gt 0 ]; do
    case $1 in --steps) steps=$2 ;; --cuda-graph) graph=true ;; --gradient-checkpointing) recomputed=true ;; esac
    shift
done
pass='"ranks": 1, "ratio_drift": null, "gradient_checkpointing": '${recomputed:-false}', "warm_up_seconds": [9.5], '$memory
case $what in
unet-config) echo '{}' ;;
product) echo '{"what": "product", "tflops": 400.0, "tflops_first_second": 450.0, "tflops_last_second": 399.0, "seconds": 10.0, "nominal_tflops": 1000.0}' ;;
rollout) awk -v n="$steps" 'BEGIN { printf "{\"what\": \"rollout\", \"steps\": %d, \"median_seconds\": %f, \"tflop\": %f, ", n, n / 10, 8 * n }'; echo "$pass}" ;;
update) echo '{"what": "update", "steps": 50, "median_seconds": 0.4, "tflop": 8.0, '"$pass}" ;;
iteration) echo '{"what": "iteration", "median_seconds": 4.0, "samples_per_second_and_rank": 4.0, "seconds": {"rollout": [3.0], "reward": [0.5]}, "leaves_out": ["pretraining step"], "warm_up_seconds": [12.0], '"$memory}" ;;
kernels) echo 'no memory left' >&2; exit 1 ;;
*) echo "rldiff 1.0" ;;
esac
"#;

/// Python whose peer is twice as slow as [`RLDIFF`], cannot be compiled for the roll-out, and compiles an update for ever.
const PYTHON: &str = r#"#!/bin/bash
[ "$1" = bench/peer_diffusers.py ] || exec python3 "$@"
case "$*" in
*rollout*--compile*) echo "RuntimeError: no compiler" >&2; exit 3 ;;
*--compile*) sleep 600 ;;
esac
for weights in bf16 masters; do
    [ $weights != masters ] || [ ! -e "$0.breaks" ] || exit 4
    echo '{"what": "rollout", "steps": 20, "median_seconds": 4.0, "compiled": null, "memory_format": "channels-last", "weights": "'$weights'", "warm_up_seconds": [1.0], "memory": {"peak_allocated_gb": 60.0}}'
done
"#;

fn with_doubles(folder: &Path, arguments: &[&str]) -> Finished {
    let mut command = gpu_script(folder, arguments);
    command.env("RLDIFF", program(folder, "rldiff", RLDIFF)).env("PYTHON", program(folder, "python", PYTHON));
    command.env("TESTS", folder);
    program(
        folder,
        "gpu_kernels-0123456789abcdef",
        "#!/bin/sh\necho 'test result: ok. 5 passed; 0 failed; 0 ignored'\n",
    );
    let a_gpu_is_needed =
        "#!/bin/sh\n[ \"$RLDIFF_REQUIRE_GPU\" = 1 ] || exit 1\necho 'test result: ok. 4 passed; 0 failed'\n";
    program(folder, "gpu-0123456789abcdef", a_gpu_is_needed);
    run_within(command, Duration::from_secs(300))
}

#[test]
fn the_table_of_a_gpu_says_what_each_step_reached_and_of_what() {
    let folder = empty_folder("bench-gpu-table");
    let done = with_doubles(&folder, &["1", "--seconds", "200"]);
    // rldiff's own failure, bench kernels', is the script's
    assert_eq!(done.status.code(), Some(1), "{}{}", done.stdout, done.stderr);
    let lines = lines(&folder);
    let near = |value: &Value, expected: f64| {
        assert!((value.as_f64().unwrap() - expected).abs() < 1e-6, "{value} is not {expected}");
    };
    let graph = named(&lines, 1, "roll-out, graph");
    near(&graph["ms"], 100.0);
    near(&graph["tflops"], 80.0);
    near(&graph["of_product"], 0.2);
    near(&graph["of_nominal"], 0.08);
    near(&graph["first_s"], 9.5);
    near(&graph["peak_gb"], 40.5);
    near(&named(&lines, 1, "update")["of_nominal"], 0.02);
    for weights in ["bf16", "masters"] {
        let peer = named(&lines, 1, &format!("peer rollout, eager, channels-last, {weights}"));
        near(&peer["times_ours"], 2.0);
        near(&peer["tflops"], 40.0);
        near(&peer["peak_gb"], 60.0);
    }
    assert_eq!(outcome(named(&lines, 1, "test gpu_kernels")), ("done", "5 passed, 0 failed"));
    assert_eq!(outcome(named(&lines, 1, "test gpu")), ("done", "4 passed, 0 failed"));
    assert_eq!(outcome(named(&lines, 1, "kernels")), ("failed", "exit code 1: no memory left"));
    let (_, remark) = outcome(named(&lines, 1, "iteration"));
    assert!(remark.contains("reward 0.5 s") && remark.contains("without the paper's pretraining step"), "{remark}");
    assert!(
        named(&lines, 1, "roll-out, graph, again")["ms"].is_f64()
            && named(&lines, 1, "update, graph roll-out")["ms"].is_f64()
    );
    assert!(done.stdout.contains("8.0%") && done.stdout.contains("20.0%"), "{}", done.stdout);
    // what comes back from a machine that is lent, and no more
    let mut files: Vec<_> = fs::read_dir(folder.join("out")).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["gpu.json", "gpu.txt", "part-1.jsonl", "part-1.log", "part-1.smi.csv"]);
}

#[test]
fn a_peer_that_fails_or_compiles_for_ever_is_a_row_and_the_part_ends_in_time() {
    let folder = empty_folder("bench-gpu-peer");
    let done = with_doubles(&folder, &["2", "--seconds", "12"]);
    assert_eq!(done.status.code(), Some(0), "{}{}", done.stdout, done.stderr);
    // 12 s where the machine is quiet
    assert!(done.took < Duration::from_secs(120), "{:?}", done.took);
    let lines = lines(&folder);
    let compiled = |what: &str, mode: &str| outcome(named(&lines, 2, &format!("peer compiled, {what}, {mode}")));
    assert_eq!(compiled("rollout", "default"), ("failed", "exit code 3: RuntimeError: no compiler"));
    let (hung, why) = compiled("update", "default");
    assert!(hung == "timed out" && why.starts_with("not done within"), "{hung}, {why}");
    assert_eq!(compiled("update", "max-autotune-no-cudagraphs"), ("left out", "no time left"));
    assert_eq!(named(&lines, 2, "update")["outcome"], "done");
    // both parts in one table; what the peer had measured before it broke is kept
    fs::write(folder.join("python.breaks"), "").unwrap();
    with_doubles(&folder, &["1", "--seconds", "200"]);
    let mut report = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/bench/gpu.sh"));
    report.arg("report").arg(folder.join("out"));
    let table = run_within(report, Duration::from_secs(240)).expect_success("bench/gpu.sh report").stdout;
    assert!(table.contains("peer compiled, update, default") && table.contains("roll-out, graph, again"), "{table}");
    let both = self::lines(&folder);
    assert_eq!(named(&both, 1, "peer rollout, eager, channels-last, bf16")["outcome"], "done");
    assert_eq!(outcome(named(&both, 1, "peer eager")), ("failed", "exit code 4: nothing on stderr"));
}

/// Scaling of GPUs is measured on GPUs or not at all.
#[test]
fn scaling_on_gpus_that_are_not_there_is_refused_before_any_work() {
    if rldiff::device::parts::gpus().is_ok() {
        say("SKIPPED: there is a GPU");
        return;
    }
    let folder = empty_folder("bench-scaling-cuda");
    for ranks in [1, 2] {
        let mut command = rldiff(ranks, &folder);
        command.args(["bench", "scaling", "--device", "cuda", "--out", "measured"]);
        let done = run_within(command, Duration::from_secs(240));
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        assert!(done.stderr.contains("error: --device cuda: no NVIDIA driver"), "{}", done.stderr);
        assert!(!folder.join("measured").exists());
    }
}

/// The committed prediction is what the program makes of the committed model.
#[test]
fn the_prediction_for_h200s_is_what_its_model_gives() {
    let folder = empty_folder("bench-scaling-h200");
    let runs = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/runs/2026-11-29-2-cores/scaling");
    fs::copy(runs.join("paper-h200.json"), folder.join("paper-h200.json")).unwrap();
    let mut command = rldiff(1, &folder);
    command.args(["bench", "scaling", "--report", ".", "--model", "paper-h200.json"]);
    let done = run_within(command, Duration::from_secs(240)).expect_success("bench scaling --report");
    assert_eq!(done.stdout, fs::read_to_string(runs.join("report.txt")).unwrap());
}

#[test]
fn wrong_arguments_are_told_how_it_is_used() {
    for arguments in [&["3"][..], &[], &["1", "--device", "tpu"], &["1", "--seconds", "ten"], &["report"]] {
        let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/bench/gpu.sh"));
        command.args(arguments);
        let done = run_within(command, Duration::from_secs(20));
        assert_eq!(done.status.code(), Some(2), "{arguments:?}");
        assert!(done.stderr.starts_with("usage: bench/gpu.sh 1|2"), "{}", done.stderr);
    }
}
