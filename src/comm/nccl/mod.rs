//! NCCL for gradients in GPU memory, MPI for everything else.
//!
//! Sums run on a stream of their own, beside what libtorch computes. Two threads watch them: an error of the network or
//! of another rank, or a sum that does not end, ends the whole run with a message instead of hanging. NCCL connects the
//! ranks in the first sum of a kind; those are done at the start. After a failure the message comes first: nothing that
//! may block is done before it.
//!
//! NCCL's library is opened here, as `libnccl.so.2` or `libnccl.so`: cudarc would look for the second name only, which
//! PyTorch's package does not have. The types are cudarc's.

mod api;
mod limit;
mod waits;

use std::{
    ffi::{c_int, c_void},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Condvar, Mutex, PoisonError,
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{anyhow, Context, Result};
use cudarc::{
    driver::{result as driver, sys},
    nccl::sys::{cudaStream_t, ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId},
};
use tch::Device;

use self::{
    api::{Api, FINE},
    limit::{give_up, Limit, What, PULSE},
};
use super::{agree, Around, Communicator, DeviceVector, Wire};

pub use self::{api::version, waits::waited};

/// A sum, or the set-up, that takes longer than this ends the run where no other limit is given.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes of f32 in the largest of the first sums: NCCL does nothing else for longer vectors.
const LARGEST_FIRST_SUM: usize = 64 << 20;
/// Elements of the smaller ones: NCCL has one way for few elements and another one in between.
const SMALL_FIRST_SUMS: [usize; 2] = [8, 1 << 14];

/// What will be summed, and how long a rank waits.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// A sum, the set-up, or leaving, that takes longer ends the run; None waits for ever.
    pub patience: Option<Duration>,
    /// Bytes of f32 that are summed at once.
    pub bucket_bytes: usize,
    /// Number type of gradients on their way; f32 is summed in any case.
    pub wire: Wire,
}

/// Buckets of 25 MiB, either number type.
impl From<Option<Duration>> for Terms {
    fn from(patience: Option<Duration>) -> Self {
        Terms { patience, bucket_bytes: 25 << 20, wire: Wire::Bf16 }
    }
}

impl Terms {
    /// The sums to begin with, one for each way in which NCCL will do the others: number type and elements.
    fn first_sums(&self) -> Vec<(Wire, usize)> {
        let bucket = (self.bucket_bytes.min(LARGEST_FIRST_SUM) / 4).max(1);
        let mut lengths: Vec<usize> = SMALL_FIRST_SUMS.into_iter().filter(|&small| small < bucket).collect();
        lengths.push(bucket);
        let wires = match self.wire {
            Wire::F32 => &[Wire::F32][..],
            Wire::Bf16 => &[Wire::F32, Wire::Bf16],
        };
        wires.iter().flat_map(|&wire| lengths.iter().map(move |&length| (wire, length))).collect()
    }
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
    limit: Arc<Limit>,
    closed: AtomicBool,
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
    /// Taken by whoever leaves.
    held: Option<Held>,
}

/// What is given back at the end.
struct Held {
    shared: Arc<Shared>,
    watcher: JoinHandle<()>,
    device: sys::CUdevice,
}

/// The communicator for gradients on `device`: None where `comm` itself can do it (one rank, or the CPU). A sum, or the
/// set-up, that takes longer than the patience of `terms` ends the run. A collective call.
pub fn for_gradients(comm: &dyn Communicator, device: Device, terms: impl Into<Terms>) -> Result<Option<Nccl<'_>>> {
    match device {
        Device::Cuda(index) if comm.size() > 1 => Nccl::start(comm, index, terms).map(Some),
        _ => Ok(None),
    }
}

/// GPU memory for the first sums; NCCL takes its own beside it, before libtorch has taken the rest.
struct Room(sys::CUdeviceptr);

