//! NCCL's part among real ranks on a machine without a GPU: the program's own code (`comm::nccl`, and the sums of gradients
//! above it) over doubles of `libcuda.so.1` and `libnccl.so.2` that sum in host memory and check how they are called. What
//! NCCL itself does is not seen here. Each test starts `mpirun` on this very executable, whose ignored test `rank_body` is
//! what a rank does.

mod common;

use anyhow::Result;
use common::{
    empty_folder,
    network::{bits, summed, Network, BUCKETS, LANES},
    ranks::{launch, rank, succeeds, tell},
};
use cudarc::driver::{result as driver, sys};
use half::bf16;
use rldiff::{
    comm::{
        self,
        nccl::{settle, waited, Nccl, Terms},
        tree_sum, Around, Communicator, DeviceVector, Operation, Timed, Wire,
    },
    config::load,
    iteration_log::IterationLog,
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
    },
    stragglers::Stragglers,
};
use std::{
    ffi::{c_void, OsString},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        OnceLock,
    },
    time::{Duration, Instant},
};

use tch::Device;

/// What the double of NCCL is asked to do wrong.
const FAULT: &str = "RLDIFF_NCCL_DOUBLE";
/// Long enough for two busy cores, where nothing is to fail.
const LONG: Terms = terms(Some(Duration::from_secs(120)));
/// Where a sum is to be given up.
const SHORT: Terms = terms(Some(Duration::from_secs(3)));

/// Small buckets: the double sums slowly.
const fn terms(patience: Option<Duration>) -> Terms {
    Terms { patience, bucket_bytes: 1 << 18, wire: Wire::Bf16 }
}

/// The folder of the doubles, compiled once per process.
fn doubles() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = empty_folder("nccl-doubles");
        let compile = |source: &str, library: &str, more: &[&str]| {
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl").join(source);
            let output = Command::new(&compiler)
                .args(["-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"])
                .arg(source)
                .arg("-o")
                .arg(folder.join(library))
                .arg(format!("-Wl,-soname,{library}"))
                .args(more)
                .output()
                .unwrap_or_else(|e| panic!("cannot start {compiler}: {e}"));
            assert!(output.status.success(), "{library}: {}", String::from_utf8_lossy(&output.stderr));
        };
        compile("cuda_double.cpp", "libcuda.so.1", &[]);
        let search = format!("-L{}", folder.display());
        compile("nccl_double.cpp", "libnccl.so.2", &[&search, "-l:libcuda.so.1", "-lrt", "-Wl,-rpath,$ORIGIN"]);
        folder
    })
}

