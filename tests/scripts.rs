//! The shell scripts around the program, as far as they can be seen without a network and without a cluster: which libtorch
//! the set-up installs, and which device the batch scripts pass on.

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{empty_folder, run_within, Finished};

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A venv whose pip only writes down what it is asked for.
fn venv(name: &str) -> PathBuf {
    let venv = empty_folder(name);
    fs::create_dir_all(venv.join("bin")).unwrap();
    let pip = venv.join("bin/pip");
    fs::write(&pip, "#!/bin/sh\necho \"$*\" >> \"$(dirname \"$0\")/../asked\"\n").unwrap();
    fs::set_permissions(&pip, fs::Permissions::from_mode(0o755)).unwrap();
    venv
}

/// `tools/setup.sh` with RLDIFF_CUDA; nothing of the machine's own is used.
fn set_up(venv: &Path, cuda: Option<&str>) -> Finished {
    let mut command = Command::new(project().join("tools/setup.sh"));
    command.env("RLDIFF_VENV", venv);
    for own in ["LIBTORCH", "MPICC", "HDF5_DIR", "LIBCLANG_PATH", "RLDIFF_CUDA"] {
        command.env_remove(own);
    }
    cuda.map(|cuda| command.env("RLDIFF_CUDA", cuda));
    run_within(command, Duration::from_secs(30))
}

/// What pip was asked for since the last look.
fn asked(venv: &Path) -> String {
    let file = venv.join("asked");
    let asked = fs::read_to_string(&file).unwrap_or_default();
    let _ = fs::remove_file(file);
    asked
}

#[test]
fn a_login_node_without_a_driver_installs_the_libtorch_that_is_asked_for() {
    const WITH: &str = "torch==2.11.0 numpy\n";
    const WITHOUT: &str = "--no-deps torch==2.11.0 nvidia-cuda-runtime";
    let venv = venv("set-up-cuda");
    let driver = Path::new("/proc/driver/nvidia/version").exists();
    for (cuda, wanted, not) in [
        (Some("1"), WITH, WITHOUT),
        (Some("0"), WITHOUT, WITH),
        (None, if driver { WITH } else { WITHOUT }, if driver { WITHOUT } else { WITH }),
    ] {
        set_up(&venv, cuda).expect_success(&format!("set-up with {cuda:?}"));
        let torch: String =
            asked(&venv).lines().filter(|line| line.contains("torch==")).map(|l| format!("{l}\n")).collect();
        if !(cuda.is_none() && torch.is_empty()) {
            assert!(torch.contains(wanted) && !torch.contains(not), "{cuda:?}: {torch}");
        }
    }
    // nothing is done twice, and a change of mind is done
    set_up(&venv, Some("1")).expect_success("CUDA");
    assert!(asked(&venv).contains(WITH));
    set_up(&venv, Some("1")).expect_success("CUDA again");
    assert_eq!(asked(&venv), "");
    let refused = set_up(&venv, Some("yes"));
    assert!(
        !refused.status.success() && refused.stderr.contains("RLDIFF_CUDA=yes is neither 0 nor 1"),
        "{}",
        refused.stderr
    );
}

/// What the batch scripts pass as `--device` where the environment has `variables` and no other of Slurm's.
fn device(variables: &[(&str, &str)]) -> String {
    let mut command = Command::new("bash");
    command.args(["-c", "source slurm/lib.sh && echo \"device $device\""]).current_dir(project()).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap()).env("SLURM_SUBMIT_DIR", project());
    command.envs(variables.iter().copied());
    let done = run_within(command, Duration::from_secs(20)).expect_success("slurm/lib.sh");
    done.stdout.trim().strip_prefix("device ").expect("a device").to_string()
}

#[test]
fn a_job_with_gpus_computes_on_them_or_ends() {
    for (variables, wanted) in [
        (&[("SLURM_GPUS_ON_NODE", "8")][..], "cuda"),
        (&[("SLURM_GPUS_PER_NODE", "h200:8")], "cuda"),
        (&[("SLURM_JOB_GPUS", "0")], "cuda"),
        (&[("SLURM_GPUS_ON_NODE", "0")], "auto"),
        (&[("SLURM_GPUS_PER_NODE", "h200:0")], "auto"),
        (&[], "auto"),
        (&[("SLURM_GPUS_ON_NODE", "8"), ("RLDIFF_DEVICE", "cpu")], "cpu"),
    ] {
        assert_eq!(device(variables), wanted, "{variables:?}");
    }
}

/// Whoever adds a batch script must not forget it.
#[test]
fn every_script_that_computes_passes_the_device() {
    for entry in fs::read_dir(project().join("slurm")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        if path.extension().is_none_or(|e| e != "sh") {
            continue;
        }
        for line in text.lines().filter(|line| line.trim_start().starts_with("launch \"$")) {
            let computes = [" doctor", " train ", " eval ", " study "].iter().any(|command| line.contains(command));
            assert!(!computes || line.contains("--device \"$device\""), "{}: {line}", path.display());
        }
    }
}
