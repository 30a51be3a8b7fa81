//! `sbatch slurm/joint.sh` on a real Slurm cluster of four virtual nodes (tests/slurm/cluster.sh): whatever happens to
//! the job, it goes on by itself and ends in the state of the run that nothing interrupted.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use common::{
    descendants, empty_folder, is_open_mpi, mpirun_path, one_at_a_time, rldiff, run_within, say, set, OPEN_MPI_FLAGS,
    SMALL,
};
use rldiff::{
    device::parts,
    store,
    telemetry::{read_metrics, RunFiles},
};

/// For anything that a job does, with all the others on two busy cores.
const LIMIT: Duration = Duration::from_secs(200);
/// For a client of Slurm; it may wait for a daemon that is busy.
const CLIENT: Duration = Duration::from_secs(30);
const SETTINGS: [&str; 3] = ["method.timesteps=1", "rollout.steps=3", "run.checkpoint_every=2"];
/// Of the uninterrupted run. A job does the first of them, as many as its case needs.
const ITERATIONS: u64 = 16;

/// What is missing for a cluster, if anything.
fn missing() -> Option<String> {
    // SAFETY: only reads the user's id.
    if unsafe { libc::geteuid() } != 0 {
        return Some("root (slurmd needs it)".into());
    }
    let on_path = |name: &&str| {
        let folders = std::env::var("PATH").unwrap_or_default();
        folders.split(':').any(|folder| Path::new(folder).join(name).is_file())
    };
    let programs = ["slurmctld", "slurmd", "munged", "sbatch", "srun", "unshare", "nsenter"];
    if let Some(absent) = programs.iter().find(|name| !on_path(name)) {
        return Some(format!("{absent} (tools/setup-slurm.sh installs it)"));
    }
    let namespaces = Command::new("unshare").args(["--mount", "--uts", "true"]).output();
    (!namespaces.is_ok_and(|o| o.status.success())).then(|| "the right to make namespaces".into())
}

struct Cluster {
    state: PathBuf,
    /// Where jobs write.
    jobs: PathBuf,
    conf: String,
}

fn script(verb: &str, state: &Path) -> Command {
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slurm/cluster.sh"));
    command.arg(verb).arg(state);
    command
}

impl Cluster {
    fn up(jobs: PathBuf) -> Self {
        // a short path: munge's socket has to fit in 108 bytes
        let state = tempfile::Builder::new().prefix("rldiff-slurm-").tempdir().unwrap().keep();
        let mut cluster = Cluster { state: state.clone(), jobs, conf: String::new() };
        let mut up = script("up", &state);
        up.env("RLDIFF_TEST_GUARDIAN", std::process::id().to_string());
        let done = run_within(up, Duration::from_secs(60)).expect_success("the cluster");
        let conf = done.stdout.lines().find_map(|line| line.strip_prefix("SLURM_CONF="));
        cluster.conf = conf.expect("the script names the configuration").to_string();
        cluster
    }

    /// A client of Slurm with the environment of the jobs; what it prints.
    fn client(&self, program: &str, args: &[&str]) -> String {
        self.client_with(program, args, &[])
    }

    fn client_with(&self, program: &str, args: &[&str], environment: &[(&str, String)]) -> String {
        let mut command = Command::new(program);
        command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
        command.env("SLURM_CONF", &self.conf).envs(environment.iter().map(|(name, value)| (name, value)));
        run_within(command, CLIENT).expect_success(&format!("{program} {args:?}")).stdout.trim().to_string()
    }