impl Room {
    /// Zeros. The context is current.
    fn new(bytes: usize) -> Result<Self> {
        // SAFETY: memory of the current context, of the length that is set.
        unsafe {
            let room = Room(cuda("memory for the first sums", driver::malloc_sync(bytes))?);
            cuda("memory for the first sums", driver::memset_d8_sync(room.0, 0, bytes))?;
            Ok(room)
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; the sums in it have ended, or the process is about to.
        let _ = unsafe { driver::free_sync(self.0) };
    }
}

impl<'a> Nccl<'a> {
    /// Joins the ranks of `mpi`, each with its GPU `index`, and does one sum of each kind that `terms` ask for: NCCL
    /// connects the ranks of a kind in its first sum, in a call that waits for all of them. A collective call; the error is
    /// the same on all ranks. A rank that cannot join the others inside NCCL ends the run.
    pub fn start(mpi: &'a dyn Communicator, index: usize, terms: impl Into<Terms>) -> Result<Self> {
        let terms: Terms = terms.into();
        let sums = terms.first_sums();
        let mut id = ncclUniqueId { internal: [0; 128] };
        let prepared = (|| {
            let api = Api::open()?;
            if mpi.rank() == 0 {
                // SAFETY: writes the id.
                api.checked("unique id", unsafe { (api.get_unique_id)(&mut id) })?;
            }
            let device = cuda("device", driver::device::get(index as c_int))?;
            // SAFETY: a device of the driver; the context is libtorch's too, and released when this one leaves.
            let context = cuda("context", unsafe { driver::primary_ctx::retain(device) })?;
            // SAFETY: a context that was just retained.
            cuda("context", unsafe { driver::ctx::set_current(context) })?;
            // without NonBlocking it would wait for libtorch's default stream
            let stream = cuda("stream", driver::stream::create(driver::stream::StreamKind::NonBlocking))?;
            let room = Room::new(4 * sums.iter().map(|(_, length)| *length).max().unwrap_or(0))?;
            let limit = Limit::start(mpi.rank(), terms.patience)?;
            Ok((api, device, context, stream, room, limit))
        })();
        // whoever calls the next function waits for all ranks
        let (failed, prepared) = match prepared {
            Ok(parts) => (Ok(()), Some(parts)),
            Err(e) => (Err(e), None),
        };
        if let Err(e) = agree(mpi, failed) {
            prepared.iter().for_each(|(.., limit)| drop(limit.close()));
            return Err(e);
        }
        let (api, device, context, stream, room, limit) = prepared.context("another rank failed")?;
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&id.internal).to_vec();
        mpi.broadcast_bytes(&mut bytes, 0)?;
        id.internal.copy_from_slice(bytemuck::cast_slice(&bytes));

        let set_up = limit.begin(What::SetUp("joining the ranks".into()));
        let mut comm: ncclComm_t = std::ptr::null_mut();
        // SAFETY: writes the communicator; id, size and rank are those of all ranks.
        let code = unsafe { (api.init_rank)(&mut comm, mpi.size() as c_int, id, mpi.rank() as c_int) };
        if !FINE.contains(&code) {
            // the others may wait for this rank inside NCCL, where no error reaches them
            give_up(mpi.rank(), &format!("joining the ranks: {}", api.describe(code)));
        }
        let shared =
            Arc::new(Shared { api, comm, context, stream, limit, closed: AtomicBool::new(false), rank: mpi.rank() });
        let watched = shared.clone();
        let watcher = std::thread::Builder::new().name("nccl".into()).spawn(move || watched.watch())?;
        if let Err(e) = shared.first_sums(set_up, &room, &sums) {
            give_up(mpi.rank(), &format!("the first sums: {e:#}"));
        }
        let held = Held { shared: shared.clone(), watcher, device };
        Ok(Nccl { mpi, shared, held: Some(held) })
    }
}

impl Nccl<'_> {
    /// Leaves in an orderly way, with all ranks; without this call a rank leaves as after a failure.
    pub fn close(mut self) {
        let Some(held) = self.held.take() else { return };
        held.shared.limit.begin(What::Leaving);
        let destroy = held.shared.api.destroy;
        held.give_back(destroy);
    }
}

impl Held {
    /// Ends the watcher and releases everything.
    fn give_back(self, leave: unsafe extern "C" fn(ncclComm_t) -> c_int) {
        let Held { shared, watcher, device } = self;
        shared.closed.store(true, Ordering::Release);
        // a panic of the watcher has already ended the process
        let _ = watcher.join();
        // SAFETY: nobody uses the handles any more, and each is released once. Failures are not reported: the process is
        // about to end or has already failed.
        unsafe {
            let _ = driver::ctx::set_current(shared.context);
            let _ = leave(shared.comm);
            let _ = driver::stream::synchronize(shared.stream);
            for event in shared.limit.close() {
                let _ = driver::event::destroy(event);
            }
            waits::forget();
            let _ = driver::stream::destroy(shared.stream);
            let _ = driver::primary_ctx::release(device);
        }
    }
}

/// Threads of [`Nccl::drop`] that have not ended.
static LEAVING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// Waits until what was dropped without [`Nccl::close`] has left, but no longer than `limit`: a process should not end in
/// the middle of it. To be called when nothing is left to be said.
pub fn settle(limit: Duration) {
    let (count, changed) = &LEAVING;
    let count = count.lock().unwrap_or_else(PoisonError::into_inner);
    drop(changed.wait_timeout_while(count, limit, |count| *count > 0));
}

impl Shared {
    /// The watcher's loop.
    fn watch(&self) {
        // SAFETY: a context that lives until the watcher has ended.
        let bound = unsafe { driver::ctx::set_current(self.context) };
        while !self.closed.load(Ordering::Acquire) {
            std::thread::sleep(PULSE);
            let mut error = 0;
            // SAFETY: a live communicator; writes one number.
            let asked = unsafe { (self.api.get_async_error)(self.comm, &mut error) };
            let broken = [asked, error].into_iter().find(|code| !FINE.contains(code));
            if let Some(code) = broken {
                give_up(self.rank, &self.api.describe(code));
            }
            if bound.is_ok() {
                self.forget_what_has_ended();
            }
        }
    }

    fn forget_what_has_ended(&self) {
        while let Some((number, event)) = self.limit.oldest_running() {
            // SAFETY: an event that is destroyed only here and after the watcher's end.
            if unsafe { driver::event::query(event) }.is_err() {
                return;
            }
            self.limit.end(number);
            // SAFETY: as above.
            let _ = unsafe { driver::event::destroy(event) };
        }
    }

