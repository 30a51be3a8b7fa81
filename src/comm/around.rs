//! Communicators that stand around another one, which does the work.

use std::mem;

use anyhow::Result;
use half::bf16;
use serde::{Deserialize, Serialize};

use super::{Communicator, DeviceVector};

/// A kind of collective operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    #[default]
    Barrier,
    Broadcast,
    Gather,
    Sum,
}

/// What a communicator does beside the operations of the one inside it; it is a [`Communicator`] by that.
pub trait Around {
    fn inner(&self) -> &dyn Communicator;

    /// Does one operation: `act` is that of the inner communicator. `bytes` is what this rank brings along.
    fn during<T>(&self, _operation: Operation, _bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        act()
    }

    /// As [`Communicator::start_device_sum`].
    fn start_sum(&self, vector: DeviceVector) -> Result<()> {
        self.inner().start_device_sum(vector)
    }

    /// As [`Communicator::finish_device_sums`].
    fn finish_sums(&self, stream: usize) -> Result<()> {
        self.inner().finish_device_sums(stream)
    }
}

impl<A: Around> Communicator for A {
    fn rank(&self) -> usize {
        self.inner().rank()
    }

    fn size(&self) -> usize {
        self.inner().size()
    }

    fn local_rank(&self) -> (usize, usize) {
        self.inner().local_rank()
    }

    fn sleeps(&self) -> bool {
        self.inner().sleeps()
    }

    fn barrier(&self) -> Result<()> {
        self.during(Operation::Barrier, 0, || self.inner().barrier())
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        self.during(Operation::Broadcast, data.len(), || self.inner().broadcast_bytes(data, root))
    }

    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()> {
        self.during(Operation::Broadcast, mem::size_of_val(data), || self.inner().broadcast_f32(data, root))
    }

    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.during(Operation::Gather, data.len(), || self.inner().all_gather_bytes(data))
    }

    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()> {
        self.during(Operation::Sum, mem::size_of_val(data), || self.inner().all_reduce_sum_f32(data))
    }

    fn all_reduce_sum_bf16(&self, data: &mut [bf16]) -> Result<()> {
        self.during(Operation::Sum, mem::size_of_val(data), || self.inner().all_reduce_sum_bf16(data))
    }

    fn start_device_sum(&self, vector: DeviceVector) -> Result<()> {
        self.start_sum(vector)
    }

    fn finish_device_sums(&self, stream: usize) -> Result<()> {
        self.finish_sums(stream)
    }

    fn abort(&self, code: i32) -> ! {
        self.inner().abort(code)
    }
}
