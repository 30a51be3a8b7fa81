//! What became of the lines or rows of a file of prompts: how many are prompts, and how many are not and why. Nothing that
//! a file holds is left out without being counted here.

use std::{fmt, path::Path};

use anyhow::Result;

use super::{listed::Texts, Prompt};
use crate::word_list::WordList;

/// A file that is being read, its prompts so far, and the counts.
pub struct Reading {
    texts: Texts,
    counts: Counts,
}

/// How many lines or rows there are of each kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts {
    /// The file.
    path: String,
    /// What it is made of: "line", "row".
    unit: &'static str,
    /// The file whose words drop prompts; empty for none.
    drop_words: String,
    /// All lines or rows.
    pub read: u64,
    /// Nothing but white space.
    pub blank: u64,
    /// Null in a table that knows it.
    pub null: u64,
    /// As an earlier one.
    pub repeated: u64,
    /// With a word of the list.
    pub dropped: u64,
    /// A score is missing or is no number.
    pub unscored: u64,
    /// A score is above the limit.
    pub above_limit: u64,
    /// The header again, as where tables were appended to each other.
    pub headers: u64,
    /// Prompts.
    pub kept: u64,
    /// How many of them are not trained on.
    pub held_out: u64,
    /// Prompts that go over several lines, in quotes.
    pub several_lines: u64,
}

impl Reading {
    /// `unit` is what the file is made of: "line", "row".
    pub fn new(path: &Path, unit: &'static str, drop_words: &str) -> Self {
        let counts =
            Counts { path: path.display().to_string(), unit, drop_words: drop_words.to_string(), ..Counts::default() };
        Reading { texts: Texts::default(), counts }
    }

    /// A line or row that may be a prompt; its text is trimmed.
    ///
    /// # Errors
    /// An object without a name.
    pub fn add(&mut self, prompt: &Prompt, drop: &WordList) -> Result<()> {
        self.judge(&prompt.text, drop, |texts| texts.insert_prompt(prompt))
    }

    /// As [`Reading::add`], of a prompt without objects.
    pub fn add_text(&mut self, text: &str, drop: &WordList) {
        let text = text.trim();
        self.judge(text, drop, |texts| Ok(texts.insert(text))).expect("only objects can be wrong");
    }

    fn judge(&mut self, text: &str, drop: &WordList, insert: impl FnOnce(&mut Texts) -> Result<bool>) -> Result<()> {
        self.counts.read += 1;
        if text.is_empty() {
            self.counts.blank += 1;
        } else if drop.matches(text) {
            self.counts.dropped += 1;
        } else if insert(&mut self.texts)? {
            self.counts.kept += 1;
        } else {
            self.counts.repeated += 1;
        }
        Ok(())
    }

    /// A line or row that is no prompt for the reason that `count` counts.
    pub fn leave_out(&mut self, count: impl FnOnce(&mut Counts) -> &mut u64) {
        self.counts.read += 1;
        *count(&mut self.counts) += 1;
    }

    /// Counts what is not a reason to leave a prompt out.
    pub fn note(&mut self, count: impl FnOnce(&mut Counts) -> &mut u64, more: u64) {
        *count(&mut self.counts) += more;
    }

    /// The prompts and the counts.
    pub fn end(self) -> (Texts, Counts) {
        (self.texts, self.counts)
    }
}

/// "prompts.csv: 197 rows: 180 prompts, 10 blank, 7 with a word of drop.txt".
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let of = |count: u64, unit: &str| format!("{count} {unit}{}", if count == 1 { "" } else { "s" });
        write!(f, "{}: {}: {}", self.path, of(self.read, self.unit), of(self.kept, "prompt"))?;
        if self.held_out > 0 {
            write!(f, " ({} held out)", self.held_out)?;
        }
        let reasons = [
            (self.blank, "blank"),
            (self.null, "null"),
            (self.repeated, "repeated"),
            (self.unscored, "without a score"),
            (self.above_limit, "above nsfw_max"),
            (self.headers, "like the header"),
        ];
        for (count, reason) in reasons.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, ", {count} {reason}")?;
        }
        if !self.drop_words.is_empty() {
            write!(f, ", {} with a word of {}", self.dropped, self.drop_words)?;
        }
        if self.several_lines > 0 {
            write!(f, "; {} over several lines, in quotes", self.several_lines)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_counted_once_and_said() {
        let mut reading = Reading::new(Path::new("prompts.csv"), "row", "drop.txt");
        let drop = WordList::new(["dog"]);
        for text in ["a cat", " a cat", "a dog", "", "a kite"] {
            reading.add_text(text, &drop);
        }
        reading.leave_out(|counts| &mut counts.null);
        reading.note(|counts| &mut counts.several_lines, 1);
        let (texts, mut counts) = reading.end();
        counts.held_out = 1;
        assert_eq!((texts.len(), counts.read), (2, 6));
        let said =
            "prompts.csv: 6 rows: 2 prompts (1 held out), 1 blank, 1 null, 1 repeated, 1 with a word of drop.txt; \
                    1 over several lines, in quotes";
        assert_eq!(counts.to_string(), said);
        let (_, none) = Reading::new(Path::new("x"), "line", "").end();
        assert_eq!(none.to_string(), "x: 0 lines: 0 prompts");
    }
}