/// Lets the ranks find the doubles, and asks them for `fault`.
fn with_doubles(fault: &str) -> [(&'static str, OsString); 2] {
    let mut libraries = vec![doubles().to_path_buf()];
    libraries.extend(std::env::split_paths(&std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    [(FAULT, fault.into()), ("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap())]
}

/// Not a test of its own: the body of each rank that the tests below start.
#[test]
#[ignore = "run by mpirun from the other tests"]
fn rank_body() {
    rank(|case, comm| {
        driver::init().unwrap();
        match case {
            "sums" => sums(comm),
            "gradients" => gradients(comm),
            "no start" => no_start(comm),
            "one stays away" => one_stays_away(comm),
            "one sum too few" => one_sum_too_few(comm),
            "a broken network" => a_broken_network(comm),
            "one panics" => one_panics(comm),
            "the first sums" => the_first_sums(comm),
            "a call that blocks" => a_call_that_blocks(comm),
            "an error while others wait" => an_error_while_others_wait(comm),
            "an error that cannot leave" => an_error_that_cannot_leave(comm),
            "a late rank" => a_late_rank(comm),
            "timed sums" => timed_sums(comm),
            other => panic!("unknown case {other}"),
        }
    });
}

/// Streams, events and contexts of the double that were not given back.
fn live_handles() -> i32 {
    // SAFETY: the double is loaded; the function has this type (tests/nccl/cuda_double.h).
    unsafe {
        let library = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        let function = libc::dlsym(library, c"double_live_handles".as_ptr());
        assert!(!function.is_null(), "the driver is not the double");
        std::mem::transmute::<*mut c_void, extern "C" fn() -> i32>(function)()
    }
}

fn new_stream() -> sys::CUstream {
    driver::stream::create(driver::stream::StreamKind::NonBlocking).unwrap()
}

/// A vector that a stream makes once a gate is open, and where the stream copies what it holds at the end.
struct Late<T> {
    gate: AtomicBool,
    values: Vec<T>,
    to_be: Vec<T>,
    seen: Vec<T>,
}

impl<T: Copy + Default> Late<T> {
    fn new(values: Vec<T>) -> Self {
        let nothing = vec![T::default(); values.len()];
        Late { gate: AtomicBool::new(false), values: nothing.clone(), to_be: values, seen: nothing }
    }

    unsafe extern "C" fn make(late: *mut c_void) {
        let late = unsafe { &mut *late.cast::<Late<T>>() };
        while !late.gate.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        late.values.copy_from_slice(&late.to_be);
    }

    unsafe extern "C" fn look(late: *mut c_void) {
        let late = unsafe { &mut *late.cast::<Late<T>>() };
        late.seen.copy_from_slice(&late.values);
    }
}

/// Sums start before their vectors are made, from another thread as well, and what follows on the stream sees the sums.
fn sum_late<T: Copy + Default>(nccl: &Nccl, wire: Wire, vectors: Vec<Vec<T>>) -> Vec<Vec<T>> {
    let stream = new_stream();
    let mut late: Vec<Box<Late<T>>> = vectors.into_iter().map(|values| Box::new(Late::new(values))).collect();
    let pointers: Vec<*mut Late<T>> = late.iter_mut().map(|l| std::ptr::from_mut(&mut **l)).collect();
    for (i, &pointer) in pointers.iter().enumerate() {
        // SAFETY: the boxes live until the stream has ended; while it works, only it touches what is not atomic.
        unsafe { driver::stream::launch_host_function(stream, Late::<T>::make, pointer.cast()).unwrap() };
        let (address, length) = unsafe { ((*pointer).values.as_mut_ptr() as u64, (*pointer).values.len()) };
        let vector = DeviceVector { address, length, wire, stream: stream as usize };
        if i % 2 == 0 {
            nccl.start_device_sum(vector).unwrap();
        } else {
            // as from libtorch's backward pass, a thread where no context is current
            let borrowed = Borrowed(std::ptr::from_ref(nccl).cast());
            std::thread::scope(|scope| {
                let started = scope.spawn(move || borrowed.get().start_device_sum(vector));
                started.join().unwrap().unwrap();
            });
        }
    }
    nccl.finish_device_sums(stream as usize).unwrap();
    for &pointer in &pointers {
        // SAFETY: as above.
        unsafe {
            driver::stream::launch_host_function(stream, Late::<T>::look, pointer.cast()).unwrap();
            (*pointer).gate.store(true, Ordering::Release);
        }
    }
    // SAFETY: a live stream, used no more.
    unsafe {
        driver::stream::synchronize(stream).unwrap();
        driver::stream::destroy(stream).unwrap();
    }
    late.into_iter().map(|l| l.seen).collect()
}

/// The communicator on another thread while its own waits, as `GradientSum::backward` lends it.
#[derive(Clone, Copy)]
struct Borrowed(*const Nccl<'static>);

// SAFETY: the owner waits; device sums may start from any thread.
unsafe impl Send for Borrowed {}

impl Borrowed {
    fn get(&self) -> &Nccl<'static> {
        // SAFETY: the owner waits in a thread scope.
        unsafe { &*self.0 }
    }
}

/// Values whose sums depend on the order of the additions.
fn leaf(rank: usize, which: usize, length: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 31 + rank * 17 + which) as f32).sin() * 10f32.powi(((i + rank) % 9) as i32 - 4);
    (0..length).map(value).collect()
}

fn sums(comm: &dyn Communicator) {
    // lengths of a first, small, exact and larger vector; the double sums in pieces of 65,536
    let lengths = [1, 7, 1 << 16, 150_001];
    let of_rank = |rank: usize| -> Vec<Vec<f32>> {
        lengths.iter().enumerate().map(|(which, &length)| leaf(rank, which, length)).collect()
    };
    let all: Vec<Vec<Vec<f32>>> = (0..comm.size()).map(of_rank).collect();
    let nccl = Nccl::start(comm, 0, LONG).unwrap();

    let seen = sum_late(&nccl, Wire::F32, all[comm.rank()].clone());
    for (which, seen) in seen.iter().enumerate() {
        let leaves: Vec<Vec<f32>> = all.iter().map(|of_rank| of_rank[which].clone()).collect();
        assert_eq!(bits(seen), bits(&tree_sum(&leaves)), "f32, {} elements", lengths[which]);
    }

    let rounded = |values: &[f32]| -> Vec<bf16> { values.iter().map(|&v| bf16::from_f32(v)).collect() };
    let mine: Vec<Vec<bf16>> = all[comm.rank()].iter().map(|values| rounded(values)).collect();
    let seen = sum_late(&nccl, Wire::Bf16, mine.clone());
    for (mut expected, seen) in mine.into_iter().zip(seen) {
        comm.all_reduce_sum_bf16(&mut expected).unwrap();
        assert_eq!(seen, expected, "bf16, {} elements", expected.len());
    }
    nccl.close();
    assert_eq!(live_handles(), 0, "after close()");

    // a second world, left as after a failure
    drop(Nccl::start(comm, 0, LONG).unwrap());
    settle(Duration::from_secs(60));
    assert_eq!(live_handles(), 0, "after a drop");
}

/// NCCL for a host that computes beside the stream, as libtorch on the CPU does: it waits for the sums, where a GPU's stream
/// would only queue what comes after them.
struct OnHost<'a> {
    nccl: &'a Nccl<'a>,
    started: AtomicUsize,
}

impl Around for OnHost<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.nccl
    }

    fn during<T>(&self, operation: Operation, _: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        assert_ne!(operation, Operation::Sum, "gradients on a stream are not summed on the host");
        act()
    }

    fn start_sum(&self, vector: DeviceVector) -> Result<()> {
        self.started.fetch_add(1, Ordering::Relaxed);
        self.nccl.start_device_sum(vector)
    }

    fn finish_sums(&self, stream: usize) -> Result<()> {
        self.nccl.finish_device_sums(stream)?;
        // SAFETY: the test's stream, which lives as long as the sums.
        unsafe { driver::stream::synchronize(stream as sys::CUstream).unwrap() };
        Ok(())
    }
}

