//! Prompts for portraits, "a portrait of a nurse" (section 4.2 of the paper).

use anyhow::{bail, Result};

use super::article::with_article;
use super::{Prompt, PromptSource, Split};

/// "a portrait of a {occupation}" with the right article.
pub fn text(occupation: &str) -> String {
    format!("a portrait of {}", with_article(occupation))
}

/// One prompt per occupation.
#[derive(Clone, Debug)]
pub struct Occupations {
    trained: Vec<String>,
    held_out: Vec<String>,
}

impl Occupations {
    /// Errors: an occupation in both lists or twice in one, or none to train on.
    pub fn new(trained: Vec<String>, held_out: Vec<String>) -> Result<Self> {
        super::check_names("occupation", &trained, &held_out)?;
        if trained.is_empty() {
            bail!("there is no occupation to train on");
        }
        Ok(Occupations { trained, held_out })
    }

    fn part(&self, split: Split) -> &[String] {
        match split {
            Split::Train => &self.trained,
            Split::HeldOut => &self.held_out,
        }
    }
}

impl PromptSource for Occupations {
    fn len(&self, split: Split) -> u64 {
        self.part(split).len() as u64
    }

    /// Panics when `index` is not below `len(split)`.
    fn prompt(&self, split: Split, index: u64) -> Prompt {
        Prompt { text: text(&self.part(split)[index as usize]), objects: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prompt_each() {
        let list = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let source = Occupations::new(list(&["nurse", "engineer"]), list(&["TV presenter"])).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (2, 1));
        assert_eq!(source.prompt(Split::Train, 1).text, "a portrait of an engineer");
        assert_eq!(source.prompt(Split::HeldOut, 0).text, "a portrait of a TV presenter");
        assert!(Occupations::new(list(&[]), list(&["nurse"])).is_err());
        assert!(Occupations::new(list(&["nurse"]), list(&["nurse"])).is_err());
    }
}