    /// Submits `slurm/joint.sh` on the small miniature; `options` are sbatch's.
    fn submit(&self, name: &str, launcher: &str, iterations: u64, options: &[&str]) -> Job<'_> {
        self.submit_script(&["slurm/joint.sh"], name, launcher, iterations, options)
    }

    /// The same with another script and its arguments.
    fn submit_script(&self, script: &[&str], name: &str, launcher: &str, iterations: u64, options: &[&str]) -> Job<'_> {
        self.submit_with(script, name, launcher, iterations, options, &[])
    }

    /// The same with `more` variables, which win.
    fn submit_with(
        &self,
        script: &[&str],
        name: &str,
        launcher: &str,
        iterations: u64,
        options: &[&str],
        more: &[(&'static str, String)],
    ) -> Job<'_> {
        let settings = [&SMALL[..], &SETTINGS].concat();
        let iterations_setting = format!("run.iterations={iterations}");
        let arguments = [set(&settings), set(&[&iterations_setting])].concat().join(" ");
        // what a rank that died leaves behind is given up after 5 s instead of 30
        let srun = if is_open_mpi() { "--mpi=pmix --wait=5" } else { "--mpi=pmi2 --wait=5" };
        let mpirun_flags = if is_open_mpi() { OPEN_MPI_FLAGS.join(" ") } else { String::new() };
        let out = self.jobs.join(name);
        let environment = [
            ("RLDIFF", env!("CARGO_BIN_EXE_rldiff").to_string()),
            ("RLDIFF_CONFIG", "slurm/miniature-joint.toml".into()),
            ("RLDIFF_OUT", out.display().to_string()),
            ("RLDIFF_ARGS", arguments),
            ("RLDIFF_LAUNCHER", launcher.into()),
            // the nodes only pretend to have GPUs
            ("RLDIFF_DEVICE", "cpu".into()),
            ("RLDIFF_SRUN_FLAGS", srun.into()),
            ("RLDIFF_MPIRUN", mpirun_path().display().to_string()),
            ("RLDIFF_MPIRUN_FLAGS", mpirun_flags),
            ("OMP_NUM_THREADS", "1".into()),
            // nodes speak through the loopback device only, as if they had nothing else in common; MPICH's other netmod,
            // UCX, does not take that device for the way to another host
            ("MPIR_CVAR_CH4_NETMOD", "ofi".into()),
            ("FI_PROVIDER", "tcp".into()),
            ("FI_TCP_IFACE", "lo".into()),
            ("OMPI_MCA_btl_tcp_if_include", "lo".into()),
            ("OMPI_MCA_oob_tcp_if_include", "lo".into()),
        ];
        let environment = [&environment[..], more].concat();
        let output = self.jobs.join(format!("{name}.out"));
        let mut args = vec!["--parsable".to_string(), format!("--job-name={name}")];
        args.extend(["--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=8"].map(String::from));
        args.push(format!("--output={}", output.display()));
        args.extend(options.iter().map(|option| option.to_string()));
        args.extend(script.iter().map(|part| part.to_string()));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let id = self.client_with("sbatch", &args, &environment);
        Job { cluster: self, id, name: name.into(), iterations, output, files: RunFiles::new(out) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let down = script("down", &self.state).output();
        let left = || {
            let listed = script("processes", &self.state).output();
            listed.map_or("unknown".to_string(), |o| String::from_utf8_lossy(&o.stdout).trim().replace('\n', " "))
        };
        // the guardian looks twice a second whether it is still needed
        let started = Instant::now();
        while !left().is_empty() && started.elapsed() < Duration::from_secs(5) {
            sleep(Duration::from_millis(200));
        }
        let left = left();
        if std::thread::panicking() {
            say(&format!("the cluster's logs are in {}", self.state.join("log").display()));
            return;
        }
        assert!(down.is_ok_and(|o| o.status.success()), "cluster.sh down failed");
        assert!(left.is_empty(), "processes of the cluster are left: {left}");
        let _ = fs::remove_dir_all(&self.state);
    }
}

struct Job<'c> {
    cluster: &'c Cluster,
    id: String,
    name: String,
    iterations: u64,
    output: PathBuf,
    files: RunFiles,
}

