//! Text files that a user gives: lines and JSON lines, with the line named where something is wrong.

use std::path::Path;

use anyhow::{anyhow, bail, Context, Result};

/// Lines that are not blank, trimmed, with their number (from 1). A byte-order mark at the beginning is skipped.
///
/// # Errors
/// A file that cannot be read, or a line that is not UTF-8.
pub fn lines(path: &Path) -> Result<Vec<(usize, String)>> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    lines_of(&bytes).with_context(|| path.display().to_string())
}

/// As [`lines`], of bytes.
pub fn lines_of(bytes: &[u8]) -> Result<Vec<(usize, String)>> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut lines = Vec::new();
    for (index, line) in bytes.split(|&b| b == b'\n').enumerate() {
        let line = std::str::from_utf8(line).map_err(|_| anyhow!("line {} is not UTF-8", index + 1))?.trim();
        if !line.is_empty() {
            lines.push((index + 1, line.to_string()));
        }
    }
    Ok(lines)
}

/// The string under `key` of the JSON object in `line`.
pub fn json_string(line: &str, key: &str) -> Result<String> {
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| anyhow!("not JSON: {e}"))?;
    let Some(object) = value.as_object() else { bail!("not a JSON object") };
    match object.get(key) {
        Some(serde_json::Value::String(text)) => Ok(text.clone()),
        Some(other) => bail!("{key:?} is not a string but {other}"),
        None => bail!("there is no {key:?}; keys are {}", object.keys().cloned().collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mutations::mutate, word_list::WordList};

    #[test]
    fn lines_with_their_numbers() {
        let lines = lines_of(b"\xef\xbb\xbfone \r\n\n  two").unwrap();
        assert_eq!(lines, [(1, "one".to_string()), (3, "two".to_string())]);
        assert!(lines_of(b"fine\nb\xffd\n").unwrap_err().to_string().contains("line 2 is not UTF-8"));
        assert!(lines_of(b"").unwrap().is_empty());
    }

    #[test]
    fn json_mistakes_are_named() {
        assert_eq!(json_string(r#"{"a": 1, "prompt": "x"}"#, "prompt").unwrap(), "x");
        for (line, wanted) in [
            ("{", "not JSON"),
            ("[1]", "not a JSON object"),
            (r#"{"text": "x", "n": 1}"#, "keys are text, n"),
            (r#"{"prompt": 3}"#, "not a string but 3"),
        ] {
            let e = json_string(line, "prompt").unwrap_err().to_string();
            assert!(e.contains(wanted), "{line}: {e}");
        }
    }

    fn mutate_texts(rounds: usize) {
        let good = ["one\ntwo \u{e9}\n\n", "{\"prompt\": \"a \\u00e9 cat\", \"n\": [1, {}]}\n{\"prompt\": \"x\"}"];
        mutate(&good.map(|text| text.as_bytes().to_vec()), rounds, |bytes| {
            for (number, line) in lines_of(bytes).unwrap_or_default() {
                assert!(number > 0 && !line.is_empty());
                let _ = json_string(&line, "prompt");
                WordList::new([line.as_str()]).matches(&line);
            }
        });
    }

    #[test]
    fn mutated_texts_never_panic() {
        mutate_texts(5000);
    }

    #[test]
    #[ignore = "200,000 mutated texts"]
    fn many_mutated_texts_never_panic() {
        mutate_texts(200_000);
    }
}
