//! Many ranks: the communicator over MPI. The only file that names the crate `mpi`.
//!
//! Messages go in pieces, because MPI counts in 32-bit integers and because a piece that fits in cache is summed
//! while it is still there. Where a host has more ranks than cores every wait gives way (see waiting.rs): the same
//! operations without blocking, and a piece is small enough to be done between two pauses. rsmpi discards MPI's return codes: an error inside MPI ends the run (MPI's default).

use super::tree::add_right;
use super::waiting::{self, until_done};
use super::Communicator;
use crate::folders;
use ::mpi::datatype::PartitionMut;
use ::mpi::environment::{is_finalized, is_initialized, Universe};
use ::mpi::point_to_point::send_receive_into;
use ::mpi::request::scope;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator as _, CommunicatorCollectives, Destination, Equivalence, Root, Source};
use ::mpi::Threading;
use anyhow::{bail, ensure, Context, Result};
use half::bf16;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Elements per message of a sum: 1 MiB of f32, half of it in bf16.
const SUM_PIECE: usize = 1 << 18;
/// Elements per message of a broadcast.
const BROADCAST_PIECE: usize = 1 << 24;
/// The same where ranks sleep while they wait: between two looks MPI moves no more than about a megabyte.
const SMALL_BROADCAST_PIECE: usize = 1 << 18;
/// Bytes up to which an all-gather is one call; beyond it each rank broadcasts its share in pieces.
const GATHER_LIMIT: usize = 1 << 26;

/// This process's rank for messages that come from outside any communicator (a panic), 0 before MPI starts.
static WORLD_RANK: AtomicUsize = AtomicUsize::new(0);

pub(super) fn world_rank() -> usize {
    WORLD_RANK.load(Ordering::Relaxed)
}

/// What is summed: numbers as MPI carries them.
trait Number: Equivalence + bytemuck::Pod {
    /// left += right, element by element.
    fn add_right(left: &mut [Self], right: &[Self]);
}

impl Number for f32 {
    fn add_right(left: &mut [f32], right: &[f32]) {
        add_right(left, right);
    }
}

/// The bits of a bf16, for which MPI has no type.
impl Number for u16 {
    fn add_right(left: &mut [u16], right: &[u16]) {
        for (l, r) in left.iter_mut().zip(right) {
            // added in f32, rounded to the nearest bf16
            *l = (bf16::from_bits(*l) + bf16::from_bits(*r)).to_bits();
        }
    }
}

/// How a rank that was asked to stop tells the others while all of them work by themselves: messages of one byte, in a
/// communicator of their own.
struct Bell {
    comm: SimpleCommunicator,
    /// This rank has told all others.
    rung: bool,
    /// By rank: it has told this one.
    heard: Vec<bool>,
}

thread_local! {
    /// Of the thread that started MPI, the only one that may call it.
    static BELL: RefCell<Option<Bell>> = const { RefCell::new(None) };
}

/// Tells the other ranks, once, if this one was `asked` to stop; whether another one has told this rank so far. Nothing
/// on threads that may not call MPI, and where there is none.
pub(crate) fn ring(asked: bool) -> bool {
    BELL.with_borrow_mut(|bell| {
        let Some(Bell { comm, rung, heard }) = bell else { return false };
        while let Some((message, status)) = comm.any_process().immediate_matched_probe() {
            let _: (u8, _) = message.matched_receive();
            heard[status.source_rank() as usize] = true;
        }
        if asked && !*rung {
            *rung = true;
            let me = comm.rank();
            // a byte is on its way at once: no MPI waits for the receiver of so little
            (0..comm.size()).filter(|&rank| rank != me).for_each(|rank| comm.process_at_rank(rank).send(&1u8));
        }
        heard.contains(&true)
    })
}

/// Takes what was sent and not heard yet, so that MPI ends with nothing under way. A collective call.
fn take_bell_down(sleeps: bool) {
    let Some(Bell { comm, rung, heard }) = BELL.take() else { return };
    let mut rang = vec![0u8; heard.len()];
    let mine = u8::from(rung);
    match sleeps {
        true => scope(|scope| until_done(comm.immediate_all_gather_into(scope, &mine, &mut rang[..]))),
        false => comm.all_gather_into(&mine, &mut rang[..]),
    }
    for (rank, _) in heard.iter().enumerate().filter(|(rank, heard)| rang[*rank] == 1 && !**heard) {
        if rank as i32 != comm.rank() {
            let _: (u8, _) = comm.process_at_rank(rank as i32).receive();
        }
    }
}

/// All ranks of MPI's world.
pub struct Mpi {
    world: SimpleCommunicator,
    rank: usize,
    size: usize,
    local_rank: (usize, usize),
    /// Waiting ranks sleep; the same on all ranks.
    sleeps: bool,
    /// Receive buffer of one piece.
    scratch: RefCell<Vec<u32>>,
    /// Ends MPI when dropped; last, so that everything else is gone by then.
    _universe: Universe,
}

