//! What a computation allocates: how often, and on the host how many bytes: what a forward pass keeps for its backward pass,
//! and the peak.

use std::marker::PhantomData;

use tch::Device;

extern "C" {
    fn allocations_begin();
    fn allocations_read(now: *mut i64, peak: *mut i64, made_on_host: *mut i64, made_on_gpu: *mut i64);
    fn allocations_end();
}

/// Counts what this thread allocates through libtorch, backward passes that it starts included, until it is dropped.
/// Memory that was allocated before and is given back meanwhile does not count.
pub struct Allocations {
    /// The count belongs to the thread that began it.
    _here: PhantomData<*const ()>,
}

impl Allocations {
    pub fn begin() -> Self {
        // SAFETY: no arguments; the state is the calling thread's.
        unsafe { allocations_begin() };
        Allocations { _here: PhantomData }
    }

    /// Bytes that are alive now.
    pub fn alive(&self) -> u64 {
        self.read()[0]
    }

    /// The most bytes that were alive at once.
    pub fn peak(&self) -> u64 {
        self.read()[1]
    }

    /// How many allocations there were on `device`, or another GPU.
    pub fn made(&self, device: Device) -> u64 {
        self.read()[if device == Device::Cpu { 2 } else { 3 }]
    }

    fn read(&self) -> [u64; 4] {
        let [mut now, mut peak, mut on_host, mut on_gpu] = [0; 4];
        // SAFETY: all point to live integers; `self` proves that a count is under way on this thread.
        unsafe { allocations_read(&mut now, &mut peak, &mut on_host, &mut on_gpu) };
        [now, peak, on_host, on_gpu].map(|count| count.max(0) as u64)
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        // SAFETY: ends the count that `begin` began on this thread.
        unsafe { allocations_end() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn kept_and_peak_bytes() {
        let before = Tensor::ones([1000], (Kind::Float, Device::Cpu));
        let count = Allocations::begin();
        let a = Tensor::zeros([250_000], (Kind::Float, Device::Cpu));
        drop(Tensor::zeros([500_000], (Kind::Float, Device::Cpu)));
        drop(before);
        assert_eq!(count.alive(), 1_000_000);
        assert_eq!(count.peak(), 3_000_000);
        assert_eq!((count.made(Device::Cpu), count.made(Device::Cuda(0))), (2, 0));
        drop(a);
        assert_eq!(count.alive(), 0);
    }
}
