//! Prompts that come as a list: different texts, kept in one piece of memory, with a seeded held-out part. The objects that a
//! prompt names stand behind its text, each behind a [`SEPARATOR`].

use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use anyhow::{ensure, Result};

use super::{shared_texts::Store, Prompt, PromptSource, Split};
use crate::{
    excerpt::quoted,
    random::{Coordinates, Purpose},
};

/// ASCII's unit separator, between a prompt's text and the objects that it names.
pub const SEPARATOR: char = '\u{1f}';

/// Characters of a prompt in an error.
const SHOWN: usize = 80;

/// Different texts in the order in which they came. A text costs its own bytes and about 16 more, so that millions of
/// prompts fit: 1.5 M prompts of 100 bytes take about 180 MB.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    bytes: String,
    /// Where each text ends in `bytes`.
    ends: Vec<usize>,
    /// Hash table of text numbers plus one with linear probing, 0 where free; its size is a power of two.
    slots: Vec<u32>,
}

impl Texts {
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    pub fn get(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..self.ends[index]]
    }

    /// Where each text ends in [`Texts::bytes`].
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// All texts, one after the other.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_bytes()
    }

    /// Appends a prompt without objects unless it is there already; says whether it was new. A [`SEPARATOR`] in it becomes a
    /// space.
    pub fn insert(&mut self, text: &str) -> bool {
        match text.contains(SEPARATOR) {
            true => self.insert_entry(&text.replace(SEPARATOR, " ")),
            false => self.insert_entry(text),
        }
    }

    /// As [`Texts::insert`], with the objects that the prompt names.
    ///
    /// # Errors
    /// An object whose name is blank.
    pub fn insert_prompt(&mut self, prompt: &Prompt) -> Result<bool> {
        let mut entry = prompt.text.replace(SEPARATOR, " ");
        for object in &prompt.objects {
            ensure!(!object.trim().is_empty(), "an object without a name");
            entry.push(SEPARATOR);
            entry.push_str(&object.trim().replace(SEPARATOR, " "));
        }
        Ok(self.insert_entry(&entry))
    }

    fn insert_entry(&mut self, text: &str) -> bool {
        if self.slots.len() < 2 * (self.len() + 1) {
            self.grow();
        }
        let slot = self.slot(text);
        if self.slots[slot] != 0 {
            return false;
        }
        self.bytes.push_str(text);
        self.ends.push(self.bytes.len());
        self.slots[slot] = u32::try_from(self.ends.len()).expect("fewer than 2^32 texts");
        true
    }

    /// The slot of `text`, or the free one where it belongs.
    fn slot(&self, text: &str) -> usize {
        let mask = self.slots.len() - 1;
        // a fixed hasher: nobody chooses prompts to make this slow
        let mut slot = BuildHasherDefault::<DefaultHasher>::default().hash_one(text) as usize & mask;
        while self.slots[slot] != 0 && self.get(self.slots[slot] as usize - 1) != text {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn grow(&mut self) {
        self.slots = vec![0; (4 * (self.len() + 1)).next_power_of_two()];
        for index in 0..self.len() {
            let slot = self.slot(self.get(index));
            self.slots[slot] = index as u32 + 1;
        }
    }

    /// Gives back the memory that only [`Texts::insert`] needs.
    fn freeze(&mut self) {
        self.slots = Vec::new();
        self.bytes.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

/// A list of prompts as a source.
#[derive(Debug)]
pub struct Listed {
    texts: Store,
    trained: Vec<u32>,
    held_out: Vec<u32>,
}

impl Listed {
    /// Holds out `held_out` of the texts, chosen by `split_seed`; both parts keep the order of the list.
    ///
    /// # Errors
    /// No text, or none left to train on.
    pub fn new(mut texts: Store, held_out: usize, split_seed: u64) -> Result<Listed> {
        if let Store::Own(texts) = &mut texts {
            texts.freeze();
        }
        ensure!(!texts.is_empty(), "there are no prompts");
        ensure!(held_out < texts.len(), "held_out = {held_out} must be below the {} different prompts", texts.len());
        let mut kept = vec![false; texts.len()];
        let chosen = Coordinates::new(split_seed, Purpose::Split).stream().choose(texts.len(), held_out);
        chosen.into_iter().for_each(|i| kept[i] = true);
        let part = |wanted: bool| (0..texts.len() as u32).filter(|&i| kept[i as usize] == wanted).collect();
        let listed = Listed { trained: part(false), held_out: part(true), texts };
        listed.check_parts()?;
        Ok(listed)
    }

    /// # Errors
    /// A text in both parts, as one that comes with several lists of objects may be.
    fn check_parts(&self) -> Result<()> {
        let text = |&index: &u32| {
            let entry = self.texts.get(index as usize);
            entry.split_once(SEPARATOR).map_or(entry, |(text, _)| text)
        };
        // texts without objects are different ones
        if !self.held_out.iter().any(|&index| self.texts.get(index as usize).contains(SEPARATOR)) {
            return Ok(());
        }
        let trained: HashSet<&str> = self.trained.iter().map(text).collect();
        let both: Vec<&str> = self.held_out.iter().map(text).filter(|text| trained.contains(text)).collect();
        let shown: Vec<String> = both.iter().take(3).map(|text| quoted(text, SHOWN)).collect();
        ensure!(
            both.is_empty(),
            "{} of the {} held-out prompts are among those to train on too, with other objects: {}",
            both.len(),
            self.held_out.len(),
            shown.join(", ")
        );
        Ok(())
    }

    fn part(&self, split: Split) -> &[u32] {
        match split {
            Split::Train => &self.trained,
            Split::HeldOut => &self.held_out,
        }
    }
}

impl PromptSource for Listed {
    fn len(&self, split: Split) -> u64 {
        self.part(split).len() as u64
    }

    /// Panics when `index` is not below `len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt {
        let mut parts = self.texts.get(self.part(split)[index as usize] as usize).split(SEPARATOR).map(String::from);
        Prompt { text: parts.next().unwrap_or_default(), objects: parts.collect() }
    }

    fn objects(&self) -> Vec<String> {
        let entries = (0..self.texts.len()).map(|index| self.texts.get(index));
        let names: BTreeSet<&str> = entries.flat_map(|entry| entry.split(SEPARATOR).skip(1)).collect();
        names.into_iter().map(String::from).collect()
    }

    fn nameless(&self) -> Option<String> {
        let mut entries = (0..self.texts.len()).map(|index| self.texts.get(index));
        let nameless = entries.find(|entry| !entry.contains(SEPARATOR)).map(String::from);
        // a search to the first one that names some, where none does
        nameless.filter(|_| (0..self.texts.len()).any(|index| self.texts.get(index).contains(SEPARATOR)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn texts_are_kept_once_and_in_order() {
        let mut texts = Texts::default();
        let mut known = HashSet::new();
        for i in 0..5000u32 {
            // every third number comes again, and the empty text is a text
            let text = if i == 7 { String::new() } else { format!("text {}", i - i % 3) };
            assert_eq!(texts.insert(&text), known.insert(text.clone()), "{text}");
        }
        assert_eq!(texts.len(), known.len());
        assert_eq!((texts.get(0), texts.get(2), texts.get(4)), ("text 0", "text 6", "text 9"));
    }

    #[test]
    fn a_separator_in_a_text_is_a_space() {
        let mut texts = Texts::default();
        assert!(texts.insert("a\u{1f}b"));
        let prompt = Prompt { text: "a b".into(), objects: vec![" c\u{1f}d".into()] };
        assert!(texts.insert_prompt(&prompt).unwrap() && !texts.insert_prompt(&prompt).unwrap());
        let listed = Listed::new(Store::Own(texts), 0, 1).unwrap();
        let prompts: Vec<Prompt> = (0..2).map(|i| listed.prompt(Split::Train, i)).collect();
        let of =
            |objects: &[&str]| Prompt { text: "a b".into(), objects: objects.iter().map(|o| o.to_string()).collect() };
        assert_eq!(prompts, [of(&[]), of(&["c d"])]);
    }

    /// The same text with other objects is another entry, and may not be trained on where it is held out.
    #[test]
    fn a_text_is_in_one_part() {
        let build = |held_out| {
            let mut texts = Texts::default();
            for i in 0..40 {
                let objects = vec![format!("object {}", i % 2)];
                texts.insert_prompt(&Prompt { text: format!("text {}", i / 2), objects }).unwrap();
            }
            Listed::new(Store::Own(texts), held_out, 1)
        };
        let error = build(10).unwrap_err().to_string();
        assert!(error.contains("of the 10 held-out prompts are among those to train on too"), "{error}");
        assert_eq!(error.matches("text ").count(), 3, "{error}");
        assert_eq!(build(0).unwrap().len(Split::Train), 40);
    }

    #[test]
    fn every_prompt_in_exactly_one_part() {
        let build = |held_out, seed| {
            let mut texts = Texts::default();
            (0..100).for_each(|i| assert!(texts.insert(&format!("p{i}"))));
            Listed::new(Store::Own(texts), held_out, seed)
        };
        let source = build(20, 1).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (80, 20));
        let of = |source: &Listed, split| -> Vec<String> {
            (0..source.len(split)).map(|i| source.prompt(split, i).text).collect()
        };
        let mut all: HashSet<String> = of(&source, Split::Train).into_iter().collect();
        all.extend(of(&source, Split::HeldOut));
        assert_eq!(all.len(), 100);
        assert_eq!(of(&source, Split::HeldOut), of(&build(20, 1).unwrap(), Split::HeldOut));
        assert_ne!(of(&source, Split::HeldOut), of(&build(20, 2).unwrap(), Split::HeldOut));
        assert!(build(100, 1).unwrap_err().to_string().contains("held_out = 100 must be below the 100"));
        assert!(Listed::new(Store::Own(Texts::default()), 0, 1).is_err());
    }
}
