//! Broadcast and gather where ranks sleep while they wait: over one binomial tree, ranks − 1 messages for a piece. MPI's own
//! operations without blocking send a large piece around a ring, which among sleepers takes a nap at each of its ranks.

use ::mpi::{
    request::scope,
    topology::SimpleCommunicator,
    traits::{Communicator as _, Destination, Equivalence, Source},
};

use super::waiting::until_done;

/// Elements of a message.
const PIECE: usize = 1 << 20;

/// Ranks in a tree with `root` at its top.
#[derive(Clone, Copy)]
pub(super) struct Relay<'a> {
    world: &'a SimpleCommunicator,
    rank: usize,
    size: usize,
}

impl<'a> Relay<'a> {
    pub(super) fn of(world: &'a SimpleCommunicator) -> Self {
        Relay { world, rank: world.rank() as usize, size: world.size() as usize }
    }

    fn send<T: Equivalence>(&self, data: &[T], to: &[usize]) {
        for piece in data.chunks(PIECE) {
            scope(|scope| {
                let sent: Vec<_> =
                    to.iter().map(|&to| self.world.process_at_rank(to as i32).immediate_send(scope, piece)).collect();
                sent.into_iter().for_each(until_done);
            });
        }
    }

    fn receive<T: Equivalence>(&self, data: &mut [T], from: usize) {
        let from = self.world.process_at_rank(from as i32);
        for piece in data.chunks_mut(PIECE) {
            scope(|scope| until_done(from.immediate_receive_into(scope, piece)));
        }
    }

    /// Overwrites `data`, of one length on all ranks, by that of `root`.
    pub(super) fn broadcast<T: Equivalence>(&self, data: &mut [T], root: usize) {
        let (parent, children) = place((self.rank + self.size - root) % self.size, self.size);
        let rank = |place: usize| (place + root) % self.size;
        let children: Vec<usize> = children.into_iter().map(rank).collect();
        for piece in data.chunks_mut(PIECE) {
            if let Some(parent) = parent {
                self.receive(piece, rank(parent));
            }
            self.send(piece, &children);
        }
    }

    /// Fills `all`, in which rank r's part is `starts[r]..starts[r + 1]` and this rank has put its own.
    pub(super) fn all_gather<T: Equivalence>(&self, all: &mut [T], starts: &[usize]) {
        let until = |rank: usize| starts[rank.min(self.size)];
        let mut distance = 1;
        while distance < self.size {
            if self.rank % (2 * distance) == distance {
                self.send(&all[starts[self.rank]..until(self.rank + distance)], &[self.rank - distance]);
                break;
            }
            if self.rank + distance < self.size {
                let child = self.rank + distance;
                self.receive(&mut all[starts[child]..until(child + distance)], child);
            }
            distance *= 2;
        }
        self.broadcast(all, 0);
    }
}

/// Above and below one of `size` places in a binomial tree with place 0 at its top; those with most below them first.
fn place(own: usize, size: usize) -> (Option<usize>, Vec<usize>) {
    let reach = if own == 0 { size.next_power_of_two() } else { own & own.wrapping_neg() };
    let parent = (own > 0).then(|| own - reach);
    let distances = (0..reach.ilog2()).rev().map(|power| 1 << power);
    (parent, distances.map(|distance| own + distance).filter(|&child| child < size).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_one_parent_and_the_tree_is_as_deep_as_it_must() {
        for size in 1..=130 {
            let mut parents = vec![None; size];
            for own in 0..size {
                let (parent, children) = place(own, size);
                assert_eq!(parent.is_none(), own == 0);
                for child in children {
                    assert!(parents[child].replace(own).is_none(), "{child} of {size} has two parents");
                    assert_eq!(place(child, size).0, Some(own));
                }
            }
            for own in 1..size {
                let up = std::iter::successors(Some(own), |&own| parents[own]);
                let depth = (up.clone().count() - 1) as u32;
                assert!(up.last() == Some(0) && depth <= size.next_power_of_two().ilog2(), "depth {depth} of {size}");
            }
        }
        assert_eq!(place(0, 6), (None, vec![4, 2, 1]));
        assert_eq!(place(4, 6), (Some(0), vec![5]));
    }
}
