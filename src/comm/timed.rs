//! A communicator that notes when its rank came to each collective operation and when it left. Between two of them a
//! rank works by itself, so these notes are all that a model of scaling needs.

use std::{cell::RefCell, mem, time::Instant};

use anyhow::Result;
use half::bf16;
use serde::{Deserialize, Serialize};

use super::{Communicator, DeviceVector};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Barrier,
    Broadcast,
    Gather,
    Sum,
}

/// One collective operation on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Visit {
    pub operation: Operation,
    /// What this rank brought along, bytes.
    pub bytes: usize,
    /// Seconds since it left the operation before.
    pub work: f64,
    /// Seconds inside: waiting for the others, and the operation itself.
    pub inside: f64,
}

pub struct Timed<'a> {
    inner: &'a dyn Communicator,
    notes: RefCell<(Instant, Vec<Visit>)>,
}

impl<'a> Timed<'a> {
    pub fn new(inner: &'a dyn Communicator) -> Self {
        Timed { inner, notes: RefCell::new((Instant::now(), Vec::new())) }
    }

    /// What was noted so far; from now on the first operation's work counts.
    pub fn take(&self) -> Vec<Visit> {
        let mut notes = self.notes.borrow_mut();
        notes.0 = Instant::now();
        mem::take(&mut notes.1)
    }

    fn note<T>(&self, operation: Operation, bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let came = Instant::now();
        let result = act()?;
        let mut notes = self.notes.borrow_mut();
        let work = (came - notes.0).as_secs_f64();
        notes.0 = Instant::now();
        let inside = (notes.0 - came).as_secs_f64();
        notes.1.push(Visit { operation, bytes, work, inside });
        Ok(result)
    }
}

impl Communicator for Timed<'_> {
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
        self.note(Operation::Barrier, 0, || self.inner.barrier())
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        self.note(Operation::Broadcast, data.len(), || self.inner.broadcast_bytes(data, root))
    }

    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()> {
        self.note(Operation::Broadcast, mem::size_of_val(data), || self.inner.broadcast_f32(data, root))
    }

    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.note(Operation::Gather, data.len(), || self.inner.all_gather_bytes(data))
    }

    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()> {
        self.note(Operation::Sum, mem::size_of_val(data), || self.inner.all_reduce_sum_f32(data))
    }

    fn all_reduce_sum_bf16(&self, data: &mut [bf16]) -> Result<()> {
        self.note(Operation::Sum, mem::size_of_val(data), || self.inner.all_reduce_sum_bf16(data))
    }

    // sums of GPU memory go on beside other work: there is nothing to note
    fn start_device_sum(&self, vector: DeviceVector) -> Result<()> {
        self.inner.start_device_sum(vector)
    }

    fn finish_device_sums(&self, stream: usize) -> Result<()> {
        self.inner.finish_device_sums(stream)
    }

    fn abort(&self, code: i32) -> ! {
        self.inner.abort(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::Local;
    use std::{thread::sleep, time::Duration};

    #[test]
    fn work_lies_between_the_operations() {
        let timed = Timed::new(&Local);
        timed.take();
        sleep(Duration::from_millis(20));
        timed.all_reduce_sum_f32(&mut [0.0; 3]).unwrap();
        assert_eq!(timed.all_gather_bytes(b"abc").unwrap(), [b"abc".to_vec()]);
        let visits = timed.take();
        let seen: Vec<_> = visits.iter().map(|visit| (visit.operation, visit.bytes)).collect();
        assert_eq!(seen, [(Operation::Sum, 12), (Operation::Gather, 3)]);
        assert!(visits[0].work >= 0.02 && visits[1].work < visits[0].work && visits[0].inside < 0.02, "{visits:?}");
        assert!(timed.take().is_empty());
    }
}
