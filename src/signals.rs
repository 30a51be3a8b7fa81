//! Signals that ask a run to save and leave: SIGTERM, SIGUSR1, SIGUSR2 (what Slurm and launchers send before they take
//! a job away).
//!
//! The handler stores the signal's number and does nothing else, so a signal may come at any moment, to any number of
//! ranks, any number of times: inside a collective, inside a save, twice at once. Ranks agree on it by a reduction at
//! places that all of them pass: before the first iteration, after each one, and between the parts of the evaluation
//! at the end. One rank's signal therefore stops all of them at the same place.
//!
//! Why after an iteration and not within: there the state is weights, moments and counters. In the middle of one it is
//! also every latent of the iteration's trajectories (6.8 GB for 2,048 samples of 51 latents of 64 KiB) and the half
//! filled log, which would have to be saved and sharded as well. The paper's iteration takes 43 s on its machine, and
//! the batch scripts ask Slurm for a warning of 120 s. A smaller machine needs a longer warning (twice an iteration), or
//! loses what it did since the last checkpoint.

use std::{
    io,
    sync::atomic::{AtomicI32, Ordering},
};

use anyhow::{Context, Result};

use crate::comm::Communicator;

const HANDLED: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];

/// The last signal that came, 0 for none.
static ASKED_TO_STOP: AtomicI32 = AtomicI32::new(0);

extern "C" fn remember(signal: libc::c_int) {
    ASKED_TO_STOP.store(signal, Ordering::SeqCst);
}

/// Installs the handlers; a second call changes nothing, unless a library has installed its own in between.
pub fn install() -> Result<()> {
    set_handlers(remember as extern "C" fn(libc::c_int) as libc::sighandler_t)
}

/// Gives the signals their usual effect back; one that came since [`install`] has it now.
pub fn release() -> Result<()> {
    set_handlers(libc::SIG_DFL)?;
    match ASKED_TO_STOP.load(Ordering::SeqCst) {
        0 => {}
        // SAFETY: raising a signal whose effect is the default one.
        signal => unsafe {
            libc::raise(signal);
        },
    }
    Ok(())
}

fn set_handlers(handler: libc::sighandler_t) -> Result<()> {
    for signal in HANDLED {
        // SAFETY: the struct is plain data; our handler only stores to an atomic, which is allowed in a handler.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler;
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
    let asked = ASKED_TO_STOP.load(Ordering::SeqCst) != 0;
    let mut ranks_asked = [f32::from(u8::from(asked))];
    comm.all_reduce_sum_f32(&mut ranks_asked)?;
    Ok(ranks_asked[0] > 0.0)
}
