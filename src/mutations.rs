//! Seeded mutations of good inputs, for the tests that hold the parsers to "an error, never a panic".

use crate::random::{Coordinates, Purpose};

/// Calls `parse` with `rounds` mutated copies of the `good` inputs: bytes changed, cut, repeated, inserted or deleted, one
/// to eight times each. The same ones every time.
pub fn mutate(good: &[Vec<u8>], rounds: usize, mut parse: impl FnMut(&[u8])) {
    for round in 0..rounds {
        let mut stream = Coordinates { sample: round as u32, ..Coordinates::new(1, Purpose::Sample) }.stream();
        let mut bytes = good[stream.below(good.len() as u64) as usize].clone();
        for _ in 0..=stream.below(8) {
            let length = bytes.len() as u64;
            let at = stream.below(length + 1) as usize;
            let span = (stream.below(16) as usize + 1).min(bytes.len() - at);
            match stream.below(6) {
                0 if length > 0 => bytes[at.min(length as usize - 1)] = stream.next_u32() as u8,
                1 if length > 0 => bytes[at.min(length as usize - 1)] ^= 1 << stream.below(8),
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..at + span)),
                4 => {
                    let copy = bytes[at..at + span].to_vec();
                    bytes.splice(at..at, copy);
                }
                _ => {
                    // what parsers stumble over: signs, zeros, quotes, ends of lines, path parts
                    let token = [&b"\0\0\0\0"[..], b"\xff\xff\xff\xff", b"-1", b"\"", b"\n", b"../", b"1e999", b"NaN"];
                    bytes.splice(at..at, token[stream.below(8) as usize].iter().copied());
                }
            }
        }
        parse(&bytes);
    }
}
