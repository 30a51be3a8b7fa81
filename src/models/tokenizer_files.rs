//! The `tokenizer/` folder of a model in the forms that the libraries have written it in: `vocab.json` and `merges.txt`
//! (CLIP's own), or `tokenizer.json` (all that the `tokenizers` library needs; transformers 5 writes nothing else), each
//! with `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` beside it, where there are some.
//!
//! `tokenizer.json` says itself what is done to a text, and that is done; it comes first where both are there. Of the
//! other form CLIP's rules are known.

use std::collections::{btree_map::Entry, BTreeMap};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

use super::folder::ModelFiles;
use crate::python_json;

pub const WHOLE: &str = "tokenizer/tokenizer.json";
pub const VOCABULARY: &str = "tokenizer/vocab.json";
pub const MERGES: &str = "tokenizer/merges.txt";
pub const SETTINGS: &str = "tokenizer/tokenizer_config.json";
pub const SPECIAL: &str = "tokenizer/special_tokens_map.json";
pub const ADDED: &str = "tokenizer/added_tokens.json";

/// How CLIP cuts a text into words before byte-pair encoding.
const WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// A tokenizer as its files describe it.
pub struct Definition {
    /// What the `tokenizers` library is built from.
    pub library: Value,
    pub start: u32,
    pub end: u32,
    pub pad: u32,
    /// The token with the largest id.
    pub largest: (u32, String),
    /// CLIP's repairs of a text are done before; not where `tokenizer.json` says what is done.
    pub cleans: bool,
    /// `tokenizer_config.json`.
    pub settings: Value,
    /// What in the files has no effect.
    pub notes: Vec<String>,
}

