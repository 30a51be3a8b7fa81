//! JSON as the libraries of this field write and read it. Python's `json` module writes numbers that are not finite as
//! `NaN`, `Infinity` and `-Infinity`, which JSON does not know; a byte-order mark may come first, and of a key that is
//! there twice the last counts.
//!
//! (json5, the crate, would take such numbers too, but also comments and single quotes, which Python refuses, and hands
//! over the numbers as null, which these libraries read as "not set".)

use anyhow::{anyhow, bail, Context, Result};
use serde::de::DeserializeOwned;
use serde_json::{json, Value};

/// What Python writes for numbers that are not finite.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The value in `bytes`. A number that is not finite becomes a value of its own, which is no number for whoever wants
/// to compute with it: [`not_finite`] recognises it.
///
/// # Errors
/// Says what the file is instead, where that can be seen: a web page, Git's placeholder, a merge that was not finished.
pub fn parse(bytes: &[u8]) -> Result<Value> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let text = std::str::from_utf8(bytes)
        .map_err(|e| anyhow!("is not UTF-8 (byte {}), as JSON must be", e.valid_up_to() + 1))?;
    serde_json::from_str(text).or_else(|error| match with_markers(text) {
        Some(repaired) => serde_json::from_str(&repaired).map_err(|error| explained(text, &error)),
        None => Err(explained(text, &error)),
    })
}

/// As [`parse`], of a known form. An error names the key.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    from_value(&parse(bytes)?)
}

/// A value of [`parse`] as a known form.
///
/// # Errors
/// Names the key, and the number that is not finite where a number is asked for.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let at = error.path().to_string();
        let found = error.path().iter().try_fold(value, |value, step| match step {
            serde_path_to_error::Segment::Seq { index } => value.get(index),
            serde_path_to_error::Segment::Map { key } => value.get(key),
            _ => None,
        });
        match found.and_then(not_finite) {
            Some(word) => anyhow!("{at} is {word}, a finite number is needed"),
            None if at == "." => anyhow!("{}", error.inner()),
            None => anyhow!("{at}: {}", error.inner()),
        }
    })
}

/// Python's word for the number that is not finite, where `value` is one.
pub fn not_finite(value: &Value) -> Option<&'static str> {
    let object = value.as_object().filter(|object| object.len() == 1)?;
    WORDS.into_iter().find(|word| object.get(*word) == Some(&json!(["not finite"])))
}

/// `value` as a message shows it.
pub fn shown(value: &Value) -> String {
    not_finite(value).map_or_else(|| value.to_string(), str::to_string)
}

/// `text` with objects in place of Python's words for numbers, outside strings; None where there are none.
fn with_markers(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len() + 64);
    let (mut in_string, mut escaped, mut kept) = (false, false, 0);
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'-' | b'I' | b'N' if !in_string => {
                if let Some(word) = WORDS.into_iter().find(|word| bytes[at..].starts_with(word.as_bytes())) {
                    out.push_str(&text[kept..at]);
                    out.push_str(&json!({ word: ["not finite"] }).to_string());
                    at += word.len();
                    kept = at;
                    continue;
                }
            }
            _ => {}
        }
        at += 1;
    }
    (kept > 0).then(|| out + &text[kept..])
}

/// Why `text` is no JSON, in words where its look tells.
fn explained(text: &str, error: &serde_json::Error) -> anyhow::Error {
    let start = text.trim_start();
    let beginning = start.get(..64).unwrap_or(start).to_ascii_lowercase();
    let conflict = text.lines().position(|line| line.starts_with("<<<<<<<") || line.starts_with(">>>>>>>"));
    match conflict {
        Some(line) => anyhow!("has git's merge-conflict markers (line {}): finish the merge", line + 1),
        None if start.is_empty() => anyhow!("is empty"),
        None if text.bytes().all(|byte| byte == 0) => {
            anyhow!("holds zeros only, as after a crash while it was written")
        }
        None if beginning.starts_with("<!doctype") || beginning.starts_with("<html") => {
            anyhow!("is an HTML page, not JSON: what was saved is a web page about the file, or an error's")
        }
        None if beginning.starts_with("version https://git-lfs") => {
            anyhow!("is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")
        }
        None if ["entry not found", "invalid credentials", "access to ", "repository not found"]
            .iter()
            .any(|words| beginning.starts_with(words)) =>
        {
            anyhow!("holds a server's answer instead of the file: {}", text.lines().next().unwrap_or_default())
        }
        None => anyhow!("is not JSON: {error}"),
    }
}

/// The keys and values of an object, without those that are null.
///
/// # Errors
/// `value` is no object.
pub fn without_nulls(value: &Value) -> Result<Value> {
    let object = value.as_object().context("holds no JSON object")?;
    if object.is_empty() {
        bail!("holds an empty JSON object");
    }
    Ok(Value::Object(object.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_is_read() {
        let text = "\u{feff}{\"a\": NaN, \"b\": [Infinity, -Infinity, -1], \"NaN\": \"NaN -Infinity \\\" NaN\", \"c\": 1, \"c\": 2}";
        let value = parse(text.as_bytes()).unwrap();
        assert_eq!(not_finite(&value["a"]), Some("NaN"));
        assert_eq!((shown(&value["b"][0]), shown(&value["b"][1])), ("Infinity".into(), "-Infinity".into()));
        assert_eq!(
            (&value["b"][2], &value["NaN"], &value["c"]),
            (&json!(-1), &json!("NaN -Infinity \" NaN"), &json!(2))
        );
    }

    #[test]
    fn a_number_that_is_needed_must_be_finite() {
        #[derive(serde::Deserialize, Debug)]
        struct Wanted {
            #[allow(dead_code)]
            list: Vec<f64>,
        }
        let e = read::<Wanted>(b"{\"list\": [1, -Infinity], \"unread\": NaN}").unwrap_err().to_string();
        assert_eq!(e, "list[1] is -Infinity, a finite number is needed");
        let e = read::<Wanted>(b"{\"list\": [\"x\"]}").unwrap_err().to_string();
        assert!(e.starts_with("list[0]: invalid type"), "{e}");
    }

    #[test]
    fn what_is_no_json_is_called_by_its_name() {
        for (text, wanted) in [
            ("", "is empty"),
            (" \n", "is empty"),
            ("\0\0\0", "zeros only"),
            ("<!DOCTYPE html><p>404", "an HTML page"),
            ("{\n<<<<<<< HEAD\n\"a\": 1\n=======\n>>>>>>> x\n}", "merge-conflict markers (line 2)"),
            ("version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
            ("Entry not found", "a server's answer"),
            ("{\"a\": nan}", "is not JSON"),
            ("{\"a\": NaN", "is not JSON"),
        ] {
            let e = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(e.contains(wanted), "{text:?}: {e}");
        }
        assert!(parse(b"\xff\xfe{").unwrap_err().to_string().contains("UTF-8"));
    }
}
