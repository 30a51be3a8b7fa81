//! The communicator and the checkpoints among real ranks: each test starts `mpirun` on this very executable, whose
//! ignored test `rank_body` is what a rank does.

mod common;

use common::{
    empty_folder,
    ranks::{launch, rank, succeeds, CASE, RANK_BODY},
    run_within, Finished,
};
use rldiff::comm::{self, tree_sum, Around, Communicator, Operation, TreeSum};
use rldiff::kernels::cuda::{share_with, shared_bytes, Architecture, Source, SOURCES};
use rldiff::store::{self, CheckpointRef, ParameterEntry};
use serde_json::json;
use std::cell::Cell;
use std::path::PathBuf;
use std::time::Duration;

const FOLDER: &str = "RLDIFF_TEST_FOLDER";

/// Not a test of its own: the body of each rank that the tests below start.
#[test]
#[ignore = "run by mpirun from the other tests"]
fn rank_body() {
    rank(|case, comm| match case {
        "sums" => sums(comm),
        "lanes" => lanes(comm),
        "messages" => messages(comm),
        "agreement" => agreement(comm),
        "panic" => one_panics(comm, false),
        "panic in a thread" => one_panics(comm, true),
        "abort" => one_aborts(comm),
        "save" => save(comm),
        "load" => load(comm),
        "load what not all see" => load_what_not_all_see(comm),
        "failing save" => failing_save(comm),
        "one is late" => one_is_late(comm),
        "items" => items(comm),
        "kernels" => kernels(comm),
        "broken kernels" => broken_kernels(comm),
        other => panic!("unknown case {other}"),
    });
}

/// Values whose sums depend on the order of the additions.
fn leaf(index: usize, length: usize) -> Vec<f32> {
    let value = |i: usize| {
        let word = ((i * 1000 + index) as u32).wrapping_mul(0x9E37_79B9) ^ (i as u32).wrapping_mul(0x85EB_CA6B);
        (word >> 8) as f32 / 8_388_608.0 * 10f32.powi((word % 7) as i32) * if word & 8 == 0 { 1.0 } else { -1.0 }
    };
    (0..length).map(value).collect()
}

fn assert_same_bits(a: &[f32], b: &[f32], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let differing = a.iter().zip(b).filter(|(x, y)| x.to_bits() != y.to_bits()).count();
    assert_eq!(differing, 0, "{what}: {differing} of {} elements differ", a.len());
}

fn sums(comm: &dyn Communicator) {
    for length in [0, 1, 7, 1_000_003] {
        let leaves: Vec<Vec<f32>> = (0..comm.size()).map(|rank| leaf(rank, length)).collect();
        let mut sum = leaves[comm.rank()].clone();
        comm.all_reduce_sum_f32(&mut sum).unwrap();
        assert_same_bits(&sum, &tree_sum(&leaves), &format!("{length} elements"));
        if length > 7 && comm.size() >= 4 {
            let mut in_order = leaves[0].clone();
            for leaf in &leaves[1..] {
                in_order.iter_mut().zip(leaf).for_each(|(a, b)| *a += b);
            }
            assert!(sum.iter().zip(&in_order).any(|(a, b)| a.to_bits() != b.to_bits()), "the order does not show");
        }
    }
}

fn lanes(comm: &dyn Communicator) {
    const LANES: usize = 16;
    let of_rank = LANES / comm.size();
    let leaves: Vec<Vec<f32>> = (0..LANES).map(|lane| leaf(lane, 1001)).collect();
    let mut tree = TreeSum::new(1001);
    for lane in &leaves[comm.rank() * of_rank..(comm.rank() + 1) * of_rank] {
        tree.push(lane.clone());
    }
    let mut sum = tree.finish();
    comm.all_reduce_sum_f32(&mut sum).unwrap();
    assert_same_bits(&sum, &tree_sum(&leaves), "16 lanes");
}

