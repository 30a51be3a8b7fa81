//! What the pictures are called: the captions of the miniature world and the words they are made of.
//!
//! The phrasing is that of the prompt sources, so that a prompt of the RL training reads like a caption of the
//! pretraining.

use std::collections::BTreeSet;

use crate::prompts::article::with_article;
use crate::prompts::compositions::{self, RELATIONS};
use crate::prompts::{occupations, places as place_prompts};

use super::{objects, places, portraits};

/// Every word of every caption, once, in alphabetical order.
pub fn vocabulary() -> Vec<String> {
    let mut words = BTreeSet::new();
    let mut add = |caption: String| words.extend(caption.split(' ').map(str::to_owned));
    for object in objects::NAMES {
        add(with_article(object));
        for relation in RELATIONS {
            add(compositions::text(object, relation, object));
        }
        for place in places::NAMES {
            add(place_prompts::text(object, place));
        }
    }
    for occupation in portraits::OCCUPATIONS {
        add(occupations::text(occupation));
    }
    words.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words of the templates and places listed here; all others are names.
    #[test]
    fn vocabulary_is_complete_and_sorted() {
        let words = vocabulary();
        let grammar = [
            "a", "an", "portrait", "of", "and", "next", "to", "near", "on", "side", "beside", "grass", "sand", "in",
            "the", "sky", "at", "night", "snow", "sunset",
        ];
        assert_eq!(words.len(), grammar.len() + objects::NAMES.len() + portraits::OCCUPATIONS.len());
        assert!(words.is_sorted());
        for word in grammar {
            assert!(words.iter().any(|known| known == word), "{word} is missing");
        }
    }
}
