//! A communicator that notes when its rank came to each collective operation and when it left. Between two of them a
//! rank works by itself, so these notes are all that a model of scaling needs.

use std::{cell::RefCell, mem, time::Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Around, Communicator, Operation};

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
}

// sums of GPU memory go on beside other work: there is nothing to note
impl Around for Timed<'_> {
    fn inner(&self) -> &dyn Communicator {
        self.inner
    }

    fn during<T>(&self, operation: Operation, bytes: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
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