impl Job<'_> {
    fn log(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// A field of what Slurm says about the job.
    fn field(&self, name: &str) -> String {
        let text = self.cluster.client("scontrol", &["--oneliner", "show", "job", &self.id]);
        let found = text.split_whitespace().find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("{}: no {name} in {text}", self.name)).to_string()
    }

    fn wait_for(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let started = Instant::now();
        while !condition() {
            let log = self.log();
            assert!(started.elapsed() < LIMIT, "{}: no {what} after {LIMIT:?}; its output:\n{log}", self.name);
            sleep(Duration::from_millis(100));
        }
    }

    fn wait_for_iterations(&self, count: usize) {
        let lines = || read_metrics(&self.files.metrics()).map_or(0, |metrics| metrics.len());
        self.wait_for(&format!("{count} iterations"), || lines() >= count);
    }

    fn wait_for_state(&self, wanted: &str) {
        self.wait_for(wanted, || {
            let state = self.field("JobState");
            assert!(state == wanted || state != "FAILED", "{}: {state}\n{}", self.name, self.log());
            state == wanted
        });
    }

    /// Process ids of the job's ranks.
    fn ranks(&self) -> Vec<i32> {
        let marks = [format!("SLURM_JOB_ID={}", self.id), format!("SLURM_CONF={}", self.cluster.conf)];
        let is_rank = |pid: &i32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let has = |mark: &String| environment.split(|&byte| byte == 0).any(|v| v == mark.as_bytes());
            name.trim() == "rldiff" && marks.iter().all(has)
        };
        descendants(1).into_iter().filter(is_rank).collect()
    }

    /// The job comes to its end, after at least `restarts` further starts, in the state of the uninterrupted run.
    fn ends_like(&self, straight: &RunFiles, restarts: usize) {
        self.wait_for_state("COMPLETED");
        let log = self.log();
        assert!(log.contains(": done"), "{}\n{log}", self.name);
        let started_again: usize = self.field("Restarts").parse().unwrap();
        assert!(started_again >= restarts, "{}: {started_again} restarts\n{log}", self.name);
        if restarts > 0 {
            assert!(log.contains("resuming"), "{}: began anew\n{log}", self.name);
        }
        let expected = store::digest(&straight.checkpoints().join(format!("iteration-{:06}", self.iterations)));
        assert_eq!(store::digest(self.files.root()).unwrap(), expected.unwrap(), "{}: another state", self.name);
        assert!(self.files.summary().is_file(), "{}: no results", self.name);
        let lines = read_metrics(&self.files.metrics()).unwrap();
        assert_eq!(lines.len() as u64, self.iterations, "{}: lines of metrics", self.name);
    }
}

fn uninterrupted(jobs: &Path) -> RunFiles {
    let files = RunFiles::new(jobs.join("straight"));
    let mut command = rldiff(1, jobs);
    let iterations = format!("run.iterations={ITERATIONS}");
    command.args(set(&SMALL)).args(set(&SETTINGS)).args(["--set", &iterations, "--set", "run.keep_checkpoints=99"]);
    command.arg("--out").arg(files.root());
    run_within(command, LIMIT).expect_success("the uninterrupted run");
    files
}

/// The cases in which jobs run beside each other.
fn beside_each_other(cluster: &Cluster, straight: &RunFiles) {
    let case =
        |name: &'static str, launcher: &'static str, iterations, options: &[&str], restarts, act: &dyn Fn(&Job)| {
            let started = Instant::now();
            let job = cluster.submit(name, launcher, iterations, options);
            act(&job);
            job.ends_like(straight, restarts);
            say(&format!("slurm, {name} ({launcher}): same state, {:.0} s", started.elapsed().as_secs_f64()));
        };
    let usr1 = |job: &Job| {
        job.wait_for_iterations(3);
        cluster.client("scancel", &["--batch", "--signal=USR1", &job.id]);
    };
    let kill_a_rank = |job: &Job| {
        job.wait_for_iterations(3);
        let rank = *job.ranks().last().expect("a rank runs");
        // SAFETY: a signal to a rank of a job of this test.
        unsafe { libc::kill(rank, libc::SIGKILL) };
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            case("to-the-end", "mpirun", 4, &["--nodes=2"], 0, &|_| {});
            let again = cluster.submit("to-the-end", "mpirun", 4, &["--nodes=2"]);
            again.wait_for_state("COMPLETED");
            assert!(again.log().contains("all 4 iterations are done"), "{}", again.log());
            other_scripts(cluster, again.files.root());
        });
        scope.spawn(|| {
            usr1_to(cluster, straight, "srun", &usr1);
            usr1_to(cluster, straight, "mpirun", &usr1);
        });
        // Slurm itself sends USR1, 5 to 15 s after each start
        scope.spawn(|| {
            let options = ["--time=1", "--signal=B:USR1@45", "--nodes=2"];
            case("time-limit", "srun", ITERATIONS, &options, 1, &|_| {})
        });
        scope.spawn(|| {
            case("scontrol-requeue", "srun", 6, &["--nodes=2"], 1, &|job| {
                job.wait_for_iterations(3);
                cluster.client("scontrol", &["requeue", &job.id]);
            });
            case("rank-killed", "mpirun", 6, &["--nodes=2"], 1, &kill_a_rank);
        });
        scope.spawn(|| case("rank-killed-4", "srun", 6, &[], 1, &kill_a_rank));
        scope.spawn(|| {
            smoke(cluster);
            not_started_again(cluster)
        });
    });
}

