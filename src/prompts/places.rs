//! Prompts that put an object in a place, "an apple in snow": the miniature world's stand-in for the free prompts on
//! which the paper trains human preference.

use std::collections::BTreeSet;

use anyhow::{bail, Result};

use super::article::with_article;
use super::{Prompt, PromptSource, Split};

/// "a {object} {place}" with the right article; a place is a phrase such as "in snow".
pub fn text(object: &str, place: &str) -> String {
    format!("{} {place}", with_article(object))
}

/// Objects times places, some of the combinations held out.
#[derive(Clone, Debug)]
pub struct Places {
    trained: Vec<(String, String)>,
    held_out: Vec<(String, String)>,
}

impl Places {
    /// All combinations; `is_held_out(object, place)` gets indices into the two lists.
    /// Errors: a name twice in a list, or no combination left to train on.
    pub fn new(objects: &[&str], places: &[&str], is_held_out: impl Fn(usize, usize) -> bool) -> Result<Self> {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        super::check_names("object", &owned(objects), &[])?;
        super::check_names("place", &owned(places), &[])?;
        let (mut trained, mut held_out) = (Vec::new(), Vec::new());
        for (i, object) in objects.iter().enumerate() {
            for (j, place) in places.iter().enumerate() {
                let part = if is_held_out(i, j) { &mut held_out } else { &mut trained };
                part.push((object.to_string(), place.to_string()));
            }
        }
        if trained.is_empty() {
            bail!("there is no object in a place to train on");
        }
        Ok(Places { trained, held_out })
    }

    fn part(&self, split: Split) -> &[(String, String)] {
        match split {
            Split::Train => &self.trained,
            Split::HeldOut => &self.held_out,
        }
    }
}

impl PromptSource for Places {
    fn len(&self, split: Split) -> u64 {
        self.part(split).len() as u64
    }

    /// `objects` is the one name. Panics when `index` is not below `len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt {
        let (object, place) = &self.part(split)[index as usize];
        Prompt { text: text(object, place), objects: vec![object.clone()] }
    }

    fn objects(&self) -> Vec<String> {
        let all: BTreeSet<&String> = self.trained.iter().chain(&self.held_out).map(|(object, _)| object).collect();
        all.into_iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_combination_in_exactly_one_split() {
        let source = Places::new(&["apple", "ball", "kite"], &["in snow", "on sand"], |i, j| i + j == 2).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (4, 2));
        let mut texts: HashSet<String> = HashSet::new();
        for split in [Split::Train, Split::HeldOut] {
            texts.extend((0..source.len(split)).map(|index| source.prompt(split, index).text));
        }
        assert_eq!(texts.len(), 6);
        assert_eq!(source.objects(), ["apple", "ball", "kite"]);
        assert!(texts.contains("an apple in snow"));
        assert_eq!(source.prompt(Split::HeldOut, 0).text, "a ball on sand");
    }

    #[test]
    fn bad_lists_are_errors() {
        assert!(Places::new(&["apple"], &["in snow"], |_, _| true).is_err());
        assert!(Places::new(&["apple", "apple"], &["in snow"], |_, _| false).is_err());
    }
}
