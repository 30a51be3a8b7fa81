//! NCCL for gradients in GPU memory, MPI for everything else.
//!
//! Sums run on a stream of their own, beside what libtorch computes. A thread watches them: an error of the network or
//! of another rank, or a sum that does not end, ends the whole run with a message instead of hanging.
//!
//! NCCL's library is opened here, as `libnccl.so.2` or `libnccl.so`: cudarc would look for the second name only, which
//! PyTorch's package does not have. The types are cudarc's.

use std::{
    collections::VecDeque,
    ffi::{c_char, c_int, c_void, CStr},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure, Context, Result};
use cudarc::{
    driver::{result as driver, sys},
    nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId},
};
use tch::Device;

use super::{agree, Around, Communicator, DeviceVector, Wire};
use crate::{device::parts, streams::complain};

/// A sum, or the set-up, that takes longer than this ends the run where no other limit is given.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How often the watcher looks.
const PULSE: Duration = Duration::from_millis(200);
/// ncclSuccess and ncclInProgress.
const FINE: [c_int; 2] = [0, 7];

/// NCCL's functions.
struct Api {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        ncclDataType_t,
        ncclRedOp_t,
        ncclComm_t,
        cudaStream_t,
    ) -> c_int,
    get_async_error: unsafe extern "C" fn(ncclComm_t, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(ncclComm_t) -> c_int,
    destroy: unsafe extern "C" fn(ncclComm_t) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
}

/// The function `name` of a library. `F` must be the type of a pointer to it.
///
/// # Safety
/// `library` is open, and the function is of type `F`.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F> {
    let pointer = unsafe { libc::dlsym(library, name.as_ptr()) };
    ensure!(!pointer.is_null(), "NCCL has no function {}", name.to_string_lossy());
    assert_eq!(size_of::<F>(), size_of::<*mut c_void>());
    Ok(unsafe { std::mem::transmute_copy(&pointer) })
}

impl Api {
    fn open() -> Result<Self> {
        let library = parts::open_nccl()?;
        // SAFETY: an open library, which is never closed; the types are those of nccl.h (2.18 and later).
        unsafe {
            Ok(Api {
                get_version: function(library, c"ncclGetVersion")?,
                get_unique_id: function(library, c"ncclGetUniqueId")?,
                init_rank: function(library, c"ncclCommInitRank")?,
                all_reduce: function(library, c"ncclAllReduce")?,
                get_async_error: function(library, c"ncclCommGetAsyncError")?,
                abort: function(library, c"ncclCommAbort")?,
                destroy: function(library, c"ncclCommDestroy")?,
                get_error_string: function(library, c"ncclGetErrorString")?,
            })
        }
    }

    fn describe(&self, code: c_int) -> String {
        // SAFETY: NCCL gives a string constant for any code.
        unsafe { CStr::from_ptr((self.get_error_string)(code)) }.to_string_lossy().into_owned()
    }

    fn checked(&self, what: &str, code: c_int) -> Result<()> {
        ensure!(FINE.contains(&code), "NCCL: {what}: {}", self.describe(code));
        Ok(())
    }
}

/// Version of the library, as 2.28.3.
pub fn version() -> Result<String> {
    let api = Api::open()?;
    let mut version = 0;
    // SAFETY: writes one number.
    api.checked("version", unsafe { (api.get_version)(&mut version) })?;
    Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
}

fn cuda<T>(what: &str, result: Result<T, driver::DriverError>) -> Result<T> {
    result.map_err(|e| anyhow!("NCCL: {what}: {e:?}"))
}

/// What the watcher sees too.
struct Shared {
    api: Api,
    comm: ncclComm_t,
    context: sys::CUcontext,
    /// The sums run here.
    stream: sys::CUstream,
    /// Events behind started sums, with the time of their start; oldest first.
    running: Mutex<VecDeque<(sys::CUevent, Instant)>>,
    closed: AtomicBool,
    patience: Option<Duration>,
    rank: usize,
}

// SAFETY: handles of libraries that may be used from any thread; NCCL calls on one communicator that must not run at the
// same time (starting sums) are made by one thread at a time: the one whose backward pass it is.
unsafe impl Send for Shared {}
// SAFETY: as above; ncclCommGetAsyncError and ncclCommAbort are made to be called beside the others.
unsafe impl Sync for Shared {}

/// The ranks of an MPI communicator, one GPU each.
pub struct Nccl<'a> {
    mpi: &'a dyn Communicator,
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    device: sys::CUdevice,
}

/// The communicator for gradients on `device`: None where `comm` itself can do it (one rank, or the CPU). A sum, or the
/// set-up, that takes longer than `patience` ends the run; None waits for ever. A collective call.
pub fn for_gradients(comm: &dyn Communicator, device: Device, patience: Option<Duration>) -> Result<Option<Nccl<'_>>> {
    match device {
        Device::Cuda(index) if comm.size() > 1 => Nccl::start(comm, index, patience).map(Some),
        _ => Ok(None),
    }
}