    /// `later` begins what it is given from now on after `earlier` has done what it was given so far.
    fn order(&self, earlier: sys::CUstream, later: sys::CUstream) -> Result<()> {
        // SAFETY: live handles of this context.
        unsafe {
            let event = cuda("event", driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
            cuda("event", driver::event::record(event, earlier))?;
            let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
            cuda("event", driver::stream::wait_event(later, event, flags))?;
            // the wait is already queued; an event may be destroyed before it is reached
            let _ = driver::event::destroy(event);
        }
        Ok(())
    }

    /// Gives NCCL's stream a sum over ranks, and an event behind it.
    fn sum(&self, address: u64, length: usize, wire: Wire) -> Result<sys::CUevent> {
        let kind = match wire {
            Wire::F32 => ncclDataType_t::ncclFloat32,
            Wire::Bf16 => ncclDataType_t::ncclBfloat16,
        };
        let address = address as *mut c_void;
        // SAFETY: `length` elements at `address` that nobody touches until finish_sums; all ranks call alike.
        let code = unsafe {
            (self.api.all_reduce)(
                address,
                address,
                length,
                kind,
                ncclRedOp_t::ncclSum,
                self.comm,
                self.stream as cudaStream_t,
            )
        };
        self.api.checked("sum of gradients", code)?;
        // SAFETY: live handles of the context, which the caller has made current.
        unsafe {
            let event = cuda("event", driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))?;
            cuda("event", driver::event::record(event, self.stream))?;
            Ok(event)
        }
    }

    /// One sum of each kind in `room`, and what NCCL allocates and connects for it; then the set-up has ended.
    fn first_sums(&self, set_up: u64, room: &Room, sums: &[(Wire, usize)]) -> Result<()> {
        for &(wire, length) in sums {
            self.limit.at(set_up, format!("the first sum of {length} {wire:?}"));
            let event = self.sum(room.0, length, wire)?;
            // SAFETY: an event and a stream of the current context; the event is used no more.
            unsafe {
                cuda("first sums", driver::stream::synchronize(self.stream))?;
                let _ = driver::event::destroy(event);
            }
        }
        self.limit.end(set_up);
        Ok(())
    }

    fn bind(&self) -> Result<()> {
        // SAFETY: a context that lives as long as this.
        cuda("context", unsafe { driver::ctx::set_current(self.context) })
    }
}

impl Around for Nccl<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.mpi
    }

    fn start_sum(&self, vector: DeviceVector) -> Result<()> {
        let shared = &self.shared;
        let number = shared.limit.begin(What::Sum);
        let started = (|| {
            shared.bind()?;
            shared.order(vector.stream as sys::CUstream, shared.stream)?;
            shared.sum(vector.address, vector.length, vector.wire)
        })();
        match started {
            Ok(event) => shared.limit.runs(number, event),
            Err(e) => {
                shared.limit.end(number);
                return Err(e);
            }
        }
        Ok(())
    }

    fn finish_sums(&self, stream: usize) -> Result<()> {
        let (shared, stream) = (&self.shared, stream as sys::CUstream);
        shared.bind()?;
        let begins = waits::point(stream)?;
        shared.order(shared.stream, stream)?;
        waits::note(shared.context, begins, waits::point(stream)?);
        Ok(())
    }
}

impl Drop for Nccl<'_> {
    /// Leaves without the other ranks: after a failure there is nothing to wait for. Whatever may block here (NCCL waits for
    /// its kernels, the driver for the GPU) is a thread's, so that the caller comes to say what has failed.
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let (count, changed) = &LEAVING;
        *count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        let leave = move || {
            let abort = held.shared.api.abort;
            held.give_back(abort);
            *count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
            changed.notify_all();
        };
        // without a thread everything stays as it is until the process ends, which is soon
        let _ = std::thread::Builder::new().name("nccl leaves".into()).spawn(leave);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{comm::Local, device::parts};

    #[test]
    fn one_rank_and_the_cpu_need_no_nccl() {
        assert!(for_gradients(&Local, Device::Cpu, None).unwrap().is_none());
        assert!(for_gradients(&Local, Device::Cuda(0), None).unwrap().is_none());
    }

    #[test]
    fn the_first_sums_are_of_each_kind() {
        let of = |bucket_bytes, wire| Terms { patience: None, bucket_bytes, wire }.first_sums();
        assert_eq!(of(25 << 20, Wire::F32), [8, 1 << 14, 25 << 18].map(|length| (Wire::F32, length)));
        let both = of(64, Wire::Bf16);
        assert_eq!(both, [(Wire::F32, 8), (Wire::F32, 16), (Wire::Bf16, 8), (Wire::Bf16, 16)]);
        // one bucket of everything does not take everything's memory
        assert_eq!(of(usize::MAX, Wire::F32)[2], (Wire::F32, 16 << 20));
        assert_eq!(of(1, Wire::F32), [(Wire::F32, 1)]);
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
