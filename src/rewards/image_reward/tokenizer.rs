//! Prompt → token ids: BERT's uncased WordPiece, from its `vocab.txt`.
//!
//! Lower case, accents stripped, Chinese characters and punctuation by themselves, words of more than 100 characters
//! unknown: all of it is the `tokenizers` library's. BLIP adds the tokens \[DEC\] and \[ENC\] behind the vocabulary; they
//! are not used in scoring, but a prompt may hold them.

use anyhow::{anyhow, ensure, Context, Result};
use serde_json::{json, Map, Value};
use tch::Tensor;

use crate::excerpt::{quoted, whole_words, IN_MESSAGES};

/// Tokens of a prompt, \[CLS\] and \[SEP\] included; longer prompts are cut, shorter ones padded.
pub const LENGTH: usize = 35;
/// Bytes of a prompt that are looked at.
const BEGINNING: usize = 64 << 10;
const ADDED: [&str; 2] = ["[DEC]", "[ENC]"];

pub struct WordPiece {
    inner: tokenizers::Tokenizer,
    start: i64,
    end: i64,
    pad: i64,
    /// Ids are below this.
    pub size: i64,
}

/// Token ids of several prompts.
pub struct Tokens {
    /// i64 `[n, 35]`.
    pub ids: Tensor,
    /// How many of the ids of each prompt are not padding, i64 `[n]`.
    pub lengths: Tensor,
}

impl WordPiece {
    /// # Errors
    /// A file that cannot be read, or that lacks one of BERT's special tokens.
    pub fn load(path: &str) -> Result<WordPiece> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        // a token's id is the number of its line, whatever the line holds
        WordPiece::new(text.lines().map(String::from).collect()).with_context(|| path.to_string())
    }

    fn new(words: Vec<String>) -> Result<WordPiece> {
        let count = words.len();
        let mut vocabulary: Map<String, Value> =
            words.into_iter().enumerate().map(|(id, word)| (word, json!(id))).collect();
        ensure!(vocabulary.len() == count, "{} of {count} tokens come twice", count - vocabulary.len());
        for (i, token) in ADDED.into_iter().enumerate() {
            let known = vocabulary.insert(token.to_string(), json!(count + i)).is_some();
            ensure!(!known, "it holds {token}, which is added to BERT's vocabulary here");
        }
        let id = |token: &str| {
            vocabulary
                .get(token)
                .and_then(Value::as_i64)
                .with_context(|| format!("it lacks {token}: no BERT vocabulary"))
        };
        let (start, end, pad, _) = (id("[CLS]")?, id("[SEP]")?, id("[PAD]")?, id("[UNK]")?);
        let mut special = Vec::new();
        for token in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].into_iter().chain(ADDED) {
            if let Ok(id) = id(token) {
                special.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                                    "rstrip": false, "normalized": false, "special": true}));
            }
        }
        let definition = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": special,
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                           "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": null,
            "decoder": null,
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": vocabulary},
        });
        let inner = tokenizers::Tokenizer::from_bytes(definition.to_string().as_bytes())
            .map_err(|e| anyhow!("it is no WordPiece vocabulary: {e}"))?;
        Ok(WordPiece { inner, start, end, pad, size: (count + ADDED.len()) as i64 })
    }

    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tokens> {
        let mut ids = Vec::with_capacity(prompts.len() * LENGTH);
        let mut lengths = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let prompt = prompt.as_ref();
            // more than enough: every word is a token at least, and no token spans white space
            let beginning = whole_words(prompt, BEGINNING);
            let words = self.inner.encode_fast(beginning, false);
            let words = words.map_err(|e| anyhow!("prompt {}: {e}", quoted(prompt, IN_MESSAGES)))?;
            let first = ids.len();
            ids.push(self.start);
            ids.extend(words.get_ids().iter().take(LENGTH - 2).map(|&id| i64::from(id)));
            ids.push(self.end);
            lengths.push((ids.len() - first) as i64);
            ids.resize(first + LENGTH, self.pad);
        }
        let n = prompts.len() as i64;
        Ok(Tokens { ids: Tensor::from_slice(&ids).view([n, LENGTH as i64]), lengths: Tensor::from_slice(&lengths) })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn words() -> Vec<String> {
        let plain = "[PAD] [UNK] [CLS] [SEP] a cafe ##s ! 猫";
        plain.split(' ').map(String::from).collect()
    }

    fn ids(text: &str) -> Vec<i64> {
        let tokens = WordPiece::new(words()).unwrap().encode(&[text]).unwrap();
        let length = tokens.lengths.int64_value(&[0]);
        let all: Vec<i64> = Vec::try_from(tokens.ids.view([-1])).unwrap();
        assert!(all.len() == LENGTH && all[length as usize..].iter().all(|&id| id == 0));
        all[..length as usize].to_vec()
    }

    #[test]
    fn berts_rules() {
        assert_eq!(ids("A Cafés!"), [2, 4, 5, 6, 7, 3]);
        assert_eq!(ids("cafe猫a"), [2, 5, 8, 4, 3]);
        assert_eq!(ids("[ENC] a dog"), [2, 10, 4, 1, 3]);
        assert_eq!(ids(""), [2, 3]);
        assert_eq!(ids(&format!("a {}", "a".repeat(101))), [2, 4, 1, 3]);
        assert_eq!(ids(&"a ".repeat(100)).len(), LENGTH);
        assert_eq!(ids(&"a ".repeat(100)).last(), Some(&3));
        let without: Vec<String> = words().into_iter().filter(|w| w != "[SEP]").collect();
        assert!(WordPiece::new(without).err().unwrap().to_string().contains("[SEP]"));
        let twice = words().into_iter().chain(["a".to_string()]).collect();
        assert!(WordPiece::new(twice).err().unwrap().to_string().contains("twice"));
    }

    /// The ids of Python's BertTokenizer for some hundred prompts, BERT's own vocabulary.
    #[test]
    fn the_ids_of_python() {
        let Some(data) = std::env::var_os("RLDIFF_TEST_DATA") else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with bert/vocab.txt and golden_tokens.json");
            return;
        };
        let data = Path::new(&data);
        let tokenizer = WordPiece::load(data.join("bert/vocab.txt").to_str().unwrap()).unwrap();
        assert_eq!(tokenizer.size, 30_524);
        let golden: Vec<Value> =
            serde_json::from_slice(&std::fs::read(data.join("golden_tokens.json")).unwrap()).unwrap();
        for entry in &golden {
            let text = entry["text"].as_str().unwrap();
            let wanted: Vec<i64> = serde_json::from_value(entry["bert35_ids"].clone()).unwrap();
            let mask: Vec<i64> = serde_json::from_value(entry["bert35_mask"].clone()).unwrap();
            let tokens = tokenizer.encode(&[text]).unwrap();
            assert_eq!(Vec::<i64>::try_from(tokens.ids.view([-1])).unwrap(), wanted, "{text:?}");
            assert_eq!(tokens.lengths.int64_value(&[0]), mask.iter().sum::<i64>(), "{text:?}");
        }
        println!("{} prompts", golden.len());
        assert!(golden.len() > 200);
    }
}