impl<'a> Nccl<'a> {
    /// Joins the ranks of `mpi`, each with its GPU `index`; `patience` as in [`for_gradients`]. A collective call; the error
    /// is the same on all ranks. A rank that cannot join the others inside NCCL ends the run.
    pub fn start(mpi: &'a dyn Communicator, index: usize, patience: Option<Duration>) -> Result<Self> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        let prepared = (|| {
            let api = Api::open()?;
            if mpi.rank() == 0 {
                // SAFETY: writes the id.
                api.checked("unique id", unsafe { (api.get_unique_id)(&mut id) })?;
            }
            let device = cuda("device", driver::device::get(index as c_int))?;
            // SAFETY: a device of the driver; the context is libtorch's too, and released in Drop.
            let context = cuda("context", unsafe { driver::primary_ctx::retain(device) })?;
            // SAFETY: a context that was just retained.
            cuda("context", unsafe { driver::ctx::set_current(context) })?;
            // without NonBlocking it would wait for libtorch's default stream
            let stream = cuda("stream", driver::stream::create(driver::stream::StreamKind::NonBlocking))?;
            Ok((api, device, context, stream))
        })();
        // whoever calls the next function waits for all ranks
        let (failed, prepared) = match prepared {
            Ok(parts) => (Ok(()), Some(parts)),
            Err(e) => (Err(e), None),
        };
        agree(mpi, failed)?;
        let (api, device, context, stream) = prepared.context("another rank failed")?;
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&id.internal).to_vec();
        mpi.broadcast_bytes(&mut bytes, 0)?;
        id.internal.copy_from_slice(bytemuck::cast_slice(&bytes));

        let joined = Arc::new(AtomicBool::new(false));
        watch_set_up(joined.clone(), mpi.rank(), patience);
        let mut comm: ncclComm_t = std::ptr::null_mut();
        // SAFETY: writes the communicator; id, size and rank are those of all ranks.
        let code = unsafe { (api.init_rank)(&mut comm, mpi.size() as c_int, id, mpi.rank() as c_int) };
        joined.store(true, Ordering::Release);
        if !FINE.contains(&code) {
            // the others may wait for this rank inside NCCL, where no error reaches them
            give_up(mpi.rank(), &format!("joining the ranks: {}", api.describe(code)));
        }

        let shared = Arc::new(Shared {
            api,
            comm,
            context,
            stream,
            running: Mutex::default(),
            closed: AtomicBool::new(false),
            patience,
            rank: mpi.rank(),
        });
        let watched = shared.clone();
        let watcher = std::thread::Builder::new().name("nccl".into()).spawn(move || watched.watch())?;
        Ok(Nccl { mpi, shared, watcher: Some(watcher), device })
    }
}

impl Nccl<'_> {
    /// Leaves in an orderly way, with all ranks; without this call a rank leaves as after a failure.
    pub fn close(mut self) {
        self.leave(self.shared.api.destroy);
    }

    /// Ends the watcher and releases everything, once.
    fn leave(&mut self, leave: unsafe extern "C" fn(ncclComm_t) -> c_int) {
        let Some(watcher) = self.watcher.take() else { return };
        self.shared.closed.store(true, Ordering::Release);
        // a panic of the watcher has already ended the process
        let _ = watcher.join();
        let shared = &self.shared;
        // SAFETY: nobody uses the handles any more, and each is released once. Failures are not reported: the process is
        // about to end or has already failed.
        unsafe {
            let _ = driver::ctx::set_current(shared.context);
            let _ = leave(shared.comm);
            let _ = driver::stream::synchronize(shared.stream);
            for (event, _) in shared.running.lock().expect("a panic ends the process").drain(..) {
                let _ = driver::event::destroy(event);
            }
            let _ = driver::stream::destroy(shared.stream);
            let _ = driver::primary_ctx::release(self.device);
        }
    }
}

/// Ends the run if the ranks have not met after a long time.
fn watch_set_up(joined: Arc<AtomicBool>, rank: usize, patience: Option<Duration>) {
    let Some(patience) = patience else { return };
    let begun = Instant::now();
    let watch = move || {
        while !joined.load(Ordering::Acquire) {
            std::thread::sleep(PULSE);
            if begun.elapsed() > patience {
                give_up(rank, &format!("the ranks did not meet within {} s", patience.as_secs()));
            }
        }
    };
    // without the thread a failed set-up may hang, but a sound one is as good
    let _ = std::thread::Builder::new().spawn(watch);
}

fn give_up(rank: usize, why: &str) -> ! {
    let text = format!("error: rank {rank}: NCCL: {why}\n");
    complain(&text);
    super::mpi::end_world(1)
}