/// A token is written as a string or as an object with its `content`.
fn content(value: Option<&Value>) -> Option<&str> {
    let value = value?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A token outside byte-pair encoding, with all that the library asks for.
fn added_token(id: u32, token: &Value, special: bool) -> Result<Value> {
    let content = content(Some(token)).filter(|text| !text.is_empty());
    let content = content.with_context(|| format!("the added token with id {id} has no content"))?;
    let flag = |key: &str, default| token.get(key).and_then(Value::as_bool).unwrap_or(default);
    let special = flag("special", special);
    Ok(json!({"id": id, "content": content, "single_word": flag("single_word", false), "lstrip": flag("lstrip", false),
              "rstrip": flag("rstrip", false), "normalized": flag("normalized", !special), "special": special}))
}

fn text_of(token: &Value) -> &str {
    token["content"].as_str().unwrap_or_default()
}

/// The id of a token.
fn find(token: &str, added: &BTreeMap<u32, Value>, vocabulary: &BTreeMap<String, u32>) -> Option<u32> {
    let by_hand = added.iter().find(|(_, known)| text_of(known) == token).map(|(id, _)| *id);
    by_hand.or_else(|| vocabulary.get(token).copied())
}

impl Definition {
    /// # Errors
    /// Names the file, and the line or token in it.
    pub fn of(files: &ModelFiles) -> Result<Self> {
        let (mut library, source) = match files.optional_json(WHOLE)? {
            Some(json) => (whole(json).context(WHOLE)?, WHOLE),
            None => (of_vocabulary(files)?, VOCABULARY),
        };
        let mut vocabulary: BTreeMap<String, u32> =
            python_json::from_value(&library["model"]["vocab"]).context(source)?;
        if source == WHOLE && files.texts.contains_key(VOCABULARY) {
            let other: BTreeMap<String, u32> = python_json::from_value(&files.json(VOCABULARY)?).context(VOCABULARY)?;
            ensure!(other == vocabulary, "{VOCABULARY} and {WHOLE} hold different vocabularies: delete the wrong one");
        }
        let settings = files.json(SETTINGS)?;
        let special = files.optional_json(SPECIAL)?.unwrap_or(Value::Null);
        let mut notes = Vec::new();
        let listed = library["added_tokens"].as_array().cloned().unwrap_or_default();
        let mut added = added_tokens(files, listed, &settings, &mut notes)?;

        // transformers reads the map only where tokenizer_config.json lists no tokens
        let order = match settings.get("added_tokens_decoder") {
            Some(_) => [&settings, &special],
            None => [&special, &settings],
        };
        let name_of = |key: &str| order.iter().find_map(|from| content(from.get(key)));
        let mut id_of = |key: &str, default: &str| -> Result<u32> {
            let token = name_of(key).unwrap_or(default);
            let id = find(token, &added, &vocabulary);
            let id = id.with_context(|| format!("{source} lacks the special token {token}"))?;
            if let Entry::Vacant(free) = added.entry(id) {
                free.insert(added_token(id, &json!({"content": token, "normalized": false}), true)?);
            }
            Ok(id)
        };
        let start = id_of("bos_token", "<|startoftext|>")?;
        let end = id_of("eos_token", "<|endoftext|>")?;
        let pad = id_of("pad_token", "<|endoftext|>")?;
        let more = ["additional_special_tokens", "extra_special_tokens"];
        for token in order.iter().flat_map(|from| more.iter().filter_map(|key| from.get(*key)?.as_array())).flatten() {
            let name = content(Some(token)).context("a special token has no content")?;
            let outside = added.values().filter(|token| !vocabulary.contains_key(text_of(token))).count();
            // a token without a number gets the next one, as in transformers
            let id = find(name, &added, &vocabulary).unwrap_or((vocabulary.len() + outside) as u32);
            if let Entry::Vacant(free) = added.entry(id) {
                free.insert(added_token(id, token, true)?);
            }
        }
        if source == VOCABULARY {
            // transformers' class for this form looks for them in the text as it stands
            added.values_mut().for_each(|token| token["normalized"] = json!(false));
        }

        let owners: BTreeMap<u32, String> = vocabulary.iter().map(|(token, id)| (*id, token.clone())).collect();
        for (id, token) in &added {
            let name = text_of(token);
            match (vocabulary.get(name), owners.get(id)) {
                (Some(known), _) if known != id => {
                    bail!("the token {name} has the id {known} in {source} and {id} as an added token")
                }
                (None, Some(owner)) => bail!("the added token {name} has the id {id}, which is {owner}'s in {source}"),
                _ => drop(vocabulary.insert(name.to_string(), *id)),
            }
        }
        let largest = vocabulary.iter().max_by_key(|(_, id)| **id).map(|(token, id)| (*id, token.clone()));
        let largest = largest.with_context(|| format!("{source} holds no token"))?;
        library["added_tokens"] = added.into_values().collect();
        library["model"]["vocab"] = json!(vocabulary);
        Ok(Definition { library, start, end, pad, largest, cleans: source != WHOLE, settings, notes })
    }
}

impl Definition {
    /// The same vocabulary by open_clip's rules: CLIP's own, whatever `tokenizer.json` says, and the two tokens outside of
    /// byte-pair encoding called `<start_of_text>` and `<end_of_text>`.
    pub fn rename_for_open_clip(&mut self) {
        let names = [(self.start, "<start_of_text>"), (self.end, "<end_of_text>")];
        let vocabulary = self.library["model"]["vocab"].as_object().cloned().unwrap_or_default();
        let named = |(token, id): (String, Value)| match names.iter().find(|(own, _)| id == *own) {
            Some((_, name)) => (name.to_string(), id),
            None => (token, id),
        };
        let vocabulary: serde_json::Map<String, Value> = vocabulary.into_iter().map(named).collect();
        let token = |(id, name): (u32, &str)| {
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        self.library["added_tokens"] = names.into_iter().map(token).collect();
        self.library["normalizer"] = clip_normalizer();
        self.library["pre_tokenizer"] = clip_words();
        self.library["post_processor"] = Value::Null;
        self.library["model"]["vocab"] = Value::Object(vocabulary);
        self.library["model"]["unk_token"] = json!("<end_of_text>");
        if let Some((_, name)) = names.iter().find(|(id, _)| *id == self.largest.0) {
            self.largest.1 = name.to_string();
        }
    }
}

/// The `tokenizer/` folder's files, as made from open_clip's list of merges (`bpe_simple_vocab_16e6.txt`): its first line is a
/// note, merges follow of which the first 48,894 count.
///
/// # Errors
/// Names a line that is no pair.
pub fn from_merges(list: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    const COUNT: usize = 48_894;
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    // bytes that are no printable character of Latin-1 are written as those after it
    let (shown, hidden): (Vec<u8>, Vec<u8>) = (0..=255u8).partition(printable);
    let further = (0x100..0x100 + hidden.len() as u32).filter_map(char::from_u32);
    let letters: Vec<String> = shown.into_iter().map(char::from).chain(further).map(String::from).collect();
    let lines: Vec<&str> = list.lines().skip(1).take(COUNT).filter(|line| !line.is_empty()).collect();
    let mut tokens: Vec<String> = letters.iter().cloned().chain(letters.iter().map(|l| format!("{l}</w>"))).collect();
    for (number, line) in lines.iter().enumerate() {
        let (left, right) =
            line.split_once(' ').with_context(|| format!("line {}: {line:?} is no pair", number + 2))?;
        tokens.push(format!("{left}{right}"));
    }
    tokens.extend(["<|startoftext|>", "<|endoftext|>"].map(String::from));
    let vocabulary: serde_json::Map<String, Value> =
        tokens.into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let settings = json!({"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                          "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 77});
    Ok(BTreeMap::from([
        (VOCABULARY.to_string(), serde_json::to_vec(&vocabulary)?),
        (MERGES.to_string(), format!("#version: 0.2\n{}\n", lines.join("\n")).into_bytes()),
        (SETTINGS.to_string(), serde_json::to_vec(&settings)?),
    ]))
}

/// Tokens outside byte-pair encoding, by id: those of `listed` (tokenizer.json's), then those of tokenizer_config.json;
/// added_tokens.json counts where that has no list, as in transformers.
fn added_tokens(
    files: &ModelFiles,
    listed: Vec<Value>,
    settings: &Value,
    notes: &mut Vec<String>,
) -> Result<BTreeMap<u32, Value>> {
    let mut added = BTreeMap::new();
    for token in listed {
        let id = token.get("id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let id = id.with_context(|| format!("{WHOLE}: added_tokens: {token} has no id"))?;
        added.insert(id, added_token(id, &token, false).context(WHOLE)?);
    }
    let decoder = settings.get("added_tokens_decoder").filter(|list| !list.is_null());
    if let Some(decoder) = decoder {
        let decoder: BTreeMap<u32, Value> =
            python_json::from_value(decoder).with_context(|| format!("{SETTINGS}: added_tokens_decoder"))?;
        for (id, token) in decoder {
            added.insert(id, added_token(id, &token, false).context(SETTINGS)?);
        }
    }
    let Some(file) = files.optional_json(ADDED)? else { return Ok(added) };
    let file: BTreeMap<String, u32> = python_json::from_value(&file).context(ADDED)?;
    for (token, id) in file {
        let known = added.iter().find(|(_, known)| text_of(known) == token).map(|(id, _)| *id);
        match (known, decoder.is_some()) {
            (Some(known), _) => {
                ensure!(known == id, "{ADDED} gives {token} the id {id}, the tokenizer's other files {known}")
            }
            (None, false) => drop(added.insert(id, added_token(id, &json!(token), false).context(ADDED)?)),
            (None, true) => notes.push(format!(
                "{ADDED}: {token} has no effect, since {SETTINGS} has a list of added tokens without it"
            )),
        }
    }
    Ok(added)
}

/// tokenizer.json, without what cuts and fills.
fn whole(mut json: Value) -> Result<Value> {
    ensure!(json.is_object(), "holds no JSON object");
    let kind = json["model"]["type"].clone();
    ensure!(kind == "BPE" || kind.is_null(), "model.type = {kind} is not supported (only \"BPE\", CLIP's)");
    json["truncation"] = Value::Null;
    json["padding"] = Value::Null;
    Ok(json)
}

/// vocab.json and merges.txt with CLIP's rules: NFC, white space folded, lower case, words, bytes, `</w>` at word ends.
fn of_vocabulary(files: &ModelFiles) -> Result<Value> {
    ensure!(
        files.texts.contains_key(VOCABULARY) && files.texts.contains_key(MERGES),
        "{} is missing (and there is no {WHOLE})",
        if files.texts.contains_key(VOCABULARY) { MERGES } else { VOCABULARY }
    );
    let special = files.optional_json(SPECIAL)?.unwrap_or(Value::Null);
    let settings = files.optional_json(SETTINGS)?.unwrap_or(Value::Null);
    let unknown = content(special.get("unk_token")).or_else(|| content(settings.get("unk_token")));
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": clip_normalizer(),
        "pre_tokenizer": clip_words(),
        "post_processor": null,
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": unknown.unwrap_or("<|endoftext|>"),
                  "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": false,
                  "byte_fallback": false, "ignore_merges": false, "vocab": files.json(VOCABULARY)?,
                  "merges": merges(files.text(MERGES)?)?},
    }))
}