/// Gradients in buckets on a stream, over lanes and ranks: the bits of the one tree, f32 and bf16, whatever the buckets.
fn gradients(comm: &dyn Communicator) {
    let network = Network::new(Device::Cpu);
    let lanes = Lanes::new(LANES, comm).unwrap();
    let of_lanes: Vec<Vec<f32>> = (0..LANES).map(|lane| network.gradient(lane)).collect();
    let nccl = Nccl::start(comm, 0, LONG).unwrap();
    let stream = new_stream();
    for bucket_bytes in BUCKETS {
        let on_stream = |wire: Wire| {
            let transport = Transport { bucket_bytes, wire };
            let sum = GradientSum::on_stream(&network.params, transport, stream as usize).unwrap();
            let on_host = OnHost { nccl: &nccl, started: AtomicUsize::new(0) };
            let total = summed(&network, sum, &lanes, &on_host);
            (total, on_host.started.into_inner())
        };
        let on_host = |wire: Wire| {
            let sum = GradientSum::new(&network.params, Transport { bucket_bytes, wire }).unwrap();
            summed(&network, sum, &lanes, comm)
        };
        let (total, started) = on_stream(Wire::F32);
        assert_eq!(bits(&total), bits(&tree_sum(&of_lanes)), "f32, buckets of {bucket_bytes} bytes");
        // two sums of gradients; one rank has nothing to send
        let buckets = if bucket_bytes == 1 { 6 } else { 1 };
        assert!(started >= 2 * buckets || comm.size() == 1, "{started} sums over ranks");
        let (total, _) = on_stream(Wire::Bf16);
        assert_eq!(bits(&total), bits(&on_host(Wire::Bf16)), "bf16, buckets of {bucket_bytes} bytes");
    }
    // SAFETY: a live stream, used no more.
    unsafe { driver::stream::destroy(stream).unwrap() };
    nccl.close();
    assert_eq!(live_handles(), 0);
}

