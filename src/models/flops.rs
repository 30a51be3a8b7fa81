//! Counts the floating-point operations of forward passes (2 per multiply-add) of linear layers, convolutions and
//! attention products, on this rank. A backward pass costs twice its forward pass.

use std::sync::atomic::{AtomicU64, Ordering};

static TOTAL: AtomicU64 = AtomicU64::new(0);

pub(super) fn add(multiply_adds: i64) {
    TOTAL.fetch_add(2 * multiply_adds as u64, Ordering::Relaxed);
}

/// Operations counted since the process began.
pub fn counted() -> u64 {
    TOTAL.load(Ordering::Relaxed)
}
