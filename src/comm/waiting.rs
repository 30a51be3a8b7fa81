//! How a rank waits for the others. A rank that asks MPI all the time whether its message has come takes, where a host has
//! more ranks than cores, the core that the sender needs; there ranks ask at growing pauses, and sleep between them.

use std::{
    thread::{available_parallelism, sleep, yield_now},
    time::{Duration, Instant},
};

use ::mpi::{
    collective::SystemOperation,
    request::{Request, Scope},
    topology::SimpleCommunicator,
    traits::{Communicator as _, CommunicatorCollectives},
};
use anyhow::{bail, Result};

/// Environment variable that decides in place of ranks and cores.
pub(super) const VARIABLE: &str = "RLDIFF_WAIT";

/// What lets the MPIs themselves give way where they wait (while they start and end): Open MPI yields, MPICH sleeps for a
/// moment after a few vain looks. Read by them in MPI_Init.
const OF_MPI: [(&str, &str); 3] = [
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
    ("MPIR_CVAR_CH4_PROGRESS_THROTTLE", "1"),
    ("MPIR_CVAR_CH4_PROGRESS_THROTTLE_NO_PROGRESS_COUNT", "16"),
];

/// Looks without a pause: what is on its way comes within microseconds.
const LOOKS: usize = 8;
const SHORTEST: Duration = Duration::from_micros(50);
/// 127 ranks that wait look 2,500 times a second together, which is a twentieth of one core.
const LONGEST: Duration = Duration::from_millis(50);

/// What the user says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// By ranks and cores.
    Auto,
    Spin,
    Sleep,
}

impl Wanted {
    /// # Errors
    /// Another word.
    pub(super) fn parse(text: Option<&str>) -> Result<Self> {
        Ok(match text {
            None | Some("" | "auto") => Wanted::Auto,
            Some("spin") => Wanted::Spin,
            Some("sleep") => Wanted::Sleep,
            Some(other) => bail!("{VARIABLE}={other}: it is auto, spin or sleep"),
        })
    }

    /// What one rank says to the others; the highest counts.
    fn vote(self, crowded: bool) -> u8 {
        match (self, crowded) {
            (Wanted::Auto, false) => 0,
            (Wanted::Auto, true) => 1,
            (Wanted::Spin, _) => 2,
            (Wanted::Sleep, _) => 3,
        }
    }
}

/// Before MPI_Init, on every rank: sets what the user has not set. `local_ranks` is what the launcher says of this host.
pub(super) fn prepare(wanted: Wanted, local_ranks: Option<usize>) {
    let mine = affinity();
    // a launcher that binds each rank to a core of its own says nothing about the host
    let may_know = mine.count() > 1 || available_parallelism().is_ok_and(|n| n.get() > 1) || online() == 1;
    let crowded = may_know && local_ranks.is_some_and(|ranks| ranks > cores(&[mine], quota(&mine)));
    if matches!(wanted.vote(crowded), 1 | 3) {
        for (name, value) in OF_MPI.iter().filter(|(name, _)| std::env::var_os(name).is_none()) {
            std::env::set_var(name, value);
        }
    }
}

/// Whether the ranks of this world sleep while they wait; the same on all of them. `host` is the ranks of this host. A
/// collective call.
pub(super) fn sleeps(wanted: Wanted, world: &SimpleCommunicator, host: &SimpleCommunicator) -> bool {
    let ranks = host.size() as usize;
    let mine = affinity();
    let mut masks = vec![Mask::default(); ranks];
    let all: &mut [u64] = bytemuck::cast_slice_mut(&mut masks);
    host.all_gather_into(&mine.0[..], all);
    let crowded = ranks > cores(&masks, quota(&mine));
    let mut highest = 0;
    world.all_reduce_into(&wanted.vote(crowded), &mut highest, SystemOperation::max());
    let sleeps = matches!(highest, 1 | 3);
    if sleeps {
        keep_little_memory();
    }
    sleeps
}

