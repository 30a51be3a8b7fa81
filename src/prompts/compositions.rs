//! Prompts that name two objects and a relation, "a carrot next to a book" (section 4.3 of the paper).

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

/// Ordered pairs of different objects times relations. The training part pairs trained objects, the held-out part held-out
/// objects: a pair of one of each is in neither, since half of it has been seen. With the paper's 450 and 82 objects there
/// are 450 · 449 · 5 = 1,010,250 and 82 · 81 · 5 = 33,210 prompts; nothing is materialised.
#[derive(Clone, Debug)]
pub struct Compositions {
    trained: Vec<String>,
    held_out: Vec<String>,
}

impl Compositions {
    /// Errors: an object in both lists or twice in one, fewer than two trained objects, or a single held-out one.
    pub fn new(trained: Vec<String>, held_out: Vec<String>) -> Result<Self> {
        super::check_names("object", &trained, &held_out)?;
        if trained.len() < 2 {
            bail!("pairs need at least two objects to train on, there are {}", trained.len());
        }
        if held_out.len() == 1 {
            bail!("one held-out object makes no pair of held-out objects: hold out none, or at least two");
        }
        Ok(Compositions { trained, held_out })
    }

    fn names(&self, split: Split) -> &[String] {
        match split {
            Split::Train => &self.trained,
            Split::HeldOut => &self.held_out,
        }
    }
}

impl PromptSource for Compositions {
    fn len(&self, split: Split) -> u64 {
        let names = self.names(split).len() as u64;
        names * names.saturating_sub(1) * RELATIONS.len() as u64
    }

    /// `objects` are the two names, in the order of the text. Panics when `index` is not below `len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt {
        assert!(index < self.len(split), "prompt {index} of {} ({split:?})", self.len(split));
        let relations = RELATIONS.len() as u64;
        let (first, second) = different(self.names(split), index / relations);
        let text = text(first, RELATIONS[(index % relations) as usize], second);
        Prompt { text, objects: vec![first.to_owned(), second.to_owned()] }
    }

    fn objects(&self) -> Vec<String> {
        self.trained.iter().chain(&self.held_out).cloned().collect()
    }
}

/// Ordered pair number `pair` of two different names, out of n·(n−1).
fn different(names: &[String], pair: u64) -> (&str, &str) {
    let others = names.len() as u64 - 1;
    let (first, other) = (pair / others, pair % others);
    let second = other + u64::from(other >= first);
    (&names[first as usize], &names[second as usize])
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
        assert_eq!(source.len(Split::HeldOut), 3 * 2 * 5);
        let mut seen = HashSet::new();
        for split in [Split::Train, Split::HeldOut] {
            for index in 0..source.len(split) {
                let prompt = source.prompt(split, index);
                let [first, second] = prompt.objects.as_slice() else { panic!("{prompt:?}") };
                assert_ne!(first, second);
                let kind = if split == Split::HeldOut { 'h' } else { 't' };
                assert!(first.starts_with(kind) && second.starts_with(kind), "{prompt:?}");
                assert!(seen.insert(prompt.text));
            }
        }
    }

    /// The count of section 4.3: "over 1 million prompts"; and the unseen ones, of which Table 4 takes 300.
    #[test]
    fn the_papers_million() {
        let source = Compositions::new(names(450, "t"), names(82, "h")).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (1_010_250, 33_210));
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
        assert!(Compositions::new(list(&["ball", "book"]), list(&["kite"])).is_err());
        let error = Compositions::new(list(&["ball", "kite"]), list(&["kite", "tree"])).unwrap_err();
        assert!(error.to_string().contains("kite"), "{error}");
    }
}
