//! The communicator: how ranks agree. `local` is one rank, `mpi` is many.

use anyhow::Result;

/// Collective operations among the ranks of a run. Every call must be made by all ranks in the same order.
pub trait Communicator {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    /// Rank among the ranks of the same host, and how many they are (from MPI's shared-memory split).
    fn local_rank(&self) -> (usize, usize);
    fn barrier(&self) -> Result<()>;
    /// Replaces `data` on every rank by the bytes of `root`; lengths may differ beforehand.
    fn broadcast_bytes(&self, data: &mut Vec<u8>, root: usize) -> Result<()>;
    /// Overwrites `data` (same length everywhere) with the values of `root`; any size, sent in pieces.
    fn broadcast_f32(&self, data: &mut [f32], root: usize) -> Result<()>;
    /// The bytes of every rank, in rank order, on every rank.
    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// Element-wise sum over ranks in one fixed binary tree: neighbours first ((0+1)+(2+3))+…, an odd one carried
    /// up. The result is the same bits on every rank, and continues the tree that [`tree_sum`] builds over lanes.
    fn all_reduce_sum_f32(&self, data: &mut [f32]) -> Result<()>;
    /// Ends every rank of the run with `code` at once. Never returns.
    fn abort(&self, code: i32) -> !;
}
