//! A user's list of words and phrases; a text that holds one of them is dropped.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use anyhow::{ensure, Context, Result};

use crate::text_file;

/// Words and phrases, compared in lower case and as whole words: "black" drops "a Black-haired man", not "blackboard".
#[derive(Clone, Debug, Default)]
pub struct WordList {
    words: HashSet<String>,
    /// Phrases of several words by their first one; the others in order.
    phrases: HashMap<String, Vec<Vec<String>>>,
}

impl WordList {
    /// The list in `path`, one word or phrase per line; the empty path is the empty list.
    ///
    /// # Errors
    /// A file that cannot be read, is not UTF-8 (the line is named), or lists nothing.
    pub fn load(path: &str) -> Result<WordList> {
        if path.is_empty() {
            return Ok(WordList::default());
        }
        let lines = text_file::lines(Path::new(path)).context("list of words to drop")?;
        let list = WordList::new(lines.iter().map(|(_, line)| line.as_str()));
        ensure!(!list.is_empty(), "list of words to drop: {path} has no words");
        Ok(list)
    }

    pub fn new<'a>(entries: impl IntoIterator<Item = &'a str>) -> WordList {
        let mut list = WordList::default();
        for entry in entries {
            let mut words = words(entry);
            let Some(first) = words.next() else { continue };
            let rest: Vec<String> = words.collect();
            if rest.is_empty() {
                list.words.insert(first);
            } else {
                list.phrases.entry(first).or_default().push(rest);
            }
        }
        list
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty() && self.phrases.is_empty()
    }

    /// Whether `text` holds a word or phrase of the list.
    pub fn matches(&self, text: &str) -> bool {
        if self.is_empty() {
            return false;
        }
        let words: Vec<String> = words(text).collect();
        words.iter().enumerate().any(|(i, word)| {
            let followed = |rest: &Vec<String>| words[i + 1..].starts_with(rest);
            self.words.contains(word) || self.phrases.get(word).is_some_and(|p| p.iter().any(followed))
        })
    }
}

/// Runs of letters and digits, in lower case.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_words_and_phrases_in_any_case() {
        let list = WordList::new(["Black", "middle eastern", "", "  ÉTÉ "]);
        for text in ["a black-haired man", "BLACK", "a Middle-Eastern market", "un été", "so black."] {
            assert!(list.matches(text), "{text}");
        }
        for text in ["blackboard", "the middle of an eastern town", "middle", "", "eastern middle"] {
            assert!(!list.matches(text), "{text}");
        }
        assert!(!WordList::default().matches("anything"));
    }

    #[test]
    fn a_list_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("words");
        std::fs::write(&path, "asian\n\nnative american\n").unwrap();
        assert!(WordList::load(path.to_str().unwrap()).unwrap().matches("a Native American chief"));
        assert!(WordList::load("").unwrap().is_empty());
        std::fs::write(&path, "\n - \n").unwrap();
        assert!(WordList::load(path.to_str().unwrap()).unwrap_err().to_string().contains("has no words"));
        let missing = folder.path().join("none");
        assert!(format!("{:#}", WordList::load(missing.to_str().unwrap()).unwrap_err()).contains("none"));
    }
}
