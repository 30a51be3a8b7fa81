//! A communicator that tells [`crate::watch`] of every collective operation it is in.

use anyhow::Result;

use super::{Around, Communicator, Operation};
use crate::watch;

pub struct Watched<'a> {
    inner: &'a dyn Communicator,
}

impl<'a> Watched<'a> {
    pub fn new(inner: &'a dyn Communicator) -> Self {
        Watched { inner }
    }
}

impl Around for Watched<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.inner
    }

    fn during<T>(&self, operation: Operation, _bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let _in = watch::collective(match operation {
            Operation::Barrier => "barrier",
            Operation::Broadcast => "broadcast",
            Operation::Gather => "all-gather",
            Operation::Sum => "all-reduce",
        });
        act()
    }

    // a sum's start returns at once; one that does not end is NCCL's own watcher's
    fn finish_sums(&self, stream: usize) -> Result<()> {
        self.during(Operation::Sum, 0, || self.inner.finish_device_sums(stream))
    }
}
