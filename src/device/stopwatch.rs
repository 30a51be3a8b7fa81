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
        let stream = current_stream(index)? as sys::CUstream;
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
        let took = seconds(Device::Cpu, || Ok(std::thread::sleep(Duration::from_millis(20)))).unwrap();
        assert!((0.02..10.0).contains(&took), "{took}");
        assert_eq!(seconds(Device::Cpu, || Err(anyhow!("broken"))).unwrap_err().to_string(), "broken");
    }
}