fn messages(comm: &dyn Communicator) {
    let (rank, size) = (comm.rank(), comm.size());
    for root in 0..size {
        let mut bytes = vec![rank as u8; 10 * rank + 1];
        comm.broadcast_bytes(&mut bytes, root).unwrap();
        assert_eq!(bytes, vec![root as u8; 10 * root + 1]);
        let mut values = leaf(rank, 1001);
        comm.broadcast_f32(&mut values, root).unwrap();
        assert_same_bits(&values, &leaf(root, 1001), "broadcast");
    }
    // nothing, a little, and more than one call or one message carries
    for unit in [0usize, 3, 40_000_000 / size] {
        let bytes_of = |rank: usize| vec![rank as u8 + 1; unit * (rank % 3 + usize::from(unit > 3))];
        let all = comm.all_gather_bytes(&bytes_of(rank)).unwrap();
        assert_eq!(all.len(), size);
        assert!(all.iter().enumerate().all(|(r, bytes)| *bytes == bytes_of(r)), "gather of {unit}");
    }
    let mut large = vec![rank as f32 + 1.0; (1 << 24) + 5];
    comm.broadcast_f32(&mut large, size - 1).unwrap();
    assert!(large.iter().all(|&v| v == size as f32));
    assert_eq!(comm.local_rank(), (rank, size), "all ranks of this test share a host");
    comm.barrier().unwrap();
}

/// Seconds of a core that this process has used.
fn cpu_seconds() -> f64 {
    let mut used = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one time.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut used) }, 0);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// An operation of all ranks, with its name.
type Named<'a> = (&'a str, Box<dyn FnMut() + 'a>);

/// The last rank comes late to one operation after the other; what do the others use meanwhile?
fn one_is_late(comm: &dyn Communicator) {
    const LATE: Duration = Duration::from_millis(1500);
    let last = comm.size() - 1;
    assert!(comm.sleeps());
    let mut bytes = vec![1u8; 100];
    let mut values = vec![1f32; 3000];
    let mut narrow = vec![half::bf16::ONE; 3000];
    let mut operations: Vec<Named> = vec![
        ("barrier", Box::new(|| comm.barrier().unwrap())),
        ("broadcast of bytes", Box::new(|| comm.broadcast_bytes(&mut bytes, last).unwrap())),
        ("gather", Box::new(|| assert_eq!(comm.all_gather_bytes(b"me").unwrap().len(), last + 1))),
        ("agreement", Box::new(|| comm::agree(comm, Ok(())).unwrap())),
        ("sum", Box::new(|| comm.all_reduce_sum_f32(&mut values).unwrap())),
        ("sum of bf16", Box::new(|| comm.all_reduce_sum_bf16(&mut narrow).unwrap())),
    ];
    for (name, operation) in &mut operations {
        comm.barrier().unwrap();
        if comm.rank() == last {
            std::thread::sleep(LATE);
        }
        let (begun, used) = (std::time::Instant::now(), cpu_seconds());
        operation();
        let (waited, used) = (begun.elapsed(), cpu_seconds() - used);
        if comm.rank() != last {
            assert!(waited > LATE / 2, "{name}: nobody was late, {waited:?}");
            assert!(used < 0.1, "rank {} used {used:.3} s of a core in a {name} of {waited:?}", comm.rank());
        }
    }
}

/// Small things go together, one that is larger than a message by itself, and nothing is something too.
fn items(comm: &dyn Communicator) {
    let lengths = [0, 3, 7, 20_000_000, 1, 0, 16_000_000, 2_000_000, 5];
    let content = |item: usize| -> Vec<u8> { (0..lengths[item]).map(|i| (i % 251 + item) as u8).collect() };
    let counted = Counted { inner: comm, broadcasts: Cell::new(0) };
    let mut taken = Vec::new();
    comm::broadcast_items(
        &counted,
        &lengths,
        |item| {
            assert_eq!(comm.rank(), 0);
            Ok(content(item))
        },
        |item, bytes| {
            assert!(bytes == content(item), "item {item}");
            taken.push(item);
            Ok(())
        },
    )
    .unwrap();
    let all: Vec<usize> = if comm.rank() == 0 { Vec::new() } else { (0..lengths.len()).collect() };
    assert_eq!(taken, all);
    assert_eq!(counted.broadcasts.get(), 4, "three small ones, the large one, two small and a large one, the rest");
    comm::broadcast_items(comm, &[], |_| panic!("nothing to give"), |_, _| panic!("nothing to take")).unwrap();
}

