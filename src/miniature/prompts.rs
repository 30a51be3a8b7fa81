//! The prompt distributions of the miniature's three tasks.

use crate::prompts::compositions::Compositions;
use crate::prompts::occupations::Occupations;
use crate::prompts::places::Places;

use super::{objects, places, portraits};

/// 280 training prompts (8 · 7 pairs, 5 relations) and 60 of two held-out objects (4 · 3 pairs).
pub fn compositions() -> Compositions {
    Compositions::new(owned(&objects::trained()), owned(&objects::HELD_OUT))
        .expect("the miniature's objects are a valid set")
}

/// 12 training prompts and 4 held out.
pub fn occupations() -> Occupations {
    Occupations::new(owned(&portraits::trained()), owned(&portraits::HELD_OUT))
        .expect("the miniature's occupations are a valid set")
}

/// 60 training prompts and 12 held out.
pub fn in_places() -> Places {
    Places::new(&objects::NAMES, &places::NAMES, places::is_held_out).expect("the miniature's places are a valid set")
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::miniature::captions::vocabulary;
    use crate::prompts::{PromptSource, Split};

    #[test]
    fn sizes_and_words() {
        let known: HashSet<String> = vocabulary().into_iter().collect();
        let sources: [(&dyn PromptSource, u64, u64); 3] =
            [(&compositions(), 280, 60), (&occupations(), 12, 4), (&in_places(), 60, 12)];
        for (source, trained, held_out) in sources {
            assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (trained, held_out));
            for split in [Split::Train, Split::HeldOut] {
                for index in 0..source.len(split) {
                    let text = source.prompt(split, index).text;
                    assert!(text.split(' ').all(|word| known.contains(word)), "'{text}' has an unknown word");
                }
            }
        }
    }
}
