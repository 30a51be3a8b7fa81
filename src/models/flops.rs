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
    /// Where this thread counts for somebody who asked.
    static APART: Cell<Option<u64>> = const { Cell::new(None) };
}

pub(super) fn add(multiply_adds: i64) {
    if !PAUSED.get() {
        add_counted(2 * multiply_adds as u64);
    }
}

/// `f` without its operations being counted: what is computed a second time to save memory is no progress.
pub(super) fn uncounted<T>(f: impl FnOnce() -> T) -> T {
    let before = PAUSED.replace(true);
    let result = f();
    PAUSED.set(before);
    result
}

/// What `f` gives and how many operations that took on this thread; they do not count otherwise.
pub(crate) fn apart<T>(f: impl FnOnce() -> T) -> (T, u64) {
    let before = APART.replace(Some(0));
    let result = f();
    (result, APART.replace(before).unwrap_or(0))
}

/// Adds operations that a replay does again.
pub(crate) fn add_counted(operations: u64) {
    match APART.get() {
        Some(apart) => APART.set(Some(apart + operations)),
        None => drop(TOTAL.fetch_add(operations, Ordering::Relaxed)),
    }
}

/// Operations counted since the process began.
pub fn counted() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}
