//! How long a GPU has waited for sums over ranks: between two events of the stream that computes, one before it waits for
//! NCCL's stream and one after. That is no work of this rank's own; [`crate::watch::waited`] counts it.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Result;
use cudarc::driver::{result as driver, sys};

use super::cuda;

/// A wait that may not have ended yet.
struct Wait {
    context: sys::CUcontext,
    begins: sys::CUevent,
    ends: sys::CUevent,
}

// SAFETY: handles of the driver, which any thread may use.
unsafe impl Send for Wait {}

struct Waits {
    /// Oldest first.
    pending: VecDeque<Wait>,
    ended: Duration,
}

static WAITS: Mutex<Waits> = Mutex::new(Waits { pending: VecDeque::new(), ended: Duration::ZERO });

fn waits() -> MutexGuard<'static, Waits> {
    WAITS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A point of `stream`, with a time. The context is current.
pub(super) fn point(stream: sys::CUstream) -> Result<sys::CUevent> {
    // SAFETY: live handles of the current context.
    unsafe {
        let event = cuda("event", driver::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?;
        cuda("event", driver::event::record(event, stream))?;
        Ok(event)
    }
}

/// A wait between two points, which is the owner of them from now on.
pub(super) fn note(context: sys::CUcontext, begins: sys::CUevent, ends: sys::CUevent) {
    waits().pending.push_back(Wait { context, begins, ends });
}

/// The time of all waits that have ended. Whoever wants all of them waits for the GPU first.
pub fn waited() -> Duration {
    let mut waits = waits();
    while let Some(&Wait { context, begins, ends }) = waits.pending.front() {
        // SAFETY: events that live until they are taken out here or in `forget`; the context outlives them.
        let took = unsafe {
            if driver::ctx::set_current(context).is_err() || driver::event::query(ends).is_err() {
                break;
            }
            driver::event::elapsed(begins, ends)
        };
        waits.pending.pop_front();
        // SAFETY: as above; both have happened.
        unsafe { destroy(begins, ends) };
        // a time that the driver does not know is no wait
        waits.ended += took.map_or(Duration::ZERO, |ms| Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3));
    }
    waits.ended
}

/// Gives the events of all waits back, before their context goes.
///
/// # Safety
/// The context of the events is current.
pub(super) unsafe fn forget() {
    let pending = std::mem::take(&mut waits().pending);
    // SAFETY: events that nobody else has.
    pending.into_iter().for_each(|wait| unsafe { destroy(wait.begins, wait.ends) });
}

/// # Safety
/// Two live events that nobody uses any more.
unsafe fn destroy(begins: sys::CUevent, ends: sys::CUevent) {
    // SAFETY: the caller's; there is nobody to report a failure to.
    unsafe {
        let _ = driver::event::destroy(begins);
        let _ = driver::event::destroy(ends);
    }
}
