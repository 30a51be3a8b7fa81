//! Every rank holds a replica of the weights, of their average and of the optimizer's moments. They change by the same bits,
//! so they must stay equal: a difference means broken memory, a broken network or a bug, and whatever is trained from there
//! on is nobody's model.

use std::collections::BTreeMap;

use anyhow::{bail, Result};
use tch::{Device, Kind, Tensor};

use crate::{comm::Communicator, kernels::FlatBuffer, models::row_major::moved};

/// Compares a digest of every vector of the training state, given by name, over ranks. The digest is made where the vector
/// lies, in the order in which it lies there (the same on all ranks), and only its 8 bytes travel. A collective call.
///
/// # Errors
/// They differ: the same error on all ranks. It names the vectors, and the ranks that are not with the majority, or all
/// where there is none.
pub fn compare<'a>(
    vectors: impl Iterator<Item = (&'static str, &'a FlatBuffer)>,
    iteration: u64,
    hosts: &[String],
    comm: &dyn Communicator,
) -> Result<()> {
    let (names, digests): (Vec<_>, Vec<_>) = vectors.map(|(name, values)| (name, digest(values).to_le_bytes())).unzip();
    let hashes = comm.all_gather_bytes(&digests.concat())?;
    let odd = outside_majority(&hashes);
    if odd.is_empty() {
        return Ok(());
    }
    let name = |&rank: &usize| format!("rank {rank} on {}", hosts.get(rank).map_or("an unknown host", String::as_str));
    let ranks: Vec<String> = odd.iter().map(name).collect();
    let than = match odd.len() < hashes.len() {
        true => format!("than the {} other ranks", hashes.len() - odd.len()),
        false => "and no majority tells which are right".to_string(),
    };
    bail!(
        "after iteration {iteration} {} has other {} {than}; the run stops without saving them",
        ranks.join(", "),
        differing(&names, &hashes).join(", ")
    )
}

/// Words of a row.
const ROW: usize = 1 << 16;
/// Rows that a GPU mixes at once; it takes three times their words, of eight bytes, for it.
const ROWS: usize = 64;
/// An odd constant with its bits spread.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

/// 64 bits that any change of one word changes, and a change of several with all but certainty:
///
/// ```text
/// Σ_r m_r Σ_i mix(w_ri k_i) mod 2^64,   mix(x) = (x ⊕ (x >> 32)) · SPREAD
/// ```
/// over rows r of 65,536 words w (the bits of a value as a signed number), k and m odd. Sums of integers do not depend on
/// their order, so a GPU makes the same bits as the host.
fn digest(vector: &FlatBuffer) -> u64 {
    match vector.device() {
        Device::Cpu => on_host(vector.slice()),
        _ => on_device(vector.tensor()),
    }
}

/// k_i and m_r: odd, without any pattern (the finaliser of SplitMix64).
fn odd_number(index: usize, purpose: u64) -> u64 {
    let mut x = (index as u64 + 1).wrapping_mul(SPREAD) ^ purpose;
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) | 1
}

fn keys() -> Vec<u64> {
    (0..ROW).map(|i| odd_number(i, 0)).collect()
}

fn of_row(row: usize) -> u64 {
    odd_number(row, u64::MAX)
}

fn on_host(values: &[f32]) -> u64 {
    let keys = keys();
    let mixed = |(value, key): (&f32, &u64)| {
        let x = (i64::from(value.to_bits() as i32) as u64).wrapping_mul(*key);
        (x ^ (x >> 32)).wrapping_mul(SPREAD)
    };
    let of_words = |row: &[f32]| row.iter().zip(&keys).map(mixed).fold(0, u64::wrapping_add);
    let rows = values.chunks(ROW).enumerate().map(|(r, row)| of_row(r).wrapping_mul(of_words(row)));
    rows.fold(0, u64::wrapping_add)
}

/// [`on_host`] by libtorch's integers of 64 bits, which wrap around.
fn on_device(flat: &Tensor) -> u64 {
    let (length, device) = (flat.size()[0] as usize, flat.device());
    let numbers = |values: Vec<u64>| Tensor::from_slice(bytemuck::cast_slice::<u64, i64>(&values)).to_device(device);
    let keys = numbers(keys());
    let multipliers = numbers((0..length.div_ceil(ROW)).map(of_row).collect());
    let words = flat.view_dtype(Kind::Int);
    let mut total = Tensor::zeros([1], (Kind::Int64, device));
    let whole = length / ROW;
    let mut add = |first_row: usize, rows: usize, width: usize| {
        let words = words.narrow(0, (first_row * ROW) as i64, (rows * width) as i64).view([rows as i64, width as i64]);
        let mut x = words.to_kind(Kind::Int64);
        let _ = x.g_mul_(&keys.narrow(0, 0, width as i64));
        // the shift of a signed number brings its sign along
        let high = x.bitwise_right_shift_tensor_scalar(32).bitwise_and_(0xffff_ffffi64);
        let _ = x.bitwise_xor_tensor_(&high);
        let _ = x.g_mul_scalar_(SPREAD as i64);
        let of_rows = x.sum_dim_intlist(&[1i64][..], false, Kind::Int64);
        let multipliers = multipliers.narrow(0, first_row as i64, rows as i64);
        let _ = total.g_add_(&(of_rows * multipliers).sum(Kind::Int64));
    };
    tch::no_grad(|| {
        for first_row in (0..whole).step_by(ROWS) {
            add(first_row, ROWS.min(whole - first_row), ROW);
        }
        if length % ROW > 0 {
            add(whole, 1, length % ROW);
        }
    });
    moved::note(8);
    total.int64_value(&[0]) as u64
}

