//! The limit of what a rank does with the others inside NCCL: what has begun and not ended, and a thread that ends the run
//! when the oldest of it is too old.
//!
//! The thread calls neither NCCL nor the driver, and takes no lock that is held across a call of theirs: a call that never
//! returns cannot keep it from its message.

use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use cudarc::driver::sys;

use crate::{comm::mpi, streams::complain};

/// How often the threads look.
pub(super) const PULSE: Duration = Duration::from_millis(200);

/// What began.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum What {
    /// Joining the ranks and their first sums; where it is.
    SetUp(String),
    Sum,
    Leaving,
}

/// One thing that has begun and has not ended.
struct Begun {
    number: u64,
    what: What,
    since: Instant,
    /// The event behind it on the GPU; none while the host is still in the call.
    event: Option<sys::CUevent>,
}

// SAFETY: events are handles of the driver, which any thread may use.
unsafe impl Send for Begun {}

pub(super) struct Limit {
    /// Oldest first.
    begun: Mutex<VecDeque<Begun>>,
    numbers: AtomicU64,
    closed: AtomicBool,
    rank: usize,
}

impl Limit {
    /// From now on what takes longer than `patience` ends the run; without patience nothing does.
    ///
    /// # Errors
    /// The thread cannot start.
    pub fn start(rank: usize, patience: Option<Duration>) -> Result<Arc<Self>> {
        let limit = Arc::new(Limit {
            begun: Mutex::default(),
            numbers: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            rank,
        });
        if let Some(patience) = patience {
            let watched = limit.clone();
            let watch = move || watched.watch(patience);
            std::thread::Builder::new().name("nccl limit".into()).spawn(watch).context("cannot start a thread")?;
        }
        Ok(limit)
    }

    fn begun(&self) -> MutexGuard<'_, VecDeque<Begun>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before the call that may block.
    pub fn begin(&self, what: What) -> u64 {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.begun().push_back(Begun { number, what, since: Instant::now(), event: None });
        number
    }

    /// Where the set-up `number` is now.
    pub fn at(&self, number: u64, place: String) {
        if let Some(begun) = self.begun().iter_mut().find(|begun| begun.number == number) {
            begun.what = What::SetUp(place);
        }
    }

    /// The call has returned; what it began has ended when `event` has happened.
    pub fn runs(&self, number: u64, event: sys::CUevent) {
        if let Some(begun) = self.begun().iter_mut().find(|begun| begun.number == number) {
            begun.event = Some(event);
        }
    }

    /// What began as `number` has ended; its event.
    pub fn end(&self, number: u64) -> Option<sys::CUevent> {
        let mut begun = self.begun();
        let at = begun.iter().position(|begun| begun.number == number)?;
        begun.remove(at)?.event
    }

    /// The oldest thing that runs on the GPU.
    pub fn oldest_running(&self) -> Option<(u64, sys::CUevent)> {
        self.begun().iter().find_map(|begun| Some((begun.number, begun.event?)))
    }

    /// Ends the thread; nothing is late any more. The events of what had not ended.
    pub fn close(&self) -> Vec<sys::CUevent> {
        self.closed.store(true, Ordering::Release);
        self.begun().drain(..).filter_map(|begun| begun.event).collect()
    }

    fn watch(&self, patience: Duration) {
        while !self.closed.load(Ordering::Acquire) {
            std::thread::sleep(PULSE);
            let late = self.late(patience);
            if let Some(text) = late.filter(|_| !self.closed.load(Ordering::Acquire)) {
                give_up(self.rank, &text);
            }
        }
    }

    /// What is to be said of the oldest thing, should it be too old.
    fn late(&self, patience: Duration) -> Option<String> {
        let begun = self.begun();
        let oldest = begun.front().filter(|oldest| oldest.since.elapsed() > patience)?;
        let within = format!("within {} s", patience.as_secs());
        Some(match (&oldest.what, oldest.event) {
            (What::SetUp(place), _) => format!("the ranks did not meet {within} ({place})"),
            (What::Sum, None) => {
                format!("a sum of gradients did not end {within} (the call that starts it has not returned)")
            }
            (What::Sum, Some(_)) => format!("a sum of gradients did not end {within}"),
            (What::Leaving, _) => format!("the ranks did not leave {within}"),
        })
    }
}

/// Says why and ends the run, in this order, waiting for nothing in between.
pub(super) fn give_up(rank: usize, why: &str) -> ! {
    complain(&format!("error: rank {rank}: NCCL: {why}\n"));
    mpi::end_world(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_thing_counts_and_what_has_ended_does_not() {
        let limit = Limit::start(0, None).unwrap();
        let (never, at_once) = (Duration::from_secs(1000), Duration::ZERO);
        assert!(limit.late(at_once).is_none());
        let set_up = limit.begin(What::SetUp("joining".into()));
        let sum = limit.begin(What::Sum);
        std::thread::sleep(Duration::from_millis(2));
        assert!(limit.late(never).is_none() && limit.oldest_running().is_none());
        limit.at(set_up, "the first sum".into());
        assert_eq!(limit.late(at_once).unwrap(), "the ranks did not meet within 0 s (the first sum)");
        assert_eq!(limit.end(set_up), None);
        assert!(limit.late(at_once).unwrap().ends_with("(the call that starts it has not returned)"));
        let event = std::ptr::dangling_mut();
        limit.runs(sum, event);
        assert_eq!(limit.late(at_once).unwrap(), "a sum of gradients did not end within 0 s");
        assert_eq!(limit.oldest_running(), Some((sum, event)));
        limit.begin(What::Leaving);
        assert_eq!(limit.end(sum), Some(event));
        assert_eq!(limit.late(at_once).unwrap(), "the ranks did not leave within 0 s");
        limit.close();
        assert!(limit.late(at_once).is_none());
    }
}
