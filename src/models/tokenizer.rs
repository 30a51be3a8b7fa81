//! Prompt → token ids: CLIP's byte-pair encoding, read from the `tokenizer/` folder of a model.
//!
//! The rules (NFC, white space folded, lower case, CLIP's word pattern, byte level, `</w>` at word ends) are handed to
//! the `tokenizers` library; this file reads the folder, adds the start and end tokens, truncates and pads. Special
//! tokens are found in the text as it stands, as in Python: with Stable Diffusion 2's padding token `!`, "hey!" holds
//! a padding token. [`clean`] says what is done to the text before.

use std::collections::BTreeMap;

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::{json, Value};
use tch::Tensor;

use super::{folder::ModelFiles, prompt_cleaning::clean, text_encoder::TextConfig};
use crate::excerpt::{quoted, whole_words, IN_MESSAGES};

/// How CLIP cuts a text into words before byte-pair encoding.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: u32,
    end: u32,
    pad: u32,
    /// Tokens per prompt, start and end included.
    pub length: usize,
    /// Largest id in the vocabulary.
    pub largest_id: u32,
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

/// A special token is written as a string or as an object with its `content`.
fn content(value: Option<&Value>) -> Option<&str> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

impl Tokenizer {
    /// Reads vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json (which wins where both name a
    /// token; absent ones take CLIP's). Prompts have `model_max_length` tokens, or as many as the text encoder has
    /// positions if that is smaller.
    ///
    /// # Errors
    /// Names the file, and the line or token in it.
    pub fn from_files(files: &ModelFiles) -> Result<Self> {
        Tokenizer::load(files).with_context(|| files.origin.clone())
    }

    fn load(files: &ModelFiles) -> Result<Self> {
        let vocabulary: BTreeMap<String, u32> =
            serde_json::from_value(files.json("tokenizer/vocab.json")?).context("tokenizer/vocab.json")?;
        let settings = files.json("tokenizer/tokenizer_config.json")?;
        let special = files.optional_json("tokenizer/special_tokens_map.json")?.unwrap_or(Value::Null);
        let length = prompt_length(files, &settings)?;
        let largest_id = vocabulary.values().copied().max().context("tokenizer/vocab.json holds no token")?;

        let name_of = |key: &str, default: &'static str| -> String {
            content(special.get(key)).or_else(|| content(settings.get(key))).unwrap_or(default).to_string()
        };
        let (start, end) = (name_of("bos_token", "<|startoftext|>"), name_of("eos_token", "<|endoftext|>"));
        let (pad, unknown) = (name_of("pad_token", "<|endoftext|>"), name_of("unk_token", "<|endoftext|>"));
        let id = |token: &str| {
            vocabulary
                .get(token)
                .copied()
                .ok_or_else(|| anyhow!("tokenizer/vocab.json lacks the special token {token}"))
        };
        let (start_id, end_id, pad_id) = (id(&start)?, id(&end)?, id(&pad)?);
        let special_tokens = BTreeMap::from([(start_id, start), (end_id, end), (pad_id, pad)]);
        let added: Vec<Value> = special_tokens
            .into_iter()
            .map(|(id, token)| {
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
            .collect();
        let merges = merges(files.text("tokenizer/merges.txt")?)?;
        let definition = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
            "post_processor": null,
            "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
                      "ignore_merges": false, "vocab": vocabulary, "merges": merges},
        });
        let inner = tokenizers::Tokenizer::from_bytes(definition.to_string().as_bytes())
            .map_err(|e| anyhow!("tokenizer/vocab.json and merges.txt do not fit together: {e}"))?;
        Ok(Tokenizer { inner, start: start_id, end: end_id, pad: pad_id, length, largest_id })
    }

    /// Start, the words (cut off where too long), end, padding.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        let room = self.length - 2;
        let (words, beginning) = self.words(&clean(prompt), room)?;
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
    ensure!(length >= 2.0, "tokenizer/tokenizer_config.json: model_max_length {length} leaves no room for a prompt");
    Ok(length as usize)
}

/// merges.txt as the pairs that the library takes.
fn merges(text: &str) -> Result<Vec<Value>> {
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let pair =
            line.split_once(' ').with_context(|| format!("tokenizer/merges.txt line {}: {line:?}", number + 1))?;
        merges.push(json!([pair.0, pair.1]));
    }
    Ok(merges)
}
