//! A communicator that tells [`crate::watch`] of every collective operation it is in.

use anyhow::Result;
use half::bf16;

use super::{Communicator, DeviceVector};
use crate::watch;

pub struct Watched<'a> {
    inner: &'a dyn Communicator,
}

impl<'a> Watched<'a> {
    pub fn new(inner: &'a dyn Communicator) -> Self {
        Watched { inner }
    }
}

impl Communicator for Watched<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn local_rank(&self) -> (usize, usize) {
        self.inner.local_rank()
    }

    fn barrier(&self) -> Result<()> {
        let _in = watch::collective("barrier");
        self.inner.barrier()
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        let _in = watch::collective("broadcast");
        self.inner.broadcast_bytes(data, root)
    }

    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()> {
        let _in = watch::collective("broadcast");
        self.inner.broadcast_f32(data, root)
    }

    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
        let _in = watch::collective("all-gather");
        self.inner.all_gather_bytes(data)
    }

    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()> {
        let _in = watch::collective("all-reduce");
        self.inner.all_reduce_sum_f32(data)
    }

    fn all_reduce_sum_bf16(&self, data: &mut [bf16]) -> Result<()> {
        let _in = watch::collective("all-reduce");
        self.inner.all_reduce_sum_bf16(data)
    }

    // returns at once; a sum that does not end is NCCL's own watcher's
    fn start_device_sum(&self, vector: DeviceVector) -> Result<()> {
        self.inner.start_device_sum(vector)
    }

    fn finish_device_sums(&self, stream: usize) -> Result<()> {
        let _in = watch::collective("all-reduce");
        self.inner.finish_device_sums(stream)
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}
