//! Which rank is late: from what every rank's watchdog put down.

use super::State;

/// The late ranks in words. `states` in rank order; None where a rank's watchdog did not answer.
///
/// Collectives are entered in the same order by all ranks, so a rank that has entered fewer than another is what the
/// other waits for. A rank that does not answer cannot run: its process is stopped or its host is gone.
pub(super) fn verdict(states: &[Option<State>], hosts: &[String]) -> String {
    let known = || states.iter().flatten();
    let farthest = known().map(|state| state.entered).max().unwrap_or(0);
    let waits_in = known()
        .find(|state| state.entered == farthest)
        .and_then(|state| state.waiting.as_ref())
        .map_or("a collective", |(name, _)| name.as_str());
    let late: Vec<String> = states
        .iter()
        .enumerate()
        .filter_map(|(rank, state)| {
            let host = hosts.get(rank).map_or("an unknown host", String::as_str);
            match state {
                None => Some(format!(
                    "rank {rank} on {host} does not answer: its process is stopped or its host is gone; it has not come \
                     to {waits_in} after {}",
                    known().find(|other| other.entered == farthest).map_or("the start", |other| other.doing.as_str())
                )),
                Some(state) if state.entered < farthest => Some(match &state.waiting {
                    None => format!("rank {rank} on {host} is late: it is in {}", state.doing),
                    Some((name, seconds)) => {
                        format!("rank {rank} on {host} is late: it has been in {name} of {} for {seconds:.1} s", state.doing)
                    }
                }),
                Some(_) => None,
            }
        })
        .collect();
    if late.is_empty() {
        return format!(
            "all {} ranks have entered {waits_in}, and it does not end: the network or MPI hangs",
            states.len()
        );
    }
    format!("{}; the others wait in {waits_in}", late.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(rank: usize, entered: u64, waiting: bool) -> Option<State> {
        let waiting = waiting.then(|| ("all-reduce".to_string(), 9.5));
        Some(State { rank, entered, doing: "update (parity) of iteration 3 for 12.0 s".into(), waiting })
    }

    #[test]
    fn the_late_rank_is_named_with_its_host_and_operation() {
        let hosts: Vec<String> = ["n01", "n02", "n03"].map(String::from).to_vec();
        let text = verdict(&[state(0, 7, true), state(1, 6, false), state(2, 7, true)], &hosts);
        assert_eq!(
            text,
            "rank 1 on n02 is late: it is in update (parity) of iteration 3 for 12.0 s; the others wait in all-reduce"
        );
        let text = verdict(&[state(0, 7, true), state(1, 7, true), None], &hosts);
        assert!(text.starts_with("rank 2 on n03 does not answer") && !text.contains("rank 0"), "{text}");
        // a root that has left a broadcast and computes is not late: the others have entered as many
        let text = verdict(&[state(0, 7, false), state(1, 7, true), state(2, 7, true)], &hosts);
        assert!(text.contains("the network or MPI hangs"), "{text}");
        // one that is stuck in the collective before
        let text = verdict(&[state(0, 7, true), state(1, 6, true), state(2, 7, true)], &hosts);
        assert!(text.starts_with("rank 1 on n02 is late: it has been in all-reduce"), "{text}");
    }
}
