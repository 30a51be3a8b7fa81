//! Prompts of which the text encoder reads only the beginning.

use anyhow::Result;

use crate::{
    excerpt::{quoted, IN_MESSAGES},
    models::tokenizer::Tokenizer,
    prompts::{PromptSource, Split},
};

/// Of longer lists so many prompts are looked at, evenly spread: more would take longer than a start may.
const LOOKED_AT: u64 = 10_000;

/// Warns once where some of `texts` have more tokens than the text encoder reads; `of` says whose they are.
///
/// # Errors
/// A text that the tokenizer cannot take.
pub fn warn<S: AsRef<str>>(of: &str, tokenizer: &Tokenizer, texts: impl Iterator<Item = S>) -> Result<()> {
    let (mut all, mut longer, mut first) = (0, 0, None);
    for text in texts {
        let text = text.as_ref();
        if text.is_empty() {
            continue;
        }
        all += 1;
        // every token takes a byte or more
        if text.len() < tokenizer.length - 1 {
            continue;
        }
        let encoded = tokenizer.encode(text)?;
        if encoded.cut > 0 {
            longer += 1;
            first.get_or_insert_with(|| (quoted(text, IN_MESSAGES / 2), encoded.cut_in_words()));
        }
    }
    if let Some((first, cut)) = first {
        let reads = format!("longer than the {} tokens that the text encoder reads", tokenizer.length);
        match longer {
            1 if all == 1 => log::warn!("{of}the prompt {first} is {reads}: {cut}"),
            1 => log::warn!("{of}1 of {all} prompts is {reads}, {first}: {cut}"),
            _ => log::warn!("{of}{longer} of {all} prompts are {reads}, first {first}: their last tokens are cut"),
        }
    }
    Ok(())
}

/// As [`warn`], of the prompts of a source.
pub fn warn_of_source(of: &str, tokenizer: &Tokenizer, source: &dyn PromptSource) -> Result<()> {
    let texts = [Split::Train, Split::HeldOut].into_iter().flat_map(|split| {
        let all = source.len(split);
        let step = all.div_ceil(LOOKED_AT).max(1);
        (0..all).step_by(step as usize).map(move |index| source.prompt(split, index).text)
    });
    warn(of, tokenizer, texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{models::folder::ModelFiles, run::model_location};

    /// A million words cost as much as a few: only the beginning is cut into tokens.
    #[test]
    fn a_line_as_long_as_a_file_is_cut_before_it_is_tokenised() {
        let files = ModelFiles::read_tokenizer(&model_location("embedded")).unwrap();
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        let started = std::time::Instant::now();
        for text in ["a red cube ".repeat(400_000), "x".repeat(200_000), "& ".repeat(200_000), " ".repeat(900_000)] {
            let whole = tokenizer.encode(&text).unwrap();
            let short: String = text.chars().take(30_000).collect();
            assert_eq!(whole.ids, tokenizer.encode(&short).unwrap().ids);
            assert_eq!(whole.cut > 0, !text.trim().is_empty());
        }
        assert!(started.elapsed().as_secs_f64() < 20.0, "{:?}", started.elapsed());
    }
}
