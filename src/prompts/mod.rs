//! The prompt distribution p(c) of a task: one source per file.

use std::collections::HashSet;

use anyhow::{bail, Result};
use serde::{Deserialize, Serialize};

pub mod article;
pub mod compositions;
pub mod listed;
pub mod occupations;
pub mod paper;
pub mod parquet;
pub mod places;
pub mod reading;
pub mod registry;
mod rows;
pub mod shared_texts;
pub mod table;
pub mod text;

/// A context c with what a reward may need to know about it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// The words the text encoder sees.
    pub text: String,
    /// Names of the objects that the picture should show (composition reward, Eq. 13); empty where it does not apply.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<String>,
}

/// Which part of a prompt set: the one trained on, or the one kept for evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    Train,
    HeldOut,
}

/// A set of prompts, addressed by index so that every rank can draw the same prompt without communication.
pub trait PromptSource {
    /// Number of prompts in a split; 0 means the split does not exist.
    fn len(&self, split: Split) -> u64;
    /// The prompt at `index` in `0..len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt;
    /// Every object that its prompts name, once; none where they name none.
    fn objects(&self) -> Vec<String> {
        Vec::new()
    }
    /// A prompt that names no object although others do.
    fn nameless(&self) -> Option<String> {
        None
    }
}

/// All prompts of a source as one split, those that are trained on first.
pub struct Whole(pub Box<dyn PromptSource>);

impl PromptSource for Whole {
    fn len(&self, split: Split) -> u64 {
        match split {
            Split::Train => self.0.len(Split::Train) + self.0.len(Split::HeldOut),
            Split::HeldOut => 0,
        }
    }

    fn prompt(&self, _split: Split, index: u64) -> Prompt {
        match index.checked_sub(self.0.len(Split::Train)) {
            None => self.0.prompt(Split::Train, index),
            Some(held_out) => self.0.prompt(Split::HeldOut, held_out),
        }
    }

    fn objects(&self) -> Vec<String> {
        self.0.objects()
    }

    fn nameless(&self) -> Option<String> {
        self.0.nameless()
    }
}

/// Errors when a name is empty or occurs twice within or between the two lists; `what` names the kind of thing.
fn check_names(what: &str, trained: &[String], held_out: &[String]) -> Result<()> {
    let mut seen = HashSet::new();
    for name in trained.iter().chain(held_out) {
        if name.trim().is_empty() {
            bail!("the list of {what}s has an empty name");
        }
        if !seen.insert(name.as_str()) {
            bail!("the {what} '{name}' is listed twice");
        }
    }
    Ok(())
}
