//! Text files that a user gives: lines and JSON lines, with the line named where something is wrong.

use std::path::Path;

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde_json::{Map, Value};

use crate::{
    excerpt::{one_line, quoted, IN_MESSAGES},
    python_json::{self, shown},
    user_file,
};

/// No prompt is longer, in bytes: what is, is a file that was taken for a line.
pub const LONGEST_PROMPT: usize = 1 << 20;

/// The lines of a text.
#[derive(Debug, Default, PartialEq)]
pub struct Lines {
    /// Those that are not blank, trimmed, with their number (from 1).
    pub lines: Vec<(usize, String)>,
    /// How many are blank.
    pub blank: usize,
}

/// Lines that are not blank, trimmed, with their number (from 1). A byte-order mark at the beginning is skipped.
///
/// # Errors
/// As [`read`].
pub fn lines(path: &Path) -> Result<Vec<(usize, String)>> {
    Ok(read(path)?.lines)
}

/// The lines of a file. Lines end with LF, CR LF or CR, as in Python.
///
/// # Errors
/// A file that cannot be read or is no text, a line that is not UTF-8 or holds a NUL character or more than
/// [`LONGEST_PROMPT`] bytes.
pub fn read(path: &Path) -> Result<Lines> {
    lines_of(&bytes(path)?).with_context(|| path.display().to_string())
}

/// The bytes of a text file without its byte-order mark.
///
/// # Errors
/// A file that cannot be read, or that is something else than text ([`what_it_is`]).
pub fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = user_file::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if let Some(what) = what_it_is(&bytes) {
        bail!("{} is {what}", path.display());
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(bytes)
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What a file is that begins like this and is no text in UTF-8, and what to do about it.
pub fn what_it_is(bytes: &[u8]) -> Option<&'static str> {
    const KNOWN: [(&[u8], &str); 11] = [
        (b"\xff\xfe", "in UTF-16, UTF-8 is wanted: save it as UTF-8"),
        (b"\xfe\xff", "in UTF-16, UTF-8 is wanted: save it as UTF-8"),
        (b"\x1f\x8b", "compressed (gzip): unpack it first"),
        (b"BZh9", "compressed (bzip2): unpack it first"),
        (b"\xfd7zXZ\0", "compressed (xz): unpack it first"),
        (b"\x28\xb5\x2f\xfd", "compressed (zstd): unpack it first"),
        (b"PK\x03\x04", "a ZIP archive (a spreadsheet is one, too): unpack it, or save it as text, first"),
        (b"PAR1", "a parquet file, not text: source = \"parquet\" reads it"),
        (b"\x89PNG", "a picture, not text"),
        (b"\x89HDF", "an HDF5 file, not text"),
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"),
    ];
    if let Some((_, what)) = KNOWN.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Some(what);
    }
    let start = bytes.trim_ascii_start();
    let begins = |tag: &str| start.len() >= tag.len() && start[..tag.len()].eq_ignore_ascii_case(tag.as_bytes());
    let page = ["<!doctype html", "<html"].into_iter().any(begins);
    page.then_some("a web page, not text: the link to the raw file was not used when it was fetched")
}

/// As [`read`], of bytes.
pub fn lines_of(bytes: &[u8]) -> Result<Lines> {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes);
    let mut found = Lines::default();
    let mut rest = bytes;
    for number in 1.. {
        if rest.is_empty() {
            break;
        }
        let end = rest.iter().position(|&b| b == b'\n' || b == b'\r').unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        rest = after.strip_prefix(b"\r\n").or(after.get(1..)).unwrap_or_default();
        let line = as_text(line).map_err(|what| anyhow!("line {number} {what}"))?.trim();
        if line.is_empty() {
            found.blank += 1;
        } else {
            found.lines.push((number, line.to_string()));
        }
    }
    Ok(found)
}

/// A line, or the field of a row, that may become a prompt.
///
/// # Errors
/// It is not UTF-8, holds a NUL character, or has more than [`LONGEST_PROMPT`] bytes: a sentence without its subject.
pub fn as_text(bytes: &[u8]) -> Result<&str> {
    let text = std::str::from_utf8(bytes).map_err(|_| anyhow!("is not UTF-8"))?;
    ensure!(!text.contains('\0'), "holds a NUL character: the file is binary, or not in UTF-8");
    ensure!(
        bytes.len() <= LONGEST_PROMPT,
        "has {} bytes, no prompt has more than {LONGEST_PROMPT}; it begins {}",
        bytes.len(),
        quoted(text, IN_MESSAGES)
    );
    Ok(text)
}

/// The JSON object in a line.
pub struct JsonLine(Map<String, Value>);

