//! What the integration tests share: starting ranks, and time limits for everything that is started.
#![allow(dead_code)] // each test target uses its part

pub mod browser;
pub mod network;
pub mod ranks;
pub mod reward_files;
pub mod runs;

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// The launcher of the MPI in use: RLDIFF_MPIRUN, else the one beside MPICC (as set now or when this was built),
/// else `mpirun` on the PATH.
pub fn mpirun_path() -> PathBuf {
    if let Some(path) = std::env::var_os("RLDIFF_MPIRUN") {
        return path.into();
    }
    let compiler = std::env::var("MPICC").ok().or(option_env!("MPICC").map(String::from));
    let beside = compiler.and_then(|mpicc| Some(Path::new(&mpicc).parent()?.join("mpirun")));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| "mpirun".into())
}

/// Does that launcher belong to Open MPI? (MPICH and its kin need no flags.)
pub fn is_open_mpi() -> bool {
    static OPEN_MPI: OnceLock<bool> = OnceLock::new();
    *OPEN_MPI.get_or_init(|| {
        let path = mpirun_path();
        let version = Command::new(&path).arg("--version").output();
        let version = version.unwrap_or_else(|e| panic!("cannot start {} (set RLDIFF_MPIRUN): {e}", path.display()));
        let text = String::from_utf8_lossy(&version.stdout).to_lowercase();
        text.contains("open mpi") || text.contains("open-mpi") || text.contains("openrte")
    })
}

/// What Open MPI's launcher needs on a small machine and as root.
pub const OPEN_MPI_FLAGS: [&str; 2] = ["--oversubscribe", "--allow-run-as-root"];

/// `mpirun -n ranks` with what the launcher needs; add the program and its arguments. Each rank computes with one
/// thread.
pub fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new(mpirun_path());
    if is_open_mpi() {
        command.args(OPEN_MPI_FLAGS);
    }
    command.args(["-n", &ranks.to_string()]).env("OMP_NUM_THREADS", "1");
    command
}

/// Prints a line that the test harness does not hold back: a figure, or that something was skipped.
pub fn say(line: &str) {
    // one write, so that it stays whole
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

/// Held while ranks run, so that the tests of one target do not crowd each other out of their time limits.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a finished command left behind.
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    /// Panics with the output unless the command ended with code 0.
    pub fn expect_success(self, what: &str) -> Self {
        assert!(self.status.success(), "{what}: {}\n{}\n{}", self.status, self.stdout, self.stderr);
        self
    }
}

/// Runs `command` to its end; past `limit` it is killed and the test fails with what it printed.
pub fn run_within(mut command: Command, limit: Duration) -> Finished {
    // files instead of pipes: a grandchild that outlives the launcher cannot block the reading
    let mut outputs = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    command.stdin(Stdio::null());
    command.stdout(outputs[0].try_clone().unwrap()).stderr(outputs[1].try_clone().unwrap());
    let begun = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let ended = wait_until(&mut child, begun + limit);
    if ended.is_none() {
        stop(&mut child);
    }
    let took = begun.elapsed();
    let [stdout, stderr] = outputs.each_mut().map(|file| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    match ended {
        Some(status) => Finished { status, stdout, stderr, took },
        None => panic!("{command:?} was still running after {limit:?}\n{stdout}\n{stderr}"),
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// Asks the launcher to end, so that it takes its ranks along, and insists after two seconds.
fn stop(child: &mut Child) {
    // SAFETY: a signal to a child that has not been waited for, so its id cannot have passed to another process.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    if wait_until(child, Instant::now() + Duration::from_secs(2)).is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// An empty folder of this name for a test's files; what an earlier run of the test left is removed.
pub fn empty_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).unwrap();
    }
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// The program on `ranks` ranks (one rank: without a launcher) in `folder`; add its arguments.
pub fn rldiff(ranks: usize, folder: &Path) -> Command {
    let program = env!("CARGO_BIN_EXE_rldiff");
    let mut command = if ranks == 1 { Command::new(program) } else { mpirun(ranks) };
    if ranks > 1 {
        command.arg(program);
    }
    command.current_dir(folder).env("OMP_NUM_THREADS", "1");
    command
}

/// Settings that make the embedded joint experiment small: a second of work per iteration.
pub const SMALL: [&str; 17] = [
    "run.iterations=2",
    "run.checkpoint_every=1",
    "run.keep_checkpoints=9",
    "run.lanes=4",
    "method.timesteps=2",
    "pretrain.batch_per_lane=2",
    "evaluation.pictures=2",
    "evaluation.every=0",
    "task.composition.samples=4",
    "task.composition.evaluation_samples=4",
    "pretrain.steps=1",
    "task.parity.images_per_prompt=2",
    "task.parity.evaluation_images_per_prompt=2",
    "task.parity.samples=8",
    "task.parity.evaluation_samples=8",
    "task.preference.samples=4",
    "task.preference.evaluation_samples=4",
];

/// `--set` before each setting.
pub fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", *setting]).collect()
}

/// All files below `folder`, sorted, with their contents.
pub fn files_below(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.push((path, bytes));
        }
    }
    found.sort();
    found
}

/// All processes that descend from `root`, itself included (the launcher puts ranks in process groups of their own).
pub fn descendants(root: i32) -> Vec<i32> {
    let parent_of = |pid: i32| -> Option<i32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // "pid (name) state parent …"; the name may hold anything
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let all: Vec<(i32, i32)> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent_of(pid)?)))
        .collect();
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let here = found[next];
        found.extend(all.iter().filter(|(_, parent)| *parent == here).map(|(pid, _)| *pid));
        next += 1;
    }
    found
}

/// The processes among `descendants(root)` that are this program and handle the signals that ask a run to stop.
pub fn listening_ranks(root: i32) -> Vec<i32> {
    let listens = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let caught = u64::from_str_radix(field("SigCgt:"), 16).unwrap_or(0);
        let wanted = [libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2].iter().fold(0, |mask, s| mask | 1 << (s - 1));
        field("Name:") == "rldiff" && caught & wanted == wanted
    };
    descendants(root).into_iter().filter(listens).collect()
}