/// A rank on which NCCL does not start: the same error on all of them.
fn no_start(comm: &dyn Communicator) {
    let error = format!("{:#}", Nccl::start(comm, 0, LONG).err().expect("NCCL started"));
    let all = comm.all_gather_bytes(error.as_bytes()).unwrap();
    assert!(all.iter().all(|other| *other == all[0]), "{error}");
    tell(&format!("error: {error}"));
}

/// The last rank never joins.
fn one_stays_away(comm: &dyn Communicator) {
    if comm.rank() + 1 == comm.size() {
        // what the others wait for before they join, then nothing
        comm::agree(comm, Ok(())).unwrap();
        comm.broadcast_bytes(&mut Vec::new(), 0).unwrap();
        std::thread::sleep(Duration::from_secs(600));
    }
    let _ = Nccl::start(comm, 0, SHORT);
    panic!("the ranks met");
}

fn start_a_sum(nccl: &Nccl) {
    let values = Box::leak(vec![1f32; 1000].into_boxed_slice());
    let stream = new_stream() as usize;
    let vector = DeviceVector { address: values.as_mut_ptr() as u64, length: 1000, wire: Wire::F32, stream };
    nccl.start_device_sum(vector).unwrap();
}

/// The last rank does not start the sum that the others wait in.
fn one_sum_too_few(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, SHORT).unwrap();
    if comm.rank() + 1 < comm.size() {
        start_a_sum(&nccl);
    }
    std::thread::sleep(Duration::from_secs(600));
}

/// The double says so on one rank.
fn a_broken_network(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, LONG).unwrap();
    start_a_sum(&nccl);
    std::thread::sleep(Duration::from_secs(600));
}

/// The last rank panics while the others wait in a sum.
fn one_panics(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, terms(None)).unwrap();
    assert!(comm.rank() + 1 < comm.size(), "this rank breaks");
    start_a_sum(&nccl);
    nccl.barrier().unwrap();
}

/// All but one rank wait in the first of the first sums: in the call, as NCCL does, where no event tells of it.
fn the_first_sums(comm: &dyn Communicator) {
    let _ = Nccl::start(comm, 0, SHORT);
    panic!("the ranks met");
}

/// The double's call after the first sums does not return.
fn a_call_that_blocks(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, SHORT).unwrap();
    start_a_sum(&nccl);
    panic!("the call returned");
}

/// As `cli::train` does it: what the failing rank holds is dropped, then the message is printed and the world ended.
fn an_error_while_others_wait(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, terms(None)).unwrap();
    if comm.rank() > 0 {
        start_a_sum(&nccl);
        std::thread::sleep(Duration::from_secs(600));
    }
    start_a_sum(&nccl);
    let fails = |_nccl: Nccl| -> Result<()> { Err(anyhow::anyhow!("the picture broke")) };
    let error = fails(nccl).unwrap_err();
    eprintln!("error: rank 0: {error:#}");
    comm.abort(1);
}

/// What is dropped on the way to the message waits for a sum that never ends.
fn an_error_that_cannot_leave(comm: &dyn Communicator) {
    let nccl = Nccl::start(comm, 0, terms(None)).unwrap();
    if comm.rank() + 1 < comm.size() {
        start_a_sum(&nccl);
    }
    if comm.rank() == 0 {
        let error = anyhow::anyhow!("the reward broke").context("task parity");
        comm::last_words(0, &error, Duration::from_secs(2)).unwrap();
    }
    std::thread::sleep(Duration::from_secs(600));
}

