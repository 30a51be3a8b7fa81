//! The message of a failure when the way to it is blocked.

use std::time::Duration;

use anyhow::{Context, Error, Result};

use super::mpi::end_world;
use crate::{memory, streams::complain};

/// Says `error` of rank `rank` and ends the run, unless the process has ended by itself within `limit`: what a failing rank
/// drops on its way out (memory and graphs of a GPU) may wait for a GPU that waits for other ranks, and those wait for it.
///
/// # Errors
/// There is no thread for it.
pub fn last_words(rank: usize, error: &Error, limit: Duration) -> Result<()> {
    let text = format!("{error:#}");
    let text = memory::explain(&text).unwrap_or(text);
    let speak = move || {
        std::thread::sleep(limit);
        complain(&format!("error: rank {rank}: {text}\n"));
        end_world(1)
    };
    std::thread::Builder::new().name("last words".into()).spawn(speak).context("cannot start a thread")?;
    Ok(())
}
