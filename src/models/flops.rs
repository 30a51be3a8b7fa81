//! Counts the floating-point operations of forward passes (2 per multiply-add) of linear layers, convolutions and
//! attention products, on this rank. A backward pass costs twice its forward pass; what gradient checkpointing computes
//! again is not counted.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

static TOTAL: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static PAUSED: Cell<bool> = const { Cell::new(false) };
}

pub(super) fn add(multiply_adds: i64) {
    if !PAUSED.get() {
        TOTAL.fetch_add(2 * multiply_adds as u64, Ordering::Relaxed);
    }
}

/// `f` without its operations being counted: what is computed a second time to save memory is no progress.
pub(super) fn uncounted<T>(f: impl FnOnce() -> T) -> T {
    let before = PAUSED.replace(true);
    let result = f();
    PAUSED.set(before);
    result
}

/// Adds operations that a replay does again.
pub(crate) fn add_counted(operations: u64) {
    TOTAL.fetch_add(operations, Ordering::Relaxed);
}

/// Operations counted since the process began.
pub fn counted() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}
