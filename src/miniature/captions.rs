//! What the pictures are called: the words that the captions of the miniature world are made of.

use std::collections::BTreeSet;

use super::{edition::Edition, scene};

/// Every word of every caption, once, in alphabetical order.
pub fn vocabulary(edition: Edition) -> Vec<String> {
    let captions = scene::flawless(edition).into_iter().map(scene::caption);
    let words: BTreeSet<String> =
        captions.flat_map(|caption| caption.split(' ').map(str::to_owned).collect::<Vec<_>>()).collect();
    words.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::{objects, people, portraits};

    /// The words of the templates and places listed here; all others are names.
    #[test]
    fn vocabulary_is_complete_and_sorted() {
        let grammar = [
            "a", "an", "portrait", "of", "and", "next", "to", "near", "on", "side", "beside", "grass", "sand", "in",
            "the", "sky", "at", "night", "snow", "sunset",
        ];
        let first = grammar.len() + objects::NAMES.len() + portraits::OCCUPATIONS.len();
        // "shirt", "with", and one thing of WORN is nothing
        let people = 2 + people::WHO.len() + people::COLORS.len() + people::WORN.len() - 1;
        for (edition, size) in [(Edition::First, first), (Edition::Second, first + people)] {
            let words = vocabulary(edition);
            assert_eq!(words.len(), size, "{words:?}");
            assert!(words.is_sorted());
            for word in grammar {
                assert!(words.iter().any(|known| known == word), "{word} is missing");
            }
        }
    }
}
