//! Prompt → token ids: CLIP's byte-pair encoding, read from the `tokenizer/` folder of a model.
//!
//! The rules are handed to the `tokenizers` library; this file adds the start and end tokens, truncates and pads.
//! Special and added tokens are found in the text before it is encoded, as in Python: with Stable Diffusion 2's padding
//! token `!`, "hey!" holds a padding token. [`clean`] says what is done to the text before.

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::Value;
use tch::Tensor;

use super::{
    folder::ModelFiles,
    open_clip_text::clean_for_open_clip,
    prompt_cleaning::clean,
    text_encoder::TextConfig,
    tokenizer_files::{Definition, SETTINGS},
};
use crate::excerpt::{quoted, whole_words, IN_MESSAGES};

/// By whose rules a text is cleaned and cut into words; the vocabulary is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextRules {
    /// Those of diffusers' pipelines: transformers' `CLIPTokenizer` with `ftfy`, or what `tokenizer.json` says.
    Pipeline,
    /// transformers' `CLIPTokenizerFast`, which its processors load: no repairs.
    Fast,
    /// open_clip's `SimpleTokenizer`: repairs, HTML's entities, and other names of the start and end tokens.
    OpenClip,
}

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    clean: Option<fn(&str) -> String>,
    start: u32,
    end: u32,
    pad: u32,
    /// Tokens per prompt, start and end included.
    pub length: usize,
    /// The token with the largest id.
    pub largest: (u32, String),
    /// What in its files has no effect.
    pub notes: Vec<String>,
}

/// A prompt's token ids.
pub struct Encoded {
    /// Exactly `Tokenizer::length`: start, the words, end, padding.
    pub ids: Vec<u32>,
    /// Tokens of the prompt that found no room; of a prompt of which only the beginning was looked at, at least so many.
    pub cut: usize,
    /// Whether only the beginning was looked at.
    beginning: bool,
}

impl Encoded {
    /// What is cut, for a message.
    pub fn cut_in_words(&self) -> String {
        match self.beginning {
            true => "all but its first tokens are cut".to_string(),
            false => format!("its last {} tokens are cut", self.cut),
        }
    }
}

/// Bytes of a prompt that are looked at where they have more tokens than there is room.
const BEGINNING: usize = 8 << 10;

impl Tokenizer {
    /// Reads the folder in any form that [`super::tokenizer_files`] knows. Prompts have `model_max_length` tokens, or as
    /// many as the text encoder has positions if that is smaller.
    ///
    /// # Errors
    /// Names the file, and the line or token in it.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        Tokenizer::with_rules(files, TextRules::Pipeline)
    }

    /// As [`Tokenizer::from_files`], by other rules than the pipelines'.
    pub fn with_rules(files: &ModelFiles, rules: TextRules) -> Result<Self> {
        Tokenizer::load(files, rules).map_err(|e| match format!("{e:#}").starts_with(&files.origin) {
            true => e,
            false => e.context(files.origin.clone()),
        })
    }

    fn load(files: &ModelFiles, rules: TextRules) -> Result<Self> {
        let mut definition = Definition::of(files)?;
        if rules == TextRules::OpenClip {
            definition.rename_for_open_clip();
        }
        let Definition { library, start, end, pad, largest, cleans, settings, notes } = definition;
        let length = prompt_length(files, &settings)?;
        let inner = tokenizers::Tokenizer::from_bytes(library.to_string().as_bytes())
            .map_err(|e| anyhow!("the tokenizer's vocabulary, merges and rules do not fit together: {e}"))?;
        let clean: Option<fn(&str) -> String> = match rules {
            TextRules::Pipeline => cleans.then_some(clean),
            TextRules::Fast => None,
            TextRules::OpenClip => Some(clean_for_open_clip),
        };
        Ok(Tokenizer { inner, clean, start, end, pad, length, largest, notes })
    }

    /// The id of the token that ends every prompt.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Start, the words (cut off where too long), end, padding.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        let text = self.clean.map_or_else(|| prompt.to_string(), |clean| clean(prompt));
        let room = self.length - 2;
        let (words, beginning) = self.words(&text, room)?;
        let mut ids = vec![self.start];
        ids.extend(words.iter().take(room));
        ids.push(self.end);
        ids.resize(self.length, self.pad);
        Ok(Encoded { ids, cut: words.len().saturating_sub(room), beginning })
    }

    /// The tokens of `text`, or of a beginning of it (then true) that has more than `room`: no token spans white space.
    fn words(&self, text: &str, room: usize) -> Result<(Vec<u32>, bool)> {
        let mut least = BEGINNING;
        loop {
            let beginning = whole_words(text, least);
            let words = self.inner.encode_fast(beginning, false);
            let words = words.map_err(|e| anyhow!("prompt {}: {e}", quoted(text, IN_MESSAGES)))?;
            let whole = beginning.len() == text.len();
            if whole || words.len() > room {
                return Ok((words.get_ids().to_vec(), !whole));
            }
            least *= 4;
        }
    }

    /// Ids of several prompts as i64 [prompts, length].
    pub fn encode_batch<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let mut ids = Vec::with_capacity(prompts.len() * self.length);
        for prompt in prompts {
            ids.extend(self.encode(prompt.as_ref())?.ids.into_iter().map(i64::from));
        }
        Ok(Tensor::from_slice(&ids).view([prompts.len() as i64, self.length as i64]))
    }
}

/// `model_max_length`, but not more than the text encoder has positions (CLIP's 77 where its config is absent).
fn prompt_length(files: &ModelFiles, settings: &Value) -> Result<usize> {
    const CONFIG: &str = "text_encoder/config.json";
    let positions = match files.optional_json(CONFIG)? {
        Some(json) => TextConfig::from_json(&json).context(CONFIG)?.max_position_embeddings,
        None => TextConfig::default().max_position_embeddings,
    };
    // a tokenizer without a limit of its own carries a huge number here, as an integer or as a float
    let declared = settings.get("model_max_length").and_then(Value::as_f64).unwrap_or(f64::MAX);
    let length = declared.min(positions as f64);
    ensure!(length >= 2.0, "{SETTINGS}: model_max_length {length} leaves no room for a prompt");
    Ok(length as usize)
}
