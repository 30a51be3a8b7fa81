//! The prompt distributions of the miniature's three tasks, and of its tests.

use crate::prompts::compositions::Compositions;
use crate::prompts::listed::{Listed, Texts};
use crate::prompts::occupations::Occupations;
use crate::prompts::places::Places;
use crate::prompts::shared_texts::Store;
use crate::prompts::Prompt;

use super::{
    objects,
    people::Person,
    places, portraits,
    scene::{self, Content},
    Edition,
};

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

/// Captions of people, which name no occupation: 80 training prompts and 16 held out.
pub fn people() -> Listed {
    listed(Person::all().into_iter().map(|person| Prompt { text: person.caption(), objects: Vec::new() }), 16)
}

/// Occupations with an object, "a baker with a ball": 192 prompts of a form that no training has.
pub fn workers() -> Listed {
    of_scenes(|content| match content {
        Content::Worker { object, tone: 0, .. } => Some(vec![object]),
        _ => None,
    })
}

/// Two objects in a place, "an apple and a book at sunset": 792 prompts of a form that no training has.
pub fn pairs_in_places() -> Listed {
    of_scenes(|content| match content {
        Content::PairInPlace { first, second, .. } => Some(vec![first, second]),
        _ => None,
    })
}

/// The captions of the second edition for which `objects` names the objects that they show.
fn of_scenes(objects: impl Fn(Content) -> Option<Vec<usize>>) -> Listed {
    let prompts = scene::flawless(Edition::Second).into_iter().filter_map(|content| {
        let objects = objects(content)?;
        let names = objects.into_iter().map(|object| objects::NAMES[object].to_owned()).collect();
        Some(Prompt { text: scene::caption(content), objects: names })
    });
    listed(prompts, 0)
}

fn listed(prompts: impl Iterator<Item = Prompt>, held_out: usize) -> Listed {
    let mut texts = Texts::default();
    for prompt in prompts {
        texts.insert_prompt(&prompt).expect("the miniature's objects have names");
    }
    Listed::new(Store::Own(texts), held_out, 1).expect("the miniature's prompts are a valid set")
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
        let known: HashSet<String> = vocabulary(Edition::Second).into_iter().collect();
        let sources: [(&dyn PromptSource, u64, u64); 6] = [
            (&compositions(), 280, 60),
            (&occupations(), 12, 4),
            (&in_places(), 60, 12),
            (&people(), 80, 16),
            (&workers(), 192, 0),
            (&pairs_in_places(), 792, 0),
        ];
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