/// Counts broadcasts.
struct Counted<'a> {
    inner: &'a dyn Communicator,
    broadcasts: Cell<usize>,
}

impl Around for Counted<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.inner
    }

    fn during<T>(
        &self,
        operation: Operation,
        _bytes: usize,
        act: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        self.broadcasts.set(self.broadcasts.get() + usize::from(operation == Operation::Broadcast));
        act()
    }
}

/// Of two kinds of GPU; only rank 0 compiles.
fn kernels(comm: &dyn Communicator) {
    let mine = Architecture { major: 9 + u32::from(comm.rank() % 2 == 1), minor: 0 };
    let mut compiled = 0;
    let cubin = |source: &Source, architecture: Architecture| {
        vec![architecture.major as u8; source.name.len() * 1000 + architecture.major as usize]
    };
    share_with(mine, comm, |source, architecture| {
        assert_eq!(comm.rank(), 0, "another rank compiles");
        compiled += 1;
        Ok(cubin(source, architecture))
    })
    .unwrap();
    assert_eq!(compiled, if comm.rank() == 0 { 2 * SOURCES.len() } else { 0 });
    let bytes: usize = SOURCES.iter().map(|source| cubin(source, mine).len()).sum();
    assert_eq!(shared_bytes(mine), Some(bytes));
    assert_eq!(shared_bytes(Architecture { major: 8, minor: 0 }), None);
}

fn broken_kernels(comm: &dyn Communicator) {
    let architecture = Architecture { major: 9, minor: 0 };
    let broken = |source: &Source, _| match source.name {
        "geglu" => Err(anyhow::anyhow!("line 3: expected a ;")),
        _ => Ok(vec![1; 10]),
    };
    let error = share_with(architecture, comm, broken).unwrap_err().to_string();
    assert_eq!(error, "rank 0 cannot compile the kernels: line 3: expected a ;");
    assert_eq!(shared_bytes(architecture), None);
    // all go on together
    comm.barrier().unwrap();
}

fn agreement(comm: &dyn Communicator) {
    comm::agree(comm, Ok(())).unwrap();
    let last = comm.size() - 1;
    let mine = if comm.rank() == last { Err(anyhow::anyhow!("disk full")) } else { Ok(()) };
    assert_eq!(comm::agree(comm, mine).unwrap_err().to_string(), format!("rank {last}: disk full"));
}

fn one_panics(comm: &dyn Communicator, in_a_thread: bool) {
    if comm.rank() == comm.size() - 1 {
        let fall = || panic!("the {}th wheel came off", 5);
        if in_a_thread {
            std::thread::spawn(fall);
        } else {
            fall();
        }
    }
    let mut endless = [0f32];
    loop {
        comm.all_reduce_sum_f32(&mut endless).unwrap();
    }
}

fn one_aborts(comm: &dyn Communicator) {
    if comm.rank() == 0 {
        comm.abort(2);
    }
    comm.barrier().unwrap();
}

/// Elements of the checkpoints by iteration: none, fewer than ranks, and a number that no number of ranks divides.
const ELEMENTS: [usize; 3] = [0, 2, 50_003];

fn folder() -> PathBuf {
    std::env::var_os(FOLDER).expect("set by the test").into()
}

/// A checkpoint of `weights` and `moments`.
fn save_vectors(
    comm: &dyn Communicator,
    folder: &std::path::Path,
    iteration: u64,
    weights: &[f32],
    moments: &[f32],
) -> anyhow::Result<()> {
    let meta = json!({"optimizer_steps": 7, "share": 0.1 + 0.2});
    let layout = [ParameterEntry { name: "conv.weight".into(), shape: vec![weights.len()], offset: 0 }];
    let vectors = vec![("weights", weights), ("exp_avg", moments)];
    let checkpoint = CheckpointRef { iteration, meta: &meta, config_toml: "[run]\n", layout: &layout, vectors };
    store::save(folder, &checkpoint, store::Keep { last: 9, every: 0 }, comm).map(drop)
}