fn usr1_to(cluster: &Cluster, straight: &RunFiles, launcher: &str, usr1: &dyn Fn(&Job)) {
    let job = cluster.submit(&format!("usr1-{launcher}"), launcher, 6, &["--nodes=2"]);
    usr1(&job);
    job.ends_like(straight, 1);
    assert!(job.log().contains("asked to stop: saved after iteration"), "{}", job.log());
    say(&format!("slurm, USR1 ({launcher}): same state"));
}

/// Evaluation of a model that another job has tuned, and scaling on 1 and 2 ranks.
fn other_scripts(cluster: &Cluster, tuned: &Path) {
    let script = ["slurm/evaluation.sh", tuned.to_str().unwrap()];
    let evaluation = cluster.submit_script(&script, "evaluation", "srun", 1, &["--nodes=2"]);
    let scaling = cluster.submit_script(&["slurm/scaling.sh"], "scaling", "srun", 1, &["--nodes=2"]);
    evaluation.wait_for_state("COMPLETED");
    let scores = fs::read_to_string(evaluation.files.root().join("evaluation.json")).unwrap();
    let scores: serde_json::Value = serde_json::from_str(&scores).unwrap();
    let models: Vec<_> = scores.as_array().unwrap().iter().map(|model| model["model"].as_str().unwrap()).collect();
    assert_eq!(models, ["miniature", script[1]], "{}", evaluation.log());
    scaling.wait_for_state("COMPLETED");
    for file in ["ranks-0001.json", "ranks-0002.json", "model.json", "scaling.png"] {
        assert!(scaling.files.root().join(file).is_file(), "{file}\n{}", scaling.log());
    }
    assert!(scaling.log().contains("\n  1024 "), "{}", scaling.log());
    say("slurm: evaluation.sh and scaling.sh end with their results");
}

/// `slurm/smoke.sh` on the miniature as it is small.
fn smoke(cluster: &Cluster) {
    let job = cluster.submit_script(&["slurm/smoke.sh"], "smoke", "srun", 2, &["--nodes=4"]);
    job.wait_for_state("COMPLETED");
    let log = job.log();
    for part in ["MPI works        yes", "HDF5 works       yes", "on 4 ranks, on the CPU", ": done"] {
        assert!(log.contains(part), "{part}\n{log}");
    }
    assert_eq!(read_metrics(&job.files.metrics()).unwrap().len(), 2, "{log}");
    say("slurm: smoke.sh ends with its two iterations");
}