/// Where many ranks share a host, malloc gives back what was freed instead of keeping it for later.
fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for (what, value) in [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, 1 << 18), (libc::M_MMAP_THRESHOLD, 1 << 16)]
    {
        // SAFETY: plain numbers; a setting that malloc refuses changes nothing.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Processors, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
struct Mask([u64; 16]);

impl Mask {
    fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
}

/// Processors that this process may run on; none where the system does not say.
fn affinity() -> Mask {
    let mut mask = Mask::default();
    // SAFETY: writes at most as many bytes as said.
    let failed = unsafe { libc::sched_getaffinity(0, size_of::<Mask>(), (&raw mut mask).cast()) } != 0;
    if failed {
        return Mask::default();
    }
    mask
}

fn online() -> i64 {
    // SAFETY: only asks.
    unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }
}

/// Processors' worth of time that this process's control group grants, where that is less than `mine`.
fn quota(mine: &Mask) -> Option<usize> {
    let granted = available_parallelism().ok()?.get();
    (granted < mine.count() || mine.count() == 0).then_some(granted)
}

/// Cores that ranks with these processors have together.
fn cores(masks: &[Mask], quota: Option<usize>) -> usize {
    let mut any = Mask::default();
    for mask in masks {
        any.0.iter_mut().zip(mask.0).for_each(|(all, one)| *all |= one);
    }
    match (any.count(), quota) {
        (0, None) => usize::MAX,
        (0, Some(quota)) => quota,
        (count, quota) => count.min(quota.unwrap_or(count)),
    }
}

/// Returns when the operation is done; sleeps meanwhile.
pub(super) fn until_done<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    let begun = Instant::now();
    for look in 0.. {
        match request.test() {
            Ok(_) => return,
            Err(unfinished) => request = unfinished,
        }
        match look < LOOKS {
            true => yield_now(),
            false => sleep(pause(begun.elapsed())),
        }
    }
}

/// The next pause of a wait that has lasted `waited`: it makes it an eighth longer at most.
fn pause(waited: Duration) -> Duration {
    (waited / 8).clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(processors: &[usize]) -> Mask {
        let mut mask = Mask::default();
        processors.iter().for_each(|p| mask.0[p / 64] |= 1 << (p % 64));
        mask
    }

    #[test]
    fn cores_are_those_that_any_rank_of_the_host_may_use() {
        // all ranks on all cores; each rank bound to one of its own; two ranks bound to one core
        assert_eq!(cores(&[mask(&[0, 1]); 128], None), 2);
        let bound: Vec<Mask> = (0..128).map(|rank| mask(&[rank])).collect();
        assert_eq!(cores(&bound, None), 128);
        assert_eq!(cores(&[mask(&[3]), mask(&[3])], None), 1);
        // a container's limit; a system that says nothing
        assert_eq!(cores(&[mask(&[0, 1, 2, 3]); 4], Some(2)), 2);
        assert_eq!((cores(&[Mask::default()], Some(8)), cores(&[Mask::default()], None)), (8, usize::MAX));
        assert!(affinity().count() >= 1);
    }

    #[test]
    fn the_users_word_counts_more_than_the_cores() {
        let wanted = |text| Wanted::parse(Some(text)).unwrap();
        assert_eq!(Wanted::parse(None).unwrap(), Wanted::Auto);
        assert!(wanted("spin").vote(true) > wanted("auto").vote(true));
        assert!(wanted("sleep").vote(false) > wanted("spin").vote(true));
        assert!(wanted("auto").vote(true) > wanted("auto").vote(false));
        let error = Wanted::parse(Some("often")).unwrap_err().to_string();
        assert_eq!(error, "RLDIFF_WAIT=often: it is auto, spin or sleep");
    }

    #[test]
    fn pauses_grow_with_the_wait() {
        let pauses = [0, 8, 80, 4_000].map(|ms| pause(Duration::from_millis(ms)));
        assert_eq!(pauses, [SHORTEST, Duration::from_millis(1), Duration::from_millis(10), LONGEST]);
    }
}
