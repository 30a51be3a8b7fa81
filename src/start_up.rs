//! Where the time goes between the start of the process and its first work.

use std::{
    fs,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Phases in their order, with what each has taken so far.
static PHASES: Mutex<Vec<(&str, Duration)>> = Mutex::new(Vec::new());

/// Does `work`, and counts its time for the phase `name`; phases lie beside each other, not in each other.
pub fn phase<T>(name: &'static str, work: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let made = work();
    note(name, begun.elapsed());
    made
}

/// The time until now is that of the first phase: the dynamic linker loads libtorch before the program's first line.
pub fn begin() {
    if let Some(alive) = age() {
        note("loading the program", alive);
    }
}

fn note(name: &'static str, took: Duration) {
    let mut phases = PHASES.lock().expect("a panic ends the process");
    match phases.iter_mut().find(|(other, _)| *other == name) {
        Some((_, so_far)) => *so_far += took,
        None => phases.push((name, took)),
    }
}

/// "12.3 s: loading the program 1.2, MPI 4.0, …, the rest 0.4", of this process so far.
pub fn in_words() -> String {
    let phases = PHASES.lock().expect("a panic ends the process");
    words(&phases, age())
}

fn words(phases: &[(&str, Duration)], total: Option<Duration>) -> String {
    let known: Duration = phases.iter().map(|(_, took)| *took).sum();
    let total = total.unwrap_or(known).max(known);
    let rest = [("the rest", total - known)];
    let parts: Vec<String> =
        phases.iter().chain(&rest).map(|(name, took)| format!("{name} {:.1}", took.as_secs_f64())).collect();
    format!("{:.1} s: {}", total.as_secs_f64(), parts.join(", "))
}

/// How long this process has existed.
pub fn age() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // "pid (name) state …": field 22 is the start, in ticks after the machine's
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one time; the other only asks.
    let (failed, per_second) =
        unsafe { (libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) != 0, libc::sysconf(libc::_SC_CLK_TCK)) };
    let now = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
    (!failed && per_second > 0).then(|| Duration::from_secs_f64((now - ticks / per_second as f64).max(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_phase_has_counted_is_the_rest() {
        let phases = [("MPI", Duration::from_millis(1500)), ("networks", Duration::from_millis(300))];
        assert_eq!(words(&phases, Some(Duration::from_secs(2))), "2.0 s: MPI 1.5, networks 0.3, the rest 0.2");
        assert_eq!(words(&phases, None), "1.8 s: MPI 1.5, networks 0.3, the rest 0.0");
    }

    #[test]
    fn a_process_has_an_age() {
        let before = age().expect("/proc is here");
        std::thread::sleep(Duration::from_millis(30));
        let grown = age().unwrap() - before;
        assert!(before < Duration::from_secs(3600) && grown >= Duration::from_millis(15), "{before:?}, {grown:?}");
    }
}
