//! Seconds that work takes where it is done: by the host's clock, or between two events of a GPU's current stream.

use std::time::Instant;

use anyhow::{anyhow, Result};
use cudarc::driver::{result as driver, sys};
use tch::Device;

use super::{current_stream, synchronize};

/// Runs `work` and returns the seconds between its beginning and its end on `device`, which has nothing else to do.
///
/// # Errors
/// The work's; a GPU that failed.
pub fn seconds(device: Device, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let Device::Cuda(index) = device else {
        let started = Instant::now();
        work()?;
        return Ok(started.elapsed().as_secs_f64());
    };
    synchronize(index)?;
    let begun = Event::now(index)?;
    work()?;
    let ended = Event::now(index)?;
    ended.seconds_since(&begun)
}

/// A point of this thread's current stream.
struct Event(sys::CUevent);

impl Event {
    fn now(index: usize) -> Result<Self> {
        Event::on(current_stream(index)?)
    }

    fn on(stream: usize) -> Result<Self> {
        let stream = stream as sys::CUstream;
        // SAFETY: libtorch's context is current after its first work; the stream is libtorch's and lives for ever.
        unsafe {
            let event = Event(described(driver::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?);
            described(driver::event::record(event.0, stream))?;
            Ok(event)
        }
    }

    /// Waits until this event has happened.
    fn seconds_since(&self, earlier: &Event) -> Result<f64> {
        // SAFETY: two live events that were recorded.
        let milliseconds = unsafe {
            described(driver::event::synchronize(self.0))?;
            described(driver::event::elapsed(earlier.0, self.0))?
        };
        Ok(f64::from(milliseconds) / 1e3)
    }
}

// SAFETY: a handle of the driver, which any thread may use.
unsafe impl Send for Event {}

/// Points of streams, and the seconds between them.
pub trait Points: Send {
    /// What `stream` has been given so far; the point's number, from 0.
    ///
    /// # Errors
    /// A GPU that failed.
    fn point(&mut self, stream: usize) -> Result<usize>;

    /// Seconds from one point to a later one, both reached: waits for the later one.
    ///
    /// # Errors
    /// A GPU that failed.
    fn seconds(&self, from: usize, to: usize) -> Result<f64>;

    /// The points so far are needed no more.
    fn forget(&mut self);
}

/// Events of this process's GPU.
#[derive(Default)]
pub struct Events(Vec<Event>);

impl Points for Events {
    fn point(&mut self, stream: usize) -> Result<usize> {
        self.0.push(Event::on(stream)?);
        Ok(self.0.len() - 1)
    }

    fn seconds(&self, from: usize, to: usize) -> Result<f64> {
        self.0[to].seconds_since(&self.0[from])
    }

    fn forget(&mut self) {
        self.0.clear();
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: an event of ours, used no more; there is nobody to report a failure to.
        let _ = unsafe { driver::event::destroy(self.0) };
    }
}

fn described<T>(result: Result<T, driver::DriverError>) -> Result<T> {
    result.map_err(|e| anyhow!("event of a GPU: {e:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_hosts_clock_sees_what_the_work_took_and_errors_pass() {
        let nap = || {
            std::thread::sleep(Duration::from_millis(20));
            Ok(())
        };
        let took = seconds(Device::Cpu, nap).unwrap();
        assert!((0.02..10.0).contains(&took), "{took}");
        assert_eq!(seconds(Device::Cpu, || Err(anyhow!("broken"))).unwrap_err().to_string(), "broken");
    }
}
