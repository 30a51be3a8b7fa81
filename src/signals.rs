//! Signals that ask a run to save and leave: SIGTERM, SIGUSR1, SIGUSR2 (what Slurm sends before it takes a job away).
//!
//! The handler sets a flag and does nothing else. Ranks agree on it at the end of an iteration, so that one rank's
//! signal stops all of them at the same place.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};

use crate::comm::Communicator;

static ASKED_TO_STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_: libc::c_int) {
    ASKED_TO_STOP.store(true, Ordering::SeqCst);
}

/// Installs the handlers; a second call changes nothing.
pub fn install() -> Result<()> {
    for signal in [libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2] {
        // SAFETY: the struct is plain data; the handler only stores to an atomic, which is allowed in a handler.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = remember as extern "C" fn(libc::c_int) as libc::sighandler_t;
            // reads and writes under way go on instead of failing with EINTR
            action.sa_flags = libc::SA_RESTART;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(signal, &action, std::ptr::null_mut())
        };
        if installed != 0 {
            return Err(io::Error::last_os_error()).with_context(|| format!("cannot handle signal {signal}"));
        }
    }
    Ok(())
}

/// Has any rank been asked to stop? The same answer on all ranks; a collective call.
pub fn asked_to_stop(comm: &dyn Communicator) -> Result<bool> {
    let mut ranks_asked = [f32::from(u8::from(ASKED_TO_STOP.load(Ordering::SeqCst)))];
    comm.all_reduce_sum_f32(&mut ranks_asked)?;
    Ok(ranks_asked[0] > 0.0)
}