fn save(comm: &dyn Communicator) {
    for (iteration, length) in ELEMENTS.into_iter().enumerate() {
        let (weights, moments) = (leaf(1, length), leaf(2, length));
        save_vectors(comm, &folder(), iteration as u64, &weights, &moments).unwrap();
    }
}

/// Every checkpoint that any number of ranks has saved, and the newest of each folder.
fn load(comm: &dyn Communicator) {
    for saved_by in 1..=4 {
        let folder = folder().join(format!("ranks-{saved_by}"));
        for (iteration, length) in ELEMENTS.into_iter().enumerate() {
            let loaded = store::load(&folder.join(format!("iteration-{iteration:06}")), comm).unwrap().checkpoint;
            let what = format!("{length} elements, saved by {saved_by}, loaded by {}", comm.size());
            assert_eq!((loaded.iteration, loaded.config_toml.as_str()), (iteration as u64, "[run]\n"), "{what}");
            assert_eq!(loaded.meta, json!({"optimizer_steps": 7, "share": 0.1 + 0.2}), "{what}");
            assert_eq!(loaded.layout[0].shape, [length], "{what}");
            assert_same_bits(loaded.vector("weights").unwrap(), &leaf(1, length), &what);
            assert_same_bits(loaded.vector("exp_avg").unwrap(), &leaf(2, length), &what);
        }
        let newest = store::load_latest(&folder, comm).unwrap().expect("there are checkpoints");
        assert_eq!((newest.checkpoint.iteration, newest.warnings.len()), (2, 0));
    }
}

