//! Many things of rank 0 for all ranks, in few messages.

use anyhow::{ensure, Result};

use super::Communicator;

/// Bytes of small things that go in one message.
const PARCEL: usize = 1 << 24;

/// Hands things of `lengths` bytes (the same on all ranks) from rank 0 to all others, small ones together: a network has
/// hundreds of tensors, and a message to 128 ranks on few cores takes as long for one as for all of them. `give` makes one
/// on rank 0, `take` gets each on the others, both in their order. A collective call.
pub fn broadcast_items(
    comm: &dyn Communicator,
    lengths: &[usize],
    mut give: impl FnMut(usize) -> Result<Vec<u8>>,
    mut take: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut from = 0;
    while from < lengths.len() {
        let (mut to, mut bytes) = (from, 0);
        while to < lengths.len() && (to == from || bytes + lengths[to] <= PARCEL) {
            bytes += lengths[to];
            to += 1;
        }
        let mut parcel = Vec::new();
        if comm.rank() == 0 {
            for item in from..to {
                let item = give(item)?;
                match to - from {
                    1 => parcel = item,
                    _ => parcel.extend(item),
                }
            }
            ensure!(parcel.len() == bytes, "{} bytes to send, {bytes} were announced", parcel.len());
        }
        comm.broadcast_bytes(&mut parcel, 0)?;
        if comm.rank() != 0 {
            let mut rest = &parcel[..];
            for (item, &length) in (from..to).zip(&lengths[from..to]) {
                let (mine, after) = rest.split_at(length);
                take(item, mine)?;
                rest = after;
            }
        }
        from = to;
    }
    Ok(())
}
