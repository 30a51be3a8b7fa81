//! Rows of N(0, 1) on the device: row i is the stream of sample first + i, the numbers of
//! [`random::normal_rows`](crate::random::normal_rows), which is the reference.
//!
//! The words of the generator are the host's bit for bit; logarithm, sine and cosine of the device's library can differ
//! in the last bits.

use super::cuda::{arguments, Element, Machine, Slice};
use crate::random::Coordinates;
use anyhow::{ensure, Result};

/// Which numbers: the stream of each row.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Its `sample` is that of row 0; row i has the one i further on.
    pub first: Coordinates,
}

/// `Stream` of `cuda/philox.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceStream {
    key: [u32; 2],
    iteration: u32,
    tail: u32,
    first_sample: u32,
}

impl From<Rows> for DeviceStream {
    fn from(Rows { first }: Rows) -> Self {
        DeviceStream {
            key: [first.seed as u32, (first.seed >> 32) as u32],
            iteration: first.iteration,
            tail: first.tail(),
            first_sample: first.sample,
        }
    }
}

/// Fills `out` (f32) with rows of `length` numbers.
///
/// # Errors
/// `out` is not f32 or not a whole number of rows; a launch that fails.
pub fn launch(machine: &dyn Machine, rows: Rows, length: usize, out: Slice) -> Result<()> {
    out.expect(out.len(), Element::F32, "normal numbers")?;
    if out.is_empty() {
        return Ok(());
    }
    ensure!(length > 0 && out.len() % length == 0, "{} elements are not rows of {length}", out.len());
    let count = out.len() / length;
    // 65535 is CUDA's limit for the second dimension of a grid
    ensure!(length < 1 << 31 && count <= 65535, "{count} rows of {length} elements are too many for a launch");
    let (address, length, stream) = (out.address(), length as u32, DeviceStream::from(rows));
    let grid = [length.div_ceil(4).div_ceil(256), count as u32];
    // SAFETY: types and order as in cuda/normal_rows.cu; `out` holds count·length elements
    unsafe { machine.launch("normal_rows", grid, 256, arguments![address, length, stream]) }
}

/// Philox4x32-10 on the device: four words for each counter (four words) and key (two words). For its known-answer test.
///
/// # Errors
/// Slices that do not fit together; a launch that fails.
pub fn launch_words(machine: &dyn Machine, counters: Slice, keys: Slice, words: Slice) -> Result<()> {
    let count = counters.len() / 4;
    ensure!(count < 1 << 31, "{count} counters are too many for a launch");
    counters.expect(4 * count, Element::U32, "counters")?;
    keys.expect(2 * count, Element::U32, "keys")?;
    words.expect(4 * count, Element::U32, "words")?;
    if count == 0 {
        return Ok(());
    }
    let pointers = [counters, keys, words].map(|slice| slice.address());
    let count = count as u32;
    let arguments = arguments![pointers[0], pointers[1], pointers[2], count];
    // SAFETY: types and order as in cuda/normal_rows.cu; lengths checked above
    unsafe { machine.launch("philox_words", [count.div_ceil(256), 1], 256, arguments) }
}