/// One rank does not see the checkpoint: it receives what the others read. What one of them finds wrong is the same on all.
fn load_what_not_all_see(comm: &dyn Communicator) {
    let (folder, last) = (folder(), comm.size() - 1);
    let newest = folder.join("iteration-000002");
    let mine = if comm.rank() == last { folder.join("elsewhere") } else { newest.clone() };
    let loaded = store::load(&mine, comm).unwrap().checkpoint;
    assert_same_bits(loaded.vector("exp_avg").unwrap(), &leaf(2, ELEMENTS[2]), "seen by some");
    comm.barrier().unwrap();
    if comm.rank() == 0 {
        for shard in ["shard-002.h5", "shard-001.h5"] {
            let path = newest.join(shard);
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
    comm.barrier().unwrap();
    let error = store::load(&newest, comm).unwrap_err().to_string();
    let file = newest.join("shard-001.h5");
    assert_eq!(error, format!("{} (rank 1) is damaged: its SHA-256 differs", file.display()));
    let before = store::load_latest(&folder, comm).unwrap().expect("the one before is sound");
    let why = format!("checkpoint {} cannot be used: {error}", newest.display());
    assert_eq!((before.checkpoint.iteration, before.warnings), (1, vec![why]));
}

/// The last rank's vectors do not fit together: all ranks get its error, and the checkpoint before stays the newest.
fn failing_save(comm: &dyn Communicator) {
    let (folder, last) = (folder(), comm.size() - 1);
    let values = leaf(1, 101);
    save_vectors(comm, &folder, 1, &values, &values).unwrap();
    let moments = if comm.rank() == last { &values[..100] } else { &values };
    let error = save_vectors(comm, &folder, 2, &values, moments).unwrap_err().to_string();
    assert_eq!(error, format!("rank {last}: vector exp_avg has 100 elements, the first has 101"));
    assert_eq!(store::load_latest(&folder, comm).unwrap().unwrap().checkpoint.iteration, 1);
    save_vectors(comm, &folder, 2, &values, &values).unwrap();
    assert_eq!(store::load_latest(&folder, comm).unwrap().unwrap().checkpoint.iteration, 2);
    // what rank 0 finds is the same error everywhere
    let error = store::load(&folder.join("nothing"), comm).unwrap_err().to_string();
    assert!(error.ends_with("nothing holds no checkpoint"), "{error}");
}

#[test]
fn checkpoints_are_loaded_bit_for_bit_by_any_number_of_ranks() {
    let folder = empty_folder("mpi-checkpoints");
    for ranks in 1..=4 {
        succeeds(ranks, "save", &[(FOLDER, folder.join(format!("ranks-{ranks}")).into())]);
        let shards = std::fs::read_dir(folder.join(format!("ranks-{ranks}/iteration-000002"))).unwrap().count();
        assert_eq!(shards, ranks + 1, "one shard per rank and the manifest");
    }
    for ranks in 1..=4 {
        succeeds(ranks, "load", &[(FOLDER, folder.clone().into())]);
    }
    let digests = (1..=4).map(|ranks| store::digest(&folder.join(format!("ranks-{ranks}"))).unwrap());
    let digests: Vec<String> = digests.collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[test]
fn ranks_read_by_turns_and_find_the_same() {
    for ranks in [2, 3, 4] {
        let folder = empty_folder("mpi-turns");
        succeeds(3, "save", &[(FOLDER, folder.clone().into())]);
        succeeds(ranks, "load what not all see", &[(FOLDER, folder.into())]);
    }
}

#[test]
fn an_error_of_one_rank_during_a_save_is_an_error_on_all() {
    for ranks in [1, 2, 3] {
        let folder = empty_folder("mpi-failing-save");
        succeeds(ranks, "failing save", &[(FOLDER, folder.clone().into())]);
    }
}

#[test]
fn sums_are_the_tree_sum_bit_for_bit() {
    for ranks in [1, 2, 3, 4, 8] {
        succeeds(ranks, "sums", &[]);
    }
}

#[test]
fn sums_over_lanes_do_not_depend_on_the_number_of_ranks() {
    for ranks in [1, 2, 4, 8] {
        succeeds(ranks, "lanes", &[]);
    }
}

#[test]
fn broadcasts_and_gathers() {
    for ranks in [1, 2, 3, 4] {
        succeeds(ranks, "messages", &[]);
    }
}

/// Both ways to wait, whatever the number of cores.
#[test]
fn ranks_that_sleep_and_ranks_that_ask_compute_the_same() {
    for (wait, ranks) in [("sleep", 2), ("sleep", 3), ("sleep", 4), ("spin", 4)] {
        for case in ["sums", "agreement"] {
            succeeds(ranks, case, &[("RLDIFF_WAIT", wait.into())]);
        }
    }
    succeeds(3, "messages", &[("RLDIFF_WAIT", "sleep".into())]);
}

#[test]
fn waiting_ranks_leave_the_cores_to_the_late_one() {
    for ranks in [3, 4] {
        succeeds(ranks, "one is late", &[("RLDIFF_WAIT", "sleep".into())]);
    }
}

#[test]
fn hundreds_of_tensors_go_to_the_ranks_in_few_messages() {
    for ranks in [2, 3] {
        succeeds(ranks, "items", &[]);
    }
}

#[test]
fn rank_0_compiles_kernels_once_for_all() {
    for ranks in [2, 3] {
        succeeds(ranks, "kernels", &[]);
        succeeds(ranks, "broken kernels", &[]);
    }
}

#[test]
fn ranks_agree_on_failures() {
    for ranks in [1, 2, 3] {
        succeeds(ranks, "agreement", &[]);
    }
}

/// Ten seconds is the promise; two seconds were observed on two busy cores.
fn ends_all(ranks: usize, case: &str) -> Finished {
    let done = launch(ranks, case, &[]);
    assert!(!done.status.success(), "{case}: exit code 0\n{}", done.stderr);
    assert!(done.took < Duration::from_secs(10), "{case} took {:?}", done.took);
    done
}

#[test]
fn a_panic_on_one_rank_ends_all() {
    for ranks in [1, 2, 4] {
        for case in ["panic", "panic in a thread"] {
            let done = ends_all(ranks, case);
            let expected = format!("rank {}: the 5th wheel came off", ranks - 1);
            assert!(done.stderr.contains(&expected), "{case} on {ranks} ranks\n{}\n{}", done.stdout, done.stderr);
        }
    }
}

#[test]
fn an_abort_on_one_rank_ends_all() {
    ends_all(2, "abort");
}

#[test]
fn without_a_launcher_there_is_one_rank() {
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    alone.args(RANK_BODY).env(CASE, "agreement");
    let done = run_within(alone, Duration::from_secs(60)).expect_success("a rank by itself");
    assert!(done.stdout.contains("agreement passed, world of 1"), "{}", done.stdout);
}