/// The last rank comes to the sum four seconds after the others, whose GPUs wait that long for it.
fn a_late_rank(comm: &dyn Communicator) {
    let late = Duration::from_secs(4);
    let config = load::parse(load::EMBEDDED_JOINT, "joint", &[]).unwrap();
    let nccl = Nccl::start(comm, 0, LONG).unwrap();
    let stream = new_stream();
    let mut values = vec![1f32; 1000];
    let hosts: Vec<String> = (0..comm.size()).map(|rank| format!("n{rank}")).collect();
    let mut stragglers = Stragglers::default();
    let mut lines = Vec::new();
    for iteration in 0..2 {
        let mut log = IterationLog::new(iteration, Device::Cpu);
        comm.barrier().unwrap();
        let (started, before) = (Instant::now(), waited());
        if comm.rank() + 1 == comm.size() {
            std::thread::sleep(late);
        }
        let vector = DeviceVector {
            address: values.as_mut_ptr() as u64,
            length: values.len(),
            wire: Wire::F32,
            stream: stream as usize,
        };
        nccl.start_device_sum(vector).unwrap();
        nccl.finish_device_sums(stream as usize).unwrap();
        // as the end of a stage does on a GPU
        // SAFETY: a live stream.
        unsafe { driver::stream::synchronize(stream).unwrap() };
        log.spent("update", started);
        let in_nccl = waited() - before;
        match comm.rank() + 1 == comm.size() {
            true => assert!(in_nccl < late / 2, "the late rank waited for {in_nccl:?}"),
            false => assert!(in_nccl > late / 2, "rank {} waited for {in_nccl:?}", comm.rank()),
        }
        let (_, seconds) = log.finish(comm, &config).unwrap();
        lines = stragglers.note(&seconds, 3.0, &hosts);
    }
    assert_eq!(lines.len(), 1, "{lines:?}");
    let last = comm.size() - 1;
    assert!(lines[0].starts_with(&format!("rank {last} on n{last} is slow: update took ")), "{lines:?}");
    // SAFETY: a live stream, used no more.
    unsafe { driver::stream::destroy(stream).unwrap() };
    nccl.close();
    assert_eq!(live_handles(), 0);
}

/// What `bench scaling` notes of sums beside a backward pass that goes on for half a second after its first bucket. In the
/// second pass the last rank's begins a second late; in the first NCCL connects the ranks.
fn timed_sums(comm: &dyn Communicator) {
    unsafe extern "C" fn go_on(_: *mut c_void) {
        std::thread::sleep(Duration::from_millis(500));
    }
    let nccl = Nccl::start(comm, 0, LONG).unwrap();
    let timed = Timed::new(&nccl);
    let stream = new_stream();
    let mut values = vec![1f32; 1000];
    let is_late = comm.rank() + 1 == comm.size();
    let pass = |values: &mut [f32]| {
        for (from, length) in [(400, 600), (0, 400)] {
            let address = values[from..].as_mut_ptr() as u64;
            let vector = DeviceVector { address, length, wire: Wire::F32, stream: stream as usize };
            timed.start_device_sum(vector).unwrap();
            if from > 0 {
                // SAFETY: a live stream; the function touches nothing.
                unsafe { driver::stream::launch_host_function(stream, go_on, std::ptr::null_mut()).unwrap() };
            }
        }
        timed.finish_device_sums(stream as usize).unwrap();
    };
    pass(&mut values);
    comm.barrier().unwrap();
    timed.take();
    if is_late {
        std::thread::sleep(Duration::from_secs(1));
    }
    pass(&mut values);
    let [visit] = timed.take().try_into().expect("one visit");
    assert_eq!((visit.operation, visit.bytes, visit.vectors), (Operation::Sum, 4000, 2));
    // events tell f32 milliseconds
    assert!(visit.window > 0.499 && visit.work > visit.window - 1e-3, "{visit:?}");
    // the sums began when the late rank's did
    match is_late {
        true => assert!(visit.work > 1.499 && visit.inside < 0.5, "{visit:?}"),
        false => assert!(visit.window < 1.0 && visit.inside > 0.5, "{visit:?}"),
    }
    assert_eq!(values, vec![(comm.size() * comm.size()) as f32; 1000]);
    drop(timed);
    // SAFETY: a live stream, used no more.
    unsafe { driver::stream::destroy(stream).unwrap() };
    nccl.close();
    assert_eq!(live_handles(), 0);
}

