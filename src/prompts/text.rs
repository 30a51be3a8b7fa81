//! Prompts from a text file: one per line, or JSON lines with the prompt under a key.

use std::path::Path;

use anyhow::{Context, Result};

use super::listed::Texts;
use crate::{config::TextPrompts, text_file, word_list::WordList};

/// # Errors
/// A file that cannot be read, has a line that is not UTF-8 or lacks the key (it is named).
pub fn load(settings: &TextPrompts) -> Result<Texts> {
    let drop = WordList::load(&settings.drop_words)?;
    let path = Path::new(&settings.path);
    let mut texts = Texts::default();
    for (number, line) in text_file::lines(path)? {
        let prompt = if settings.key.is_empty() {
            line
        } else {
            let at_line = || format!("{}: line {number}", path.display());
            text_file::json_string(&line, &settings.key).with_context(at_line)?.trim().to_string()
        };
        if !prompt.is_empty() && !drop.matches(&prompt) {
            texts.insert(&prompt);
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::{listed::Listed, shared_texts::Store, PromptSource, Split};

    fn settings(text: &[u8], key: &str) -> (tempfile::TempDir, TextPrompts) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts");
        std::fs::write(&path, text).unwrap();
        let path = path.display().to_string();
        (folder, TextPrompts { path, key: key.into(), held_out: 0, split_seed: 1, drop_words: String::new() })
    }

    fn source(settings: &TextPrompts) -> Result<Listed> {
        Listed::new(Store::Own(load(settings)?), settings.held_out, settings.split_seed)
    }

    fn prompts(text: &[u8], key: &str) -> Result<Vec<String>> {
        let (_folder, settings) = settings(text, key);
        let source = source(&settings)?;
        Ok((0..source.len(Split::Train)).map(|i| source.prompt(Split::Train, i).text).collect())
    }

    #[test]
    fn lines_and_json_lines() {
        assert_eq!(prompts(b"a cat\n\n a dog \r\na cat\nthe last", "").unwrap(), ["a cat", "a dog", "the last"]);
        let json = br#"{"tag": "x", "prompt": "a \"cat\""}
{"prompt": "a dog"}"#;
        assert_eq!(prompts(json, "prompt").unwrap(), ["a \"cat\"", "a dog"]);
    }

    #[test]
    fn a_bad_file_is_one_line_that_says_where() {
        for (text, key, wanted) in [
            (&b"ok\n\xff\n"[..], "", "line 2 is not UTF-8"),
            (b"{\"prompt\": \"x\"}\n{\"text\": 1}", "prompt", "line 2: there is no \"prompt\"; keys are text"),
            (b"plain", "prompt", "line 1: not JSON"),
        ] {
            let e = format!("{:#}", prompts(text, key).unwrap_err());
            assert!(e.contains(wanted) && e.contains("prompts") && !e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn words_to_drop() {
        let (folder, mut settings) = settings(b"a red cat\na dog\n", "");
        std::fs::write(folder.path().join("words"), "RED\n").unwrap();
        settings.drop_words = folder.path().join("words").display().to_string();
        assert_eq!(source(&settings).unwrap().len(Split::Train), 1);
    }
}
