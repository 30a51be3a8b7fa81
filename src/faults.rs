//! Faults on demand, for the tests of what happens when ranks die, hang or compute nonsense.
//!
//! The variable `RLDIFF_FAULT` holds one fault as `key=value` pairs with commas between them; without it every point is
//! one load. A run that has one says so in its log. Example: `rank=1,at=update,iteration=2,kind=kill`.
//!
//! | key | meaning |
//! |---|---|
//! | `at` | the point: see below |
//! | `kind` | `kill` (SIGKILL), `term` and `int` (SIGTERM, SIGINT), `hang`, `slow` (sleeps `ms` at every pass), `nan` and `flip` (numbers), `eio`, `full` (files) |
//! | `rank` | only this rank |
//! | `iteration` | only in this iteration, counted from 0 |
//! | `file` | only files whose path contains this text |
//! | `nth` | only the n-th time all this holds (1) |
//! | `ms` | for `slow` |
//!
//! Points of the loop: `loading`, `step` (of denoising, anywhere), `encode` (a batch of pairs), `rollout`, `reward`, `advantage`, `update`, `optimizer`, `pretrain`, `saving`, `metrics`,
//! `evaluation`. Numbers: `rewards`, `log_prob`, `gradient`, `weights`, `moments`. Files: `write`, `fsync`, `rename`, `sync_folder`
//! of every file that appears whole; of a checkpoint also `create_folder`, `digest`, `publish` (the rename of its folder),
//! `sync_publish`, `published` and `remove` (of an older one).

use std::{
    io,
    path::Path,
    sync::{
        atomic::{AtomicU64, Ordering},
        OnceLock,
    },
    time::Duration,
};

use anyhow::{bail, ensure, Context, Result};

const VARIABLE: &str = "RLDIFF_FAULT";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Kill,
    /// A signal that asks to stop.
    Ask(i32),
    Hang,
    Slow,
    Nan,
    Flip,
    /// An error of the operating system.
    Io(i32),
}

#[derive(Debug)]
struct Fault {
    rank: Option<usize>,
    at: String,
    iteration: Option<u64>,
    file: Option<String>,
    nth: u64,
    kind: Kind,
    sleep: Duration,
    passes: AtomicU64,
}

/// Only where this rank is to suffer.
static FAULT: OnceLock<Fault> = OnceLock::new();
static ITERATION: AtomicU64 = AtomicU64::new(0);

/// Reads the variable. Call it once, before any work.
///
/// # Errors
/// It does not name a fault.
pub fn install(rank: usize) -> Result<()> {
    let Ok(text) = std::env::var(VARIABLE) else { return Ok(()) };
    let fault = parse(&text).with_context(|| format!("{VARIABLE} = {text:?}"))?;
    if fault.rank.is_none_or(|wanted| wanted == rank) && FAULT.set(fault).is_ok() {
        log::warn!("{VARIABLE} is set, rank {rank} will suffer it: {text}");
    }
    Ok(())
}

fn parse(text: &str) -> Result<Fault> {
    let mut fault = Fault {
        rank: None,
        at: String::new(),
        iteration: None,
        file: None,
        nth: 1,
        kind: Kind::Kill,
        sleep: Duration::ZERO,
        passes: AtomicU64::new(0),
    };
    for pair in text.split(',') {
        let (key, value) = pair.split_once('=').with_context(|| format!("{pair:?} is not key=value"))?;
        match key {
            "rank" => fault.rank = Some(value.parse().context("rank")?),
            "at" => fault.at = value.to_string(),
            "iteration" => fault.iteration = Some(value.parse().context("iteration")?),
            "file" => fault.file = Some(value.to_string()),
            "nth" => fault.nth = value.parse().context("nth")?,
            "ms" => fault.sleep = Duration::from_millis(value.parse().context("ms")?),
            "kind" => {
                fault.kind = match value {
                    "kill" => Kind::Kill,
                    "term" => Kind::Ask(libc::SIGTERM),
                    "int" => Kind::Ask(libc::SIGINT),
                    "hang" => Kind::Hang,
                    "slow" => Kind::Slow,
                    "nan" => Kind::Nan,
                    "flip" => Kind::Flip,
                    "eio" => Kind::Io(libc::EIO),
                    "full" => Kind::Io(libc::ENOSPC),
                    _ => bail!("there is no kind {value:?}"),
                }
            }
            _ => bail!("there is no key {key:?}"),
        }
    }
    ensure!(!fault.at.is_empty(), "it has no at=");
    Ok(fault)
}

