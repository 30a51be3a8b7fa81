//! Every rank holds a replica of the weights, of their average and of the optimizer's moments. They change by the same bits,
//! so they must stay equal: a difference means broken memory, a broken network or a bug, and whatever is trained from there
//! on is nobody's model.

use std::{borrow::Cow, collections::BTreeMap};

use anyhow::{bail, Result};
use sha2::{Digest, Sha256};

use crate::comm::Communicator;

/// Compares the SHA-256 of every vector of the training state, given by name, over ranks. It holds one vector at a time. A
/// collective call.
///
/// # Errors
/// They differ: the same error on all ranks. It names the vectors, and the ranks that are not with the majority, or all
/// where there is none.
pub fn compare<'a>(
    vectors: impl Iterator<Item = (&'static str, Cow<'a, [f32]>)>,
    iteration: u64,
    hosts: &[String],
    comm: &dyn Communicator,
) -> Result<()> {
    let (names, hashes): (Vec<_>, Vec<_>) =
        vectors.map(|(name, values)| (name, Sha256::digest(bytemuck::cast_slice::<f32, u8>(&values)))).unzip();
    let hashes = comm.all_gather_bytes(&hashes.concat())?;
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