impl JsonLine {
    pub fn parse(line: &str) -> Result<Self> {
        match python_json::parse(line.as_bytes()) {
            Ok(Value::Object(object)) => Ok(JsonLine(object)),
            Ok(Value::Array(_)) => bail!("a JSON array, not a JSON object: one object per line is wanted"),
            Ok(_) => bail!("not a JSON object"),
            Err(e) if ends_early(line) => {
                bail!("{}: the object must begin and end in this line, which begins {}", of_line(&e), start(line))
            }
            Err(e) => bail!("{}; the line begins {}", of_line(&e), start(line)),
        }
    }

    /// The string under `key`.
    pub fn string(&self, key: &str) -> Result<&str> {
        let value = self.value(key)?;
        value.as_str().with_context(|| format!("{key:?} is not a string but {}", one_line(&shown(value), IN_MESSAGES)))
    }

    /// The list of strings under `key`.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let value = self.value(key)?;
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        strings
            .with_context(|| format!("{key:?} is not a list of strings but {}", one_line(&shown(value), IN_MESSAGES)))
    }

    fn value(&self, key: &str) -> Result<&Value> {
        let keys = || one_line(&self.0.keys().cloned().collect::<Vec<_>>().join(", "), 2 * IN_MESSAGES);
        self.0.get(key).with_context(|| format!("there is no {key:?}; keys are {}", keys()))
    }
}

/// What [`python_json`] says of a file, without its verb.
fn of_line(error: &anyhow::Error) -> String {
    let text = error.to_string();
    text.strip_prefix("is ").unwrap_or(&text).to_string()
}

/// Whether JSON is only cut off.
fn ends_early(line: &str) -> bool {
    serde_json::from_str::<Value>(line).is_err_and(|e| e.is_eof())
}

/// The beginning of a line in errors.
fn start(line: &str) -> String {
    quoted(line, 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mutations::mutate, word_list::WordList};

    #[test]
    fn lines_with_their_numbers() {
        let lines = lines_of(b"\xef\xbb\xbfone \r\n\n  two").unwrap();
        assert_eq!((lines.lines, lines.blank), (vec![(1, "one".to_string()), (3, "two".to_string())], 1));
        assert_eq!(lines_of(b"").unwrap(), Lines::default());
        // as old Macs wrote them, and all kinds at once
        for text in [&b"a\rb\r\rc"[..], b"a\r\nb\n\nc\r\n", b"a\nb\r\n\rc\r"] {
            let found = lines_of(text).unwrap();
            let expected = [(1, "a".to_string()), (2, "b".to_string()), (4, "c".to_string())];
            assert_eq!((&found.lines[..], found.blank), (&expected[..], 1), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_line_of_text_is_named() {
        let long = [b"x\n".as_slice(), &b"word ".repeat(400_000)].concat();
        for (bytes, wanted) in [
            (&b"fine\nb\xffd\n"[..], "line 2 is not UTF-8"),
            (b"fine\na\0 \0c\0", "line 2 holds a NUL character"),
            (&long, "line 2 has 2000000 bytes, no prompt has more than 1048576; it begins \"word word"),
        ] {
            let e = format!("{:#}", lines_of(bytes).unwrap_err());
            assert!(e.contains(wanted) && e.len() < 300, "{e}");
        }
    }

    #[test]
    fn files_that_are_no_text_are_called_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.csv");
        for (bytes, wanted) in [
            (&b"\xff\xfea\0"[..], "is in UTF-16"),
            (b"\x1f\x8b\x08", "is compressed (gzip)"),
            (b"PAR1x", "source = \"parquet\" reads it"),
            (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
            (b"\n <!DOCTYPE HTML><html>", "is a web page"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let e = format!("{:#}", super::bytes(&path).unwrap_err());
            assert!(e.contains(wanted) && e.contains("prompts.csv"), "{e}");
        }
        let e = format!("{:#}", super::bytes(folder.path()).unwrap_err());
        assert!(e.contains("cannot read") && e.contains("directory"), "{e}");
        std::fs::write(&path, b"\xef\xbb\xbfx").unwrap();
        assert_eq!(super::bytes(&path).unwrap(), b"x");
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
            ("{", "the object must begin and end in this line"),
            ("{\"prompt\": \"x", "the object must begin and end in this line, which begins"),
            (r#"{"prompt": "x"} {"prompt": "y"}"#, "not JSON: trailing characters"),
            (r#"{"prompt": NaN}"#, "not a string but NaN"),
            ("[1]", "a JSON array, not a JSON object: one object per line is wanted"),
            ("1", "not a JSON object"),
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
            for (number, line) in lines_of(bytes).unwrap_or_default().lines {
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
