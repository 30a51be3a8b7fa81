//! How many threads libtorch computes with.

use anyhow::{ensure, Context, Result};

use crate::comm::{all_made, Communicator};

/// Lets libtorch use `count` threads from now on. A collective call.
///
/// # Errors
/// The operating system does not give that many (`ulimit -u`, a container's limit): libtorch would wait for them without
/// end, and OpenMP would end the process.
pub fn use_threads(count: usize, comm: &dyn Communicator) -> Result<()> {
    all_made(comm, try_out(count).with_context(|| format!("{count} threads cannot be had; set fewer")))?;
    tch::set_num_threads(i32::try_from(count).unwrap_or(i32::MAX));
    Ok(())
}

/// Starts `count` threads that live at the same time, this one among them.
fn try_out(count: usize) -> Result<()> {
    let mut running = Vec::new();
    let mut outcome = Ok(());
    for _ in 1..count {
        let (alive, until) = std::sync::mpsc::channel::<()>();
        match std::thread::Builder::new().stack_size(1 << 16).spawn(move || until.recv().is_ok()) {
            Ok(thread) => running.push((alive, thread)),
            Err(e) => {
                outcome = Err(e.into());
                break;
            }
        }
    }
    for (alive, thread) in running {
        drop(alive);
        ensure!(thread.join().is_ok(), "a thread that only waited panicked");
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_can_be_had_are() {
        for count in [0, 1, 5] {
            try_out(count).unwrap();
        }
    }
}