/// A mistake and a cancelled job stay as they are.
fn not_started_again(cluster: &Cluster) {
    let mistaken = cluster.submit("mistake", "srun", 1 << 33, &["--nodes=1"]);
    mistaken.wait_for("failure", || mistaken.field("JobState") == "FAILED");
    assert_eq!((mistaken.field("Restarts").as_str(), mistaken.field("ExitCode").as_str()), ("0", "2:0"));
    assert!(mistaken.log().contains("run.iterations"), "{}", mistaken.log());

    if parts::gpus().is_err() {
        // the job was given GPUs, and the nodes have none that work: it ends at once instead of crawling on CPUs
        let by_default = [("RLDIFF_DEVICE", String::new())];
        let trapped = cluster.submit_with(&["slurm/joint.sh"], "trapped", "srun", 4, &["--nodes=2"], &by_default);
        trapped.wait_for("failure", || trapped.field("JobState") == "FAILED");
        assert_eq!((trapped.field("Restarts").as_str(), trapped.field("ExitCode").as_str()), ("0", "2:0"));
        let told =
            trapped.log().contains("error: --device cuda: no NVIDIA driver: libcuda.so.1 was not found (rank 0 on n");
        assert!(told && !trapped.files.metrics().exists(), "{}", trapped.log());
        // one without GPUs computes on CPUs
        let options = ["--nodes=2", "--gpus-per-node=0"];
        let plain = cluster.submit_with(&["slurm/joint.sh"], "without-gpus", "srun", 1, &options, &by_default);
        plain.wait_for_state("COMPLETED");
        assert!(plain.log().contains("on 2 ranks, on the CPU"), "{}", plain.log());
        say("slurm: a job with GPUs that do not work ends with a message");
    }

    let cancelled = cluster.submit("cancelled", "srun", ITERATIONS, &["--nodes=2"]);
    cancelled.wait_for_iterations(1);
    cluster.client("scancel", &[&cancelled.id]);
    cancelled.wait_for("end of the cancelled job", || cancelled.field("JobState") == "CANCELLED");
    // a requeued job would be pending by now
    sleep(Duration::from_secs(3));
    assert_eq!((cancelled.field("JobState").as_str(), cancelled.field("Restarts").as_str()), ("CANCELLED", "0"));
    say("slurm: a mistake and a cancelled job are not started again");
}

/// Iterations are many enough for both jobs to be at work when the slower one has done three.
fn preemption(cluster: &Cluster, straight: &RunFiles) {
    let jobs = ["srun", "mpirun"].map(|launcher| cluster.submit(&format!("preempted-{launcher}"), launcher, 10, &[]));
    jobs.iter().for_each(|job| job.wait_for_iterations(3));
    let output = format!("--output={}", cluster.jobs.join("urgent.out").display());
    let options = ["--parsable", "--partition=urgent", "--exclusive", "--nodes=4", "--time=1", &output];
    let urgent = cluster.client("sbatch", &[&options[..], &["--wrap", "date +%s"]].concat());
    for job in &jobs {
        job.ends_like(straight, 1);
    }
    let state = cluster.client("scontrol", &["--oneliner", "show", "job", &urgent]);
    assert!(state.contains("JobState=COMPLETED"), "the urgent job did not run: {state}");
    say("slurm, preempted by a higher partition (srun, mpirun): same state");
}

/// As above.
fn lost_node(cluster: &Cluster, straight: &RunFiles) {
    // no GPUs: Slurm 22.05 may start the job on a node that is just back without them, and then refuse its steps; srun
    // gives up at once and the script tries again, but MPICH's mpirun waits for its srun for ever
    let submit = |launcher| cluster.submit(&format!("node-lost-{launcher}"), launcher, 12, &["--gpus-per-node=0"]);
    let jobs = ["srun", "mpirun"].map(submit);
    jobs.iter().for_each(|job| job.wait_for_iterations(3));
    run_within(
        {
            let mut lose = script("lose-node", &cluster.state);
            lose.arg("n3");
            lose
        },
        CLIENT,
    )
    .expect_success("lose-node");
    let down = || cluster.client("sinfo", &["--noheader", "--nodes=n3", "--partition=main", "--format=%T"]);
    jobs[0].wait_for("n3 to be down", || down().starts_with("down"));
    let mut start = script("start-node", &cluster.state);
    start.arg("n3");
    run_within(start, CLIENT).expect_success("start-node");
    for job in &jobs {
        job.ends_like(straight, 1);
    }
    say("slurm, a node lost (srun, mpirun): same state");
}

#[test]
fn jobs_survive_what_slurm_and_its_nodes_do_to_them() {
    if let Some(missing) = missing() {
        say(&format!("SKIPPED: the tests on a real Slurm cluster need {missing}"));
        return;
    }
    let _alone = one_at_a_time();
    let started = Instant::now();
    let jobs = empty_folder("slurm-jobs");
    let cluster = Cluster::up(jobs.clone());
    let straight = uninterrupted(&jobs);
    beside_each_other(&cluster, &straight);
    preemption(&cluster, &straight);
    lost_node(&cluster, &straight);
    say(&format!("slurm: all cases in {:.0} s", started.elapsed().as_secs_f64()));
}