impl Shared {
    /// The watcher's loop.
    fn watch(self: Arc<Self>) {
        // SAFETY: a context that lives until the watcher has ended.
        let bound = unsafe { driver::ctx::set_current(self.context) };
        while !self.closed.load(Ordering::Acquire) {
            std::thread::sleep(PULSE);
            let mut error = 0;
            // SAFETY: a live communicator; writes one number.
            let asked = unsafe { (self.api.get_async_error)(self.comm, &mut error) };
            let broken = [asked, error].into_iter().find(|code| !FINE.contains(code));
            if let Some(code) = broken {
                self.take_down(&self.api.describe(code));
            }
            let oldest = if bound.is_ok() { self.oldest_running() } else { None };
            if let (Some(age), Some(patience)) = (oldest, self.patience) {
                if age > patience {
                    self.take_down(&format!("a sum of gradients did not end within {} s", patience.as_secs()));
                }
            }
        }
    }

    /// Age of the oldest sum that has not ended; forgets those that have.
    fn oldest_running(&self) -> Option<Duration> {
        let mut running = self.running.lock().expect("a panic ends the process");
        while let Some((event, started)) = running.front().copied() {
            // SAFETY: an event that is destroyed only here and in Drop.
            if unsafe { driver::event::query(event) }.is_err() {
                return Some(started.elapsed());
            }
            // SAFETY: as above.
            let _ = unsafe { driver::event::destroy(event) };
            running.pop_front();
        }
        None
    }

    fn take_down(self: &Arc<Self>, why: &str) -> ! {
        let me = self.clone();
        // it may wait for a GPU that is stuck, so the end of the run does not wait for it
        // SAFETY: a live communicator that nobody uses after the end of the run, which is now.
        let _ = std::thread::Builder::new().spawn(move || unsafe { (me.api.abort)(me.comm) });
        give_up(self.rank, why)
    }

    /// `later` begins what it is given from now on after `earlier` has done what it was given so far.
    fn order(&self, earlier: sys::CUstream, later: sys::CUstream) -> Result<sys::CUevent> {
        // SAFETY: live handles of this context.
        unsafe {
            cuda("context", driver::ctx::set_current(self.context))?;
            let event = cuda("event", driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
            cuda("event", driver::event::record(event, earlier))?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            cuda("event", driver::stream::wait_event(later, event, flags))?;
            Ok(event)
        }
    }
}

impl Around for Nccl<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.mpi
    }

    fn start_sum(&self, vector: DeviceVector) -> Result<()> {
        let shared = &self.shared;
        let ready = shared.order(vector.stream as sys::CUstream, shared.stream)?;
        // SAFETY: the wait is already queued; an event may be destroyed before it is reached.
        let _ = unsafe { driver::event::destroy(ready) };
        let kind = match vector.wire {
            Wire::F32 => ncclDataType_t::ncclFloat32,
            Wire::Bf16 => ncclDataType_t::ncclBfloat16,
        };
        let address = vector.address as *mut c_void;
        // SAFETY: `length` elements at `address` that nobody touches until finish_sums; all ranks call alike.
        let code = unsafe {
            (shared.api.all_reduce)(
                address,
                address,
                vector.length,
                kind,
                ncclRedOp_t::ncclSum,
                shared.comm,
                shared.stream as cudaStream_t,
            )
        };
        shared.api.checked("sum of gradients", code)?;
        // SAFETY: live handles of the context that `order` has made current.
        let ended = unsafe {
            let event = cuda("event", driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
            cuda("event", driver::event::record(event, shared.stream))?;
            event
        };
        shared.running.lock().expect("a panic ends the process").push_back((ended, Instant::now()));
        Ok(())
    }

    fn finish_sums(&self, stream: usize) -> Result<()> {
        let event = self.shared.order(self.shared.stream, stream as sys::CUstream)?;
        // SAFETY: as in start_sum.
        let _ = unsafe { driver::event::destroy(event) };
        Ok(())
    }
}

impl Drop for Nccl<'_> {
    /// Leaves without the other ranks: after a failure there is nothing to wait for.
    fn drop(&mut self) {
        self.leave(self.shared.api.abort);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Local;

    #[test]
    fn one_rank_and_the_cpu_need_no_nccl() {
        assert!(for_gradients(&Local, Device::Cpu, None).unwrap().is_none());
        assert!(for_gradients(&Local, Device::Cuda(0), None).unwrap().is_none());
    }

    #[test]
    fn a_missing_nccl_is_named() {
        if parts::open_nccl().is_ok() {
            return;
        }
        let error = format!("{:#}", version().unwrap_err());
        assert!(error.contains("no NCCL") && error.contains("libnccl.so.2"), "{error}");
        let error = format!("{:#}", Nccl::start(&Local, 0, None).err().expect("no NCCL"));
        assert!(error.contains("rank 0: no NCCL"), "{error}");
    }
}