impl Mpi {
    /// Initialises MPI. `expected` is what the launcher announced of the world, `local` of this host.
    ///
    /// # Errors
    /// `RLDIFF_WAIT` is no word for a wait; MPI is already up, supports only programs without threads, or sees another number of ranks than the launcher
    /// started (each process alone: the launcher belongs to another MPI).
    pub(super) fn start(expected: Option<usize>, local: Option<usize>) -> Result<Self> {
        let wanted = waiting::Wanted::parse(std::env::var(waiting::VARIABLE).ok().as_deref())?;
        waiting::prepare(wanted, local);
        let (universe, provided) =
            ::mpi::initialize_with_threading(Threading::Serialized).context("MPI is already initialised")?;
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        WORLD_RANK.store(rank, Ordering::Relaxed);
        if let Some(expected) = expected.filter(|&expected| expected != size) {
            let library = ::mpi::environment::library_version().unwrap_or_default();
            bail!(
                "the launcher started {expected} ranks, but MPI sees {size}: it belongs to another MPI than the one \
                 rldiff was built with ({})",
                library.lines().next().unwrap_or("unknown")
            );
        }
        ensure!(provided >= Threading::Funneled, "this MPI supports only programs without threads");
        BELL.set(Some(Bell { comm: world.duplicate(), rung: false, heard: vec![false; size] }));
        let host = world.split_shared(world.rank());
        let local_rank = (host.rank() as usize, host.size() as usize);
        let sleeps = waiting::sleeps(wanted, &world, &host);
        Ok(Mpi {
            world,
            rank,
            size,
            local_rank,
            sleeps,
            scratch: RefCell::new(vec![0; SUM_PIECE]),
            _universe: universe,
        })
    }

    /// Sends `outgoing` to `partner` and hands each received piece, with its offset, to `take`.
    fn exchange<T: Number>(&self, partner: usize, outgoing: &[T], incoming: usize, mut take: impl FnMut(usize, &[T])) {
        let partner = self.world.process_at_rank(partner as i32);
        let mut scratch = self.scratch.borrow_mut();
        let scratch: &mut [T] = bytemuck::cast_slice_mut(&mut scratch[..]);
        // the two directions may differ by one element, hence by one piece; an empty message stands in for it
        for start in (0..outgoing.len().max(incoming)).step_by(SUM_PIECE) {
            let send = &outgoing[start.min(outgoing.len())..(start + SUM_PIECE).min(outgoing.len())];
            let receive = &mut scratch[..incoming.saturating_sub(start).min(SUM_PIECE)];
            match self.sleeps {
                true => scope(|scope| {
                    let received = partner.immediate_receive_into(scope, receive);
                    let sent = partner.immediate_send(scope, send);
                    until_done(received);
                    until_done(sent);
                }),
                false => {
                    send_receive_into(send, &partner, receive, &partner);
                }
            }
            take(start, receive);
        }
    }

    /// Sum for 2^k ranks: recursive halving with neighbours first (so that each element is summed in the tree), then
    /// the way back. Every rank sends and receives 2·(1 − 1/size) of the data.
    fn halve_and_gather<T: Number>(&self, data: &mut [T]) {
        let (mut low, mut high) = (0, data.len());
        let mut halvings = Vec::new();
        let mut distance = 1;
        while distance < self.size {
            let partner = self.rank ^ distance;
            let middle = low + (high - low) / 2;
            let keeps_low = self.rank < partner;
            halvings.push((partner, low, middle, high));
            let (left, right) = data[low..high].split_at_mut(middle - low);
            let (mine, theirs) = if keeps_low { (left, right) } else { (right, left) };
            self.exchange(partner, theirs, mine.len(), |start, piece| {
                let here = &mut mine[start..start + piece.len()];
                // where the high half is kept, the partner is the left operand; a sum of two does not depend on it
                T::add_right(here, piece);
            });
            (low, high) = if keeps_low { (low, middle) } else { (middle, high) };
            distance *= 2;
        }
        for (partner, low, middle, high) in halvings.into_iter().rev() {
            let (left, right) = data[low..high].split_at_mut(middle - low);
            let (mine, theirs) = if self.rank < partner { (left, right) } else { (right, left) };
            self.exchange(partner, mine, theirs.len(), |start, piece| {
                theirs[start..start + piece.len()].copy_from_slice(piece);
            });
        }
    }