impl Fault {
    fn holds(&self, at: &str, path: Option<&Path>) -> bool {
        let here = self.at == at
            && self.iteration.is_none_or(|iteration| iteration == ITERATION.load(Ordering::Relaxed))
            && self.file.as_ref().is_none_or(|text| path.is_some_and(|p| p.to_string_lossy().contains(text.as_str())));
        here && {
            let pass = self.passes.fetch_add(1, Ordering::Relaxed) + 1;
            pass == self.nth || self.kind == Kind::Slow && pass > self.nth
        }
    }
}

/// Whether this rank is to suffer at all.
pub fn present() -> bool {
    FAULT.get().is_some()
}

/// The loop's iteration, counted from 0.
pub fn iteration(iteration: u64) {
    ITERATION.store(iteration, Ordering::Relaxed);
}

/// A point where this process may die, hang or be slow.
pub fn point(at: &str) {
    if let Some(fault) = FAULT.get().filter(|fault| fault.holds(at, None)) {
        suffer(fault);
    }
}

/// A step of writing `path`, which may fail as well.
pub fn file_point(at: &str, path: &Path) -> io::Result<()> {
    match FAULT.get().filter(|fault| fault.holds(at, Some(path))) {
        Some(Fault { kind: Kind::Io(code), .. }) => Err(io::Error::from_raw_os_error(*code)),
        Some(fault) => {
            suffer(fault);
            Ok(())
        }
        None => Ok(()),
    }
}

fn suffer(fault: &Fault) {
    match fault.kind {
        Kind::Kill => {
            // SAFETY: a signal to this very process.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            hang()
        }
        Kind::Ask(signal) => {
            log::warn!("the fault at {} asks to stop", fault.at);
            // SAFETY: a signal to this very thread.
            unsafe { libc::raise(signal) };
        }
        Kind::Hang => hang(),
        Kind::Slow => std::thread::sleep(fault.sleep),
        Kind::Nan | Kind::Flip | Kind::Io(_) => {}
    }
}

fn hang() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Makes the first of `values` NaN, or flips its lowest bit, where that is the fault; tells whether it did.
pub fn spoil(at: &str, values: &mut [f32]) -> bool {
    let Some(fault) = FAULT.get().filter(|fault| matches!(fault.kind, Kind::Nan | Kind::Flip)) else { return false };
    let Some(first) = values.first_mut() else { return false };
    if !fault.holds(at, None) {
        return false;
    }
    *first = if fault.kind == Kind::Nan { f32::NAN } else { f32::from_bits(first.to_bits() ^ 1) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed_and_nonsense_is_refused() {
        let fault = parse("rank=1,at=fsync,iteration=2,file=shard,nth=3,kind=eio").unwrap();
        assert_eq!((fault.rank, fault.iteration, fault.nth, fault.kind), (Some(1), Some(2), 3, Kind::Io(libc::EIO)));
        for (text, wanted) in [
            ("", "not key=value"),
            ("at", "not key=value"),
            ("at=update,kind=sulk", "sulk"),
            ("kind=kill", "no at="),
            ("at=update,when=now", "when"),
            ("at=update,rank=x", "rank"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(wanted), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_fault_holds_at_its_point_and_pass_only() {
        let fault = parse("at=rename,file=shard-001,nth=2,kind=full").unwrap();
        let path = Path::new("checkpoints/shard-001.h5");
        let passes: Vec<bool> = (0..3).map(|_| fault.holds("rename", Some(path))).collect();
        assert_eq!(passes, [false, true, false]);
        assert!(!fault.holds("fsync", Some(path)) && !fault.holds("rename", Some(Path::new("shard-000.h5"))));
        let slow = parse("at=update,kind=slow,ms=1").unwrap();
        assert!(slow.holds("update", None) && slow.holds("update", None) && !slow.holds("rollout", None));
    }
}