/// Unicode's composed form, white space folded, lower case.
fn clip_normalizer() -> Value {
    json!({"type": "Sequence", "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"}]})
}

/// Words, and their bytes.
fn clip_words() -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Removed", "invert": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]})
}

/// merges.txt as the pairs that the library takes.
fn merges(text: &str) -> Result<Vec<Value>> {
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let pair = line.split_once(' ').with_context(|| format!("{MERGES} line {}: {line:?}", number + 1))?;
        merges.push(json!([pair.0, pair.1]));
    }
    Ok(merges)
}

/// Files that transformers 4 asks for and 5 no longer writes, made from tokenizer.json; none where they are there.
pub fn for_older_readers(files: &ModelFiles) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let there = |path: &str| files.texts.contains_key(path);
    if !there(WHOLE) || (there(VOCABULARY) && there(MERGES)) {
        return Ok(Vec::new());
    }
    let json = files.json(WHOLE)?;
    let vocabulary: BTreeMap<String, u32> = python_json::from_value(&json["model"]["vocab"]).context(WHOLE)?;
    let mut merges = String::from("#version: 0.2\n");
    for merge in json["model"]["merges"].as_array().into_iter().flatten() {
        let pair = merge.as_array().map(|pair| pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "));
        let line = pair.as_deref().or(merge.as_str()).with_context(|| format!("{WHOLE}: merge {merge}"))?;
        merges.push_str(&format!("{line}\n"));
    }
    let mut made = vec![(VOCABULARY, serde_json::to_vec(&vocabulary)?), (MERGES, merges.into_bytes())];
    let settings = files.optional_json(SETTINGS)?.unwrap_or(Value::Null);
    let tokens = json["added_tokens"].as_array().into_iter().flatten();
    let added: BTreeMap<&str, &Value> = tokens
        .map(|token| (text_of(token), &token["id"]))
        .filter(|(text, _)| !vocabulary.contains_key(*text))
        .collect();
    if !added.is_empty() && settings.get("added_tokens_decoder").is_none() && !there(ADDED) {
        made.push((ADDED, serde_json::to_vec(&added)?));
    }
    Ok(made)
}
