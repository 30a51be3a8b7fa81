//! Builds a CLIP-style byte-pair vocabulary in which every word of a small list is one token.

use std::collections::{BTreeMap, BTreeSet};

use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// `vocab.json` and `merges.txt` of a tokenizer.
pub struct BytePairs {
    pub ids: BTreeMap<String, u32>,
    pub merges: Vec<(String, String)>,
}

pub const START: &str = "<|startoftext|>";
pub const END: &str = "<|endoftext|>";

/// Ids in CLIP's order: the 256 byte symbols, the same at the end of a word, the merges, start and end token.
/// Merges join the most frequent pair of neighbours (the alphabetically first among equals) until each word is one.
pub fn build(words: &[String]) -> BytePairs {
    let mut spelled: Vec<Vec<String>> = words.iter().map(|w| spell(w)).collect();
    let mut merges = Vec::new();
    while let Some(pair) = most_frequent_pair(&spelled) {
        for word in &mut spelled {
            merge(word, &pair);
        }
        merges.push(pair);
    }

    let alphabet: BTreeSet<char> = ByteLevel::alphabet().into_iter().collect();
    let tokens = alphabet
        .iter()
        .map(char::to_string)
        .chain(alphabet.iter().map(|c| format!("{c}</w>")))
        .chain(merges.iter().map(|(a, b)| format!("{a}{b}")))
        .chain([START.to_string(), END.to_string()]);
    let mut ids = BTreeMap::new();
    for token in tokens {
        let next = ids.len() as u32;
        ids.entry(token).or_insert(next);
    }
    BytePairs { ids, merges }
}

fn spell(word: &str) -> Vec<String> {
    let last = word.chars().count().saturating_sub(1);
    word.chars().enumerate().map(|(i, c)| if i == last { format!("{c}</w>") } else { c.to_string() }).collect()
}

fn most_frequent_pair(words: &[Vec<String>]) -> Option<(String, String)> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for word in words {
        for pair in word.windows(2) {
            *counts.entry((&pair[0], &pair[1])).or_default() += 1;
        }
    }
    let most = *counts.values().max()?;
    let (a, b) = counts.into_iter().find(|(_, count)| *count == most)?.0;
    Some((a.to_string(), b.to_string()))
}

fn merge(word: &mut Vec<String>, (a, b): &(String, String)) {
    let mut i = 0;
    while i + 1 < word.len() {
        if word[i] == *a && word[i + 1] == *b {
            let joined = format!("{a}{b}");
            word.splice(i..i + 2, [joined]);
        }
        i += 1;
    }
}
