//! Text files that a user gives: lines and JSON lines, with the line named where something is wrong.

use std::path::Path;

use anyhow::{anyhow, bail, Context, Result};
use serde_json::{Map, Value};

use crate::python_json::{self, shown};

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

/// The JSON object in a line.
pub struct JsonLine(Map<String, Value>);

impl JsonLine {
    pub fn parse(line: &str) -> Result<Self> {
        match python_json::parse(line.as_bytes()).map_err(|e| anyhow!("{e}"))? {
            Value::Object(object) => Ok(JsonLine(object)),
            _ => bail!("not a JSON object"),
        }
    }

    /// The string under `key`.
    pub fn string(&self, key: &str) -> Result<&str> {
        let value = self.value(key)?;
        value.as_str().with_context(|| format!("{key:?} is not a string but {}", shown(value)))
    }

    /// The list of strings under `key`.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let value = self.value(key)?;
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        strings.with_context(|| format!("{key:?} is not a list of strings but {value}"))
    }

    fn value(&self, key: &str) -> Result<&Value> {
        let keys = || self.0.keys().cloned().collect::<Vec<_>>().join(", ");
        self.0.get(key).with_context(|| format!("there is no {key:?}; keys are {}", keys()))
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
        let line = JsonLine::parse(r#"{"a": 1, "prompt": "x", "objects": ["y", "z"]}"#).unwrap();
        assert_eq!((line.string("prompt").unwrap(), line.strings("objects").unwrap()), ("x", vec!["y", "z"]));
        for wrong in ["\"y\"", "[\"y\", 3]", "{}"] {
            let line = JsonLine::parse(&format!("{{\"objects\": {wrong}}}")).unwrap();
            let e = line.strings("objects").unwrap_err().to_string();
            assert!(e.contains("\"objects\" is not a list of strings but"), "{e}");
        }
        for (line, wanted) in [
            ("{", "not JSON"),
            ("[1]", "not a JSON object"),
            (r#"{"text": "x", "n": 1}"#, "keys are text, n"),
            (r#"{"prompt": 3}"#, "not a string but 3"),
        ] {
            let parsed = JsonLine::parse(line).and_then(|line| line.string("prompt").map(String::from));
            let e = parsed.unwrap_err().to_string();
            assert!(e.contains(wanted), "{line}: {e}");
        }
    }

    fn mutate_texts(rounds: usize) {
        let good = ["one\ntwo \u{e9}\n\n", "{\"prompt\": \"a \\u00e9 cat\", \"n\": [1, {}]}\n{\"prompt\": \"x\"}"];
        mutate(&good.map(|text| text.as_bytes().to_vec()), rounds, |bytes| {
            for (number, line) in lines_of(bytes).unwrap_or_default() {
                assert!(number > 0 && !line.is_empty());
                let _ = JsonLine::parse(&line).map(|line| line.string("prompt").map(String::from));
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