/// The names whose piece of the ranks' hashes is not the same everywhere.
fn differing(names: &[&'static str], hashes: &[Vec<u8>]) -> Vec<&'static str> {
    let pieces = |of: usize| hashes.iter().map(move |hash| hash.chunks(hash.len() / names.len()).nth(of));
    let differs = |of: &usize| pieces(*of).any(|piece| Some(piece) != pieces(*of).next());
    (0..names.len()).filter(differs).map(|of| names[of]).collect()
}

/// Ranks whose hash more than half of the ranks do not share; all where no hash has a majority.
fn outside_majority(hashes: &[Vec<u8>]) -> Vec<usize> {
    let mut counts: BTreeMap<&[u8], usize> = BTreeMap::new();
    hashes.iter().for_each(|hash| *counts.entry(hash).or_default() += 1);
    let right = counts.into_iter().find(|(_, count)| 2 * count > hashes.len()).map(|(hash, _)| hash);
    (0..hashes.len()).filter(|&rank| Some(hashes[rank].as_slice()) != right).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<f32> {
        (0..length).map(|i| ((i * 7919 + 13) as f32).sin() * 10f32.powi((i % 11) as i32 - 5)).collect()
    }

    /// libtorch's integers are the same on a GPU.
    #[test]
    fn the_digest_of_a_device_is_that_of_the_host() {
        for length in [0, 1, 1000, ROW, ROW + 1, ROW * (ROWS + 2) + 77] {
            let mut values = noise(length);
            // whatever the bits
            for (value, bits) in values.iter_mut().zip([f32::NAN.to_bits(), 0xffc0_0001, 0x8000_0000, 0, u32::MAX]) {
                *value = f32::from_bits(bits);
            }
            let tensor = Tensor::from_slice(&values);
            let (bytes, of_device) = moved::during(|| on_device(&tensor));
            assert_eq!((bytes, of_device), (8, on_host(&values)), "{length} values");
            assert_eq!(digest(&FlatBuffer::from_slice(&values, Device::Cpu)), of_device);
        }
    }

    #[test]
    fn a_flipped_bit_an_exchange_and_a_shift_change_the_digest() {
        let values = noise(3 * ROW + 5);
        let whole = on_host(&values);
        let mut seen = std::collections::BTreeSet::from([whole]);
        for place in [0, 1, ROW - 1, ROW, 2 * ROW + 17, values.len() - 1] {
            for bit in 0..32 {
                let mut other = values.clone();
                other[place] = f32::from_bits(other[place].to_bits() ^ (1 << bit));
                assert!(seen.insert(on_host(&other)), "bit {bit} of {place}");
            }
        }
        for (a, b) in [(0, 1), (5, ROW + 5), (ROW, 3 * ROW)] {
            let mut other = values.clone();
            other.swap(a, b);
            assert!(seen.insert(on_host(&other)), "{a} and {b} exchanged");
            // two signs, which differ in one bit of the word each
            other = values.clone();
            (other[a], other[b]) = (-other[a], -other[b]);
            assert!(seen.insert(on_host(&other)), "signs of {a} and {b}");
        }
        let mut other = values.clone();
        other.rotate_left(1);
        assert!(seen.insert(on_host(&other)), "everything moved by one");
    }

    #[test]
    fn the_minority_is_named() {
        let of = |text: &str| outside_majority(&text.bytes().map(|b| vec![b]).collect::<Vec<_>>());
        assert!(of("aaaa").is_empty() && of("a").is_empty());
        assert_eq!(of("aaba"), [2]);
        assert_eq!(of("abaca"), [1, 3]);
        assert_eq!(of("ab"), [0, 1]);
        assert_eq!(of("aabb"), [0, 1, 2, 3]);
    }

    #[test]
    fn what_differs_is_named() {
        let of = |hashes: [&str; 3]| differing(&["weights", "exp_avg", "ema"], &hashes.map(|hash| hash.into()));
        assert!(of(["aabbcc", "aabbcc", "aabbcc"]).is_empty());
        assert_eq!(of(["aabbcc", "aabccc", "aabbcc"]), ["exp_avg"]);
        assert_eq!(of(["aabbcc", "aabbcc", "xabbcx"]), ["weights", "ema"]);
    }
}
