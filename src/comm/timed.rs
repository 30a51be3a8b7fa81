//! A communicator that notes when its rank came to each collective operation and when it left. Between two of them a
//! rank works by itself, so these notes are all that a model of scaling needs.
//!
//! Sums of GPU memory go on beside the backward pass that makes their vectors, so they are noted once per pass, at its
//! end: what was summed, how much of the pass they had to hide in (`window`), and what was left of them after it
//! (`inside`), between points of the stream that computes. For that the host waits there for the GPU, which a run does not.

use std::{cell::RefCell, mem, sync::Mutex, time::Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Around, Communicator, DeviceVector, Operation, Wire};
use crate::device::stopwatch::{Events, Points};

/// One collective operation on this rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Visit {
    pub operation: Operation,
    /// What this rank brought along, bytes.
    pub bytes: usize,
    /// Seconds since it left the operation before.
    pub work: f64,
    /// Seconds inside: waiting for the others, and the operation itself.
    pub inside: f64,
    /// Of the work: seconds during which the operation could already go on.
    pub window: f64,
    /// Vectors that it was made in.
    pub vectors: usize,
}

pub struct Timed<'a> {
    inner: &'a dyn Communicator,
    notes: RefCell<(Instant, Vec<Visit>)>,
    /// Device sums may start on another thread than this communicator's own.
    sums: Mutex<DeviceSums>,
}

/// The sums of one backward pass.
struct DeviceSums {
    points: Box<dyn Points>,
    /// When the first vector was there.
    first: Option<usize>,
    bytes: usize,
    vectors: usize,
}

impl<'a> Timed<'a> {
    pub fn new(inner: &'a dyn Communicator) -> Self {
        Timed::by(inner, Box::<Events>::default())
    }

    fn by(inner: &'a dyn Communicator, points: Box<dyn Points>) -> Self {
        let sums = Mutex::new(DeviceSums { points, first: None, bytes: 0, vectors: 0 });
        Timed { inner, notes: RefCell::new((Instant::now(), Vec::new())), sums }
    }

    /// What was noted so far; from now on the first operation's work counts.
    pub fn take(&self) -> Vec<Visit> {
        let mut notes = self.notes.borrow_mut();
        notes.0 = Instant::now();
        mem::take(&mut notes.1)
    }

    /// A visit that ends now and was `inside` for so many seconds.
    fn note(&self, visit: Visit) {
        let mut notes = self.notes.borrow_mut();
        let now = Instant::now();
        let work = ((now - notes.0).as_secs_f64() - visit.inside).max(0.0);
        notes.0 = now;
        notes.1.push(Visit { work, ..visit });
    }
}

impl Around for Timed<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.inner
    }

    fn during<T>(&self, operation: Operation, bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let came = Instant::now();
        let result = act()?;
        let inside = came.elapsed().as_secs_f64();
        self.note(Visit { operation, bytes, inside, vectors: 1, ..Visit::default() });
        Ok(result)
    }

    fn start_sum(&self, vector: DeviceVector) -> Result<()> {
        let mut sums = self.sums.lock().expect("a panic ends the process");
        if sums.first.is_none() {
            sums.first = Some(sums.points.point(vector.stream)?);
        }
        let width = if vector.wire == Wire::F32 { 4 } else { 2 };
        sums.bytes += width * vector.length;
        sums.vectors += 1;
        self.inner.start_device_sum(vector)
    }

    fn finish_sums(&self, stream: usize) -> Result<()> {
        let mut sums = self.sums.lock().expect("a panic ends the process");
        let ended = sums.points.point(stream)?;
        self.inner.finish_device_sums(stream)?;
        let summed = sums.points.point(stream)?;
        let inside = sums.points.seconds(ended, summed)?;
        let window = sums.first.take().map_or(Ok(0.0), |first| sums.points.seconds(first, ended))?;
        let (bytes, vectors) = (mem::take(&mut sums.bytes), mem::take(&mut sums.vectors));
        sums.points.forget();
        drop(sums);
        self.note(Visit { operation: Operation::Sum, bytes, inside, window, vectors, ..Visit::default() });
        Ok(())
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

    /// A stream that works on the spot.
    #[derive(Default)]
    struct Host(Vec<Instant>);

    impl Points for Host {
        fn point(&mut self, _: usize) -> Result<usize> {
            self.0.push(Instant::now());
            Ok(self.0.len() - 1)
        }
        fn seconds(&self, from: usize, to: usize) -> Result<f64> {
            Ok((self.0[to] - self.0[from]).as_secs_f64())
        }
        fn forget(&mut self) {
            self.0.clear();
        }
    }

    /// One rank whose sums of GPU memory take 30 ms after the pass.
    struct Slow;

    impl Around for Slow {
        fn inner(&self) -> &dyn Communicator {
            &Local
        }
        fn finish_sums(&self, _: usize) -> Result<()> {
            sleep(Duration::from_millis(30));
            Ok(())
        }
    }

    #[test]
    fn sums_of_gpu_memory_are_one_visit_a_pass_and_what_they_hide_in_is_work() {
        let timed = Timed::by(&Slow, Box::<Host>::default());
        for pass in 0..2 {
            timed.take();
            sleep(Duration::from_millis(20));
            for wire in [Wire::F32, Wire::Bf16] {
                timed.start_device_sum(DeviceVector { address: 0, length: 10, wire, stream: 0 }).unwrap();
            }
            sleep(Duration::from_millis(20));
            timed.finish_device_sums(0).unwrap();
            let [visit] = timed.take().try_into().expect("one visit");
            assert_eq!((visit.operation, visit.bytes, visit.vectors), (Operation::Sum, 60, 2), "pass {pass}");
            assert!(visit.inside >= 0.03 && visit.window >= 0.02, "{visit:?}");
            assert!(visit.work >= 0.04 && visit.work >= visit.window, "{visit:?}");
        }
        // one rank has nothing to sum
        timed.finish_device_sums(0).unwrap();
        let [visit] = timed.take().try_into().expect("one visit");
        assert_eq!((visit.bytes, visit.vectors, visit.window), (0, 0, 0.0));
    }
}