#[test]
fn sums_beside_a_backward_pass_are_timed_between_events() {
    for ranks in [2, 3] {
        succeeds(ranks, "timed sums", &with_doubles(""));
    }
}

#[test]
fn waiting_inside_nccl_is_no_work_of_the_rank_that_waits() {
    for ranks in [2, 3] {
        succeeds(ranks, "a late rank", &with_doubles(""));
    }
}

#[test]
fn sums_begin_after_what_makes_them_and_end_before_what_uses_them() {
    for ranks in [1, 2, 4] {
        succeeds(ranks, "sums", &with_doubles(""));
    }
}

#[test]
fn gradients_in_buckets_are_the_tree_sum_bit_for_bit() {
    for ranks in [1, 2, 4] {
        succeeds(ranks, "gradients", &with_doubles(""));
    }
}

#[test]
fn what_fails_on_one_rank_at_the_start_is_the_error_of_all() {
    let done = launch(2, "no start", &with_doubles("unique id@0")).expect_success("no start");
    let wanted = "error: rank 0: NCCL: unique id: unhandled system error";
    assert_eq!(done.stdout.matches(wanted).count(), 2, "{}\n{}", done.stdout, done.stderr);
}

#[test]
fn a_rank_that_fails_ends_all_with_a_message() {
    for (case, fault, wanted) in [
        ("no start", "joining@1", "rank 1: NCCL: joining the ranks: unhandled system error"),
        ("one stays away", "", "NCCL: the ranks did not meet within 3 s (joining the ranks)"),
        ("one sum too few", "", "NCCL: a sum of gradients did not end within 3 s"),
        ("a broken network", "network@1", "rank 1: NCCL: remote process exited or there was a network error"),
        ("one panics", "", "rank 2: this rank breaks"),
        // NCCL connects in the first call, which waits for the rank that blocks
        ("the first sums", "call 1@2", "NCCL: the ranks did not meet within 3 s (the first sum of 8 F32)"),
        ("the first sums", "call 6@1", "NCCL: the ranks did not meet within 3 s (the first sum of 65536 Bf16)"),
        // the message does not wait for NCCL to leave
        ("one sum too few", "abort@0", "NCCL: a sum of gradients did not end within 3 s"),
        ("an error while others wait", "abort@0", "error: rank 0: the picture broke"),
        ("an error that cannot leave", "abort@0", "error: rank 0: task parity: the reward broke"),
    ] {
        let done = launch(3, case, &with_doubles(fault));
        assert!(!done.status.success(), "{case}: {}\n{}", done.stdout, done.stderr);
        assert!(done.stderr.contains(wanted), "{case}: {}\n{}", done.stdout, done.stderr);
        // three seconds of patience, a start and an end on two busy cores; without the watcher it would be ten minutes
        assert!(done.took < Duration::from_secs(60), "{case}: {:?}", done.took);
    }
}

/// On one rank, where nobody else could say it.
#[test]
fn a_call_that_blocks_in_the_host_is_given_up() {
    for (case, fault, wanted) in [
        ("the first sums", "call 1@0", "NCCL: the ranks did not meet within 3 s (the first sum of 8 F32)"),
        (
            "a call that blocks",
            "call 7@0",
            "NCCL: a sum of gradients did not end within 3 s (the call that starts it has not returned)",
        ),
    ] {
        let done = launch(1, case, &with_doubles(fault));
        assert!(!done.status.success(), "{case}: {}\n{}", done.stdout, done.stderr);
        assert!(done.stderr.contains(wanted), "{case}: {}\n{}", done.stdout, done.stderr);
        assert!(done.took < Duration::from_secs(60), "{case}: {:?}", done.took);
    }
}
