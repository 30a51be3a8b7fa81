//! Sums over ranks alone: what the network does where nothing goes on beside it.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    cli::bench::median,
    comm::{Communicator, DeviceVector, Wire},
    device::{current_stream, stopwatch},
};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct BucketSum {
    pub bucket_bytes: usize,
    /// Median of the whole gradient.
    pub seconds: f64,
}

/// Sizes of buckets in MiB of f32 that are tried.
const BUCKETS_MIB: [usize; 4] = [4, 25, 100, 400];

/// Sums over ranks of a vector with nothing beside them: by MPI on CPUs, by NCCL between events on GPUs.
pub struct Sums<'a> {
    pub comm: &'a dyn Communicator,
    pub device: Device,
    /// Scalars of the gradient.
    pub length: usize,
}

impl Sums<'_> {
    /// The whole vector in buckets of several sizes, those that it fills.
    pub fn in_buckets(&self) -> Result<Vec<BucketSum>> {
        let sizes = BUCKETS_MIB.iter().map(|mib| mib << 20).filter(|bytes| bytes / 4 < self.length);
        let of = |bucket_bytes| Ok(BucketSum { bucket_bytes, seconds: self.seconds(self.length, bucket_bytes / 4)? });
        sizes.map(of).collect()
    }

    /// Median seconds of ten sums of `length` f32 in buckets of `bucket`, after one that is not counted (NCCL connects the
    /// ranks in it).
    pub fn seconds(&self, length: usize, bucket: usize) -> Result<f64> {
        let values = Tensor::zeros([length as i64], (Kind::Float, self.device));
        let mut host = match self.device {
            Device::Cpu => vec![0f32; length],
            _ => Vec::new(),
        };
        let mut sum = || {
            let mut ranges = (0..length).step_by(bucket).map(|from| from..(from + bucket).min(length));
            let Device::Cuda(index) = self.device else {
                return ranges.try_for_each(|range| self.comm.all_reduce_sum_f32(&mut host[range]));
            };
            let stream = current_stream(index)?;
            ranges.try_for_each(|range| {
                let address = values.data_ptr() as u64 + 4 * range.start as u64;
                let vector = DeviceVector { address, length: range.len(), wire: Wire::F32, stream };
                self.comm.start_device_sum(vector)
            })?;
            self.comm.finish_device_sums(stream)
        };
        let mut seconds = Vec::new();
        for repeat in 0..=10 {
            self.comm.barrier()?;
            let took = stopwatch::seconds(self.device, &mut sum)?;
            if repeat > 0 {
                seconds.push(took);
            }
        }
        Ok(median(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Around, Local, Operation};
    use std::cell::RefCell;

    /// Notes the bytes of every sum.
    #[derive(Default)]
    struct Noting(RefCell<Vec<usize>>);

    impl Around for Noting {
        fn inner(&self) -> &dyn Communicator {
            &Local
        }
        fn during<T>(&self, operation: Operation, bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
            if operation == Operation::Sum {
                self.0.borrow_mut().push(bytes);
            }
            act()
        }
    }

    #[test]
    fn a_vector_is_summed_in_buckets_that_cover_it() {
        let comm = Noting::default();
        let sums = Sums { comm: &comm, device: Device::Cpu, length: 3 << 20 };
        let seen = sums.in_buckets().unwrap();
        // 12 MiB in buckets of 4 MiB, eleven times; larger buckets would be the whole
        assert_eq!(seen.iter().map(|s| s.bucket_bytes).collect::<Vec<_>>(), [4 << 20]);
        assert_eq!(*comm.0.borrow(), [4 << 20; 33]);
        comm.0.borrow_mut().clear();
        assert!(sums.seconds(5, 2).unwrap() >= 0.0);
        assert_eq!(comm.0.borrow()[..3], [8, 8, 4]);
    }
}
