//! Prompts that name two objects and a relation, "a carrot next to a book" (section 4.2 of the paper).

use anyhow::{bail, Result};

use super::article::with_article;
use super::{Prompt, PromptSource, Split};

/// The paper's relations.
pub const RELATIONS: [&str; 5] = ["and", "next to", "near", "on side of", "beside"];

/// "a {first} {relation} a {second}" with the right articles. Of a name with alternatives ("rifle, gun", a detector's
/// label) the text takes the first.
pub fn text(first: &str, relation: &str, second: &str) -> String {
    let phrase = |name: &str| with_article(name.split(',').next().unwrap_or(name).trim());
    format!("{} {relation} {}", phrase(first), phrase(second))
}

/// Ordered pairs of different objects times relations. The training part pairs trained objects only; the held-out
/// part has at least one held-out object in every pair. With the paper's 450 and 82 objects the training part has
/// 450 · 449 · 5 = 1,010,250 prompts; nothing is materialised.
#[derive(Clone, Debug)]
pub struct Compositions {
    trained: Vec<String>,
    held_out: Vec<String>,
}

impl Compositions {
    /// Errors: an object in both lists or twice in one, or fewer than two trained objects.
    pub fn new(trained: Vec<String>, held_out: Vec<String>) -> Result<Self> {
        super::check_names("object", &trained, &held_out)?;
        if trained.len() < 2 {
            bail!("pairs need at least two objects to train on, there are {}", trained.len());
        }
        Ok(Compositions { trained, held_out })
    }

    /// The two objects of ordered pair number `pair` of a split.
    ///
    /// With T trained and H held-out objects the held-out pairs are, in this order: T·H (trained, held out),
    /// H·T (held out, trained), H·(H−1) (held out, held out).
    fn pair(&self, split: Split, pair: u64) -> (&str, &str) {
        let (trained, held_out) = (self.trained.len() as u64, self.held_out.len() as u64);
        let mixed = trained * held_out;
        match split {
            Split::Train => different(&self.trained, pair),
            Split::HeldOut if pair < mixed => (at(&self.trained, pair / held_out), at(&self.held_out, pair % held_out)),
            Split::HeldOut if pair < 2 * mixed => {
                let pair = pair - mixed;
                (at(&self.held_out, pair / trained), at(&self.trained, pair % trained))
            }
            Split::HeldOut => different(&self.held_out, pair - 2 * mixed),
        }
    }
}

impl PromptSource for Compositions {
    fn len(&self, split: Split) -> u64 {
        let (trained, held_out) = (self.trained.len() as u64, self.held_out.len() as u64);
        let pairs = match split {
            Split::Train => trained * (trained - 1),
            Split::HeldOut => held_out * (2 * trained + held_out.saturating_sub(1)),
        };
        pairs * RELATIONS.len() as u64
    }

    /// `objects` are the two names, in the order of the text. Panics when `index` is not below `len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt {
        assert!(index < self.len(split), "prompt {index} of {} ({split:?})", self.len(split));
        let relations = RELATIONS.len() as u64;
        let (first, second) = self.pair(split, index / relations);
        let text = text(first, RELATIONS[(index % relations) as usize], second);
        Prompt { text, objects: vec![first.to_owned(), second.to_owned()] }
    }

    fn objects(&self) -> Vec<String> {
        self.trained.iter().chain(&self.held_out).cloned().collect()
    }
}

fn at(names: &[String], index: u64) -> &str {
    &names[index as usize]
}

/// Ordered pair number `pair` of two different names, out of n·(n−1).
fn different(names: &[String], pair: u64) -> (&str, &str) {
    let others = names.len() as u64 - 1;
    let (first, other) = (pair / others, pair % others);
    (at(names, first), at(names, other + u64::from(other >= first)))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn names(count: usize, prefix: &str) -> Vec<String> {
        (0..count).map(|i| format!("{prefix}{i}")).collect()
    }

    #[test]
    fn every_prompt_once_and_in_its_split() {
        let source = Compositions::new(names(5, "t"), names(3, "h")).unwrap();
        assert_eq!(source.len(Split::Train), 5 * 4 * 5);
        assert_eq!(source.len(Split::HeldOut), (8 * 7 - 5 * 4) * 5);
        let mut seen = HashSet::new();
        for split in [Split::Train, Split::HeldOut] {
            for index in 0..source.len(split) {
                let prompt = source.prompt(split, index);
                let [first, second] = prompt.objects.as_slice() else { panic!("{prompt:?}") };
                assert_ne!(first, second);
                let held_out = first.starts_with('h') || second.starts_with('h');
                assert_eq!(held_out, split == Split::HeldOut, "{prompt:?}");
                assert!(seen.insert(prompt.text));
            }
        }
    }

    /// The count of section 4.2: "over 1 million prompts".
    #[test]
    fn the_papers_million() {
        let source = Compositions::new(names(450, "t"), names(82, "h")).unwrap();
        assert_eq!(source.len(Split::Train), 1_010_250);
        let last = source.prompt(Split::Train, 1_010_249);
        assert_eq!(last.text, "a t449 beside a t448");
    }

    #[test]
    fn without_held_out_objects_there_is_no_such_split() {
        assert_eq!(Compositions::new(names(2, "t"), Vec::new()).unwrap().len(Split::HeldOut), 0);
    }

    #[test]
    fn articles_and_bad_lists() {
        assert_eq!(text("apple", "on side of", "umbrella"), "an apple on side of an umbrella");
        assert_eq!(text("rifle, gun", "near", "jeans"), "a rifle near jeans");
        let list = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        assert!(Compositions::new(list(&["ball"]), list(&[])).is_err());
        assert!(Compositions::new(list(&["ball", "ball"]), list(&[])).is_err());
        let error = Compositions::new(list(&["ball", "kite"]), list(&["kite"])).unwrap_err();
        assert!(error.to_string().contains("kite"), "{error}");
    }
}