    /// Sum for any number of ranks: up a binomial tree to rank 0, then a broadcast.
    fn reduce_to_zero_and_broadcast<T: Number>(&self, data: &mut [T]) {
        let mut distance = 1;
        while distance < self.size {
            if self.rank % (2 * distance) == distance {
                let parent = self.world.process_at_rank((self.rank - distance) as i32);
                data.chunks(SUM_PIECE).for_each(|piece| match self.sleeps {
                    true => scope(|scope| until_done(parent.immediate_send(scope, piece))),
                    false => parent.send(piece),
                });
                break;
            }
            if self.rank + distance < self.size {
                let child = self.world.process_at_rank((self.rank + distance) as i32);
                let mut scratch = self.scratch.borrow_mut();
                let scratch: &mut [T] = bytemuck::cast_slice_mut(&mut scratch[..]);
                for piece in data.chunks_mut(SUM_PIECE) {
                    let received = &mut scratch[..piece.len()];
                    match self.sleeps {
                        true => scope(|scope| until_done(child.immediate_receive_into(scope, received))),
                        false => {
                            child.receive_into(received);
                        }
                    }
                    T::add_right(piece, received);
                }
            }
            distance *= 2;
        }
        self.broadcast(data, 0);
    }

    /// Sum over the ranks in the tree.
    fn sum<T: Number>(&self, data: &mut [T]) {
        if self.size.is_power_of_two() {
            self.halve_and_gather(data);
        } else {
            self.reduce_to_zero_and_broadcast(data);
        }
    }

    fn broadcast<T: Equivalence>(&self, data: &mut [T], root: usize) {
        let root = self.world.process_at_rank(root as i32);
        match self.sleeps {
            true => data
                .chunks_mut(SMALL_BROADCAST_PIECE)
                .for_each(|piece| scope(|scope| until_done(root.immediate_broadcast_into(scope, piece)))),
            false => data.chunks_mut(BROADCAST_PIECE).for_each(|piece| root.broadcast_into(piece)),
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if self.sleeps {
            until_done(self.world.immediate_barrier());
        }
        take_bell_down(self.sleeps);
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn local_rank(&self) -> (usize, usize) {
        self.local_rank
    }

    fn sleeps(&self) -> bool {
        self.sleeps
    }

    fn barrier(&self) -> Result<()> {
        match self.sleeps {
            true => until_done(self.world.immediate_barrier()),
            false => self.world.barrier(),
        }
        Ok(())
    }

    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()> {
        let mut length = [data.len() as u64];
        self.broadcast(&mut length, root);
        data.resize(length[0] as usize, 0);
        self.broadcast(data, root);
        Ok(())
    }

    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()> {
        self.broadcast(data, root);
        Ok(())
    }

    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0u64; self.size];
        let mine = data.len() as u64;
        match self.sleeps {
            true => scope(|scope| until_done(self.world.immediate_all_gather_into(scope, &mine, &mut lengths[..]))),
            false => self.world.all_gather_into(&mine, &mut lengths[..]),
        }
        let total: u64 = lengths.iter().sum();
        // an empty buffer needs an address as well: an empty Vec's is 1, which in Open MPI is MPI_IN_PLACE
        let data = if data.is_empty() { &[0; 1][..0] } else { data };
        if total > GATHER_LIMIT as u64 {
            let mut all: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length as usize]).collect();
            all[self.rank].copy_from_slice(data);
            for (root, bytes) in all.iter_mut().enumerate() {
                self.broadcast(bytes, root);
            }
            return Ok(all);
        }
        let counts: Vec<i32> = lengths.iter().map(|&length| length as i32).collect();
        let starts: Vec<i32> = counts.iter().scan(0, |at, count| Some(std::mem::replace(at, *at + count))).collect();
        let mut joined = vec![0u8; (total as usize).max(1)];
        let mut parts = PartitionMut::new(&mut joined[..total as usize], &counts[..], &starts[..]);
        match self.sleeps {
            true => scope(|scope| {
                until_done(self.world.immediate_all_gather_varcount_into(scope, data, &mut parts));
            }),
            false => self.world.all_gather_varcount_into(data, &mut parts),
        }
        drop(parts);
        Ok(starts.iter().zip(&counts).map(|(&at, &n)| joined[at as usize..(at + n) as usize].to_vec()).collect())
    }

    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()> {
        self.sum(data);
        Ok(())
    }

    fn all_reduce_sum_bf16(&self, data: &mut [bf16]) -> Result<()> {
        self.sum::<u16>(bytemuck::cast_slice_mut(data));
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        end_world(code)
    }
}

/// Ends all ranks with `code`, from any thread: through MPI where it is up, and by leaving at once should MPI itself
/// hang (the launcher then ends the others).
pub(crate) fn end_world(code: i32) -> ! {
    // SAFETY: _exit only ends the process.
    let leave = move || unsafe { libc::_exit(code) };
    let _ = std::thread::Builder::new().spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        leave()
    });
    let _ = std::io::Write::flush(&mut std::io::stdout());
    if is_initialized() && !is_finalized() {
        // a launcher drops what it has not yet forwarded when a rank aborts: give it time for the message
        std::thread::sleep(Duration::from_millis(200));
        folders::release_all();
        SimpleCommunicator::world().abort(code);
    }
    folders::release_all();
    leave()
}
