//! Prompts from a text file: one per line, or JSON lines with the prompt, and the objects that it names, under keys.

use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::{reading::Reading, Prompt};
use crate::{
    config::TextPrompts,
    text_file::{self, as_text, JsonLine},
    word_list::WordList,
};

/// # Errors
/// A file that cannot be read or is no text, has a line that cannot be a prompt or lacks a key (it is named); objects in
/// plain lines.
pub fn load(settings: &TextPrompts) -> Result<Reading> {
    let drop = WordList::load(&settings.drop_words)?;
    let path = Path::new(&settings.path);
    let mut reading = Reading::new(path, "line", &settings.drop_words);
    let found = text_file::read(path)?;
    if settings.key.is_empty() {
        warn_of_structure(path, &found.lines);
    }
    for _ in 0..found.blank {
        reading.leave_out(|counts| &mut counts.blank);
    }
    for (number, line) in found.lines {
        prompt(settings, line)
            .and_then(|prompt| reading.add(&prompt, &drop))
            .with_context(|| format!("{}: line {number}", path.display()))?;
    }
    Ok(reading)
}

/// Says where lines that are taken as they are look like something else.
fn warn_of_structure(path: &Path, lines: &[(usize, String)]) {
    let json = |line: &str| line == "[" || line == "{" || line.starts_with("{\"") || line.starts_with("[{");
    if lines.first().is_some_and(|(_, line)| json(line)) {
        log::warn!("{} looks like JSON, but key is \"\": its lines are taken as they are", path.display());
        return;
    }
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if ending == "csv" || ending == "tsv" {
        log::warn!("{}: source = \"text\" takes whole lines, not the columns of a table", path.display());
    }
}

fn prompt(settings: &TextPrompts, line: String) -> Result<Prompt> {
    if settings.key.is_empty() {
        ensure!(settings.objects_key.is_none(), "objects_key is for JSON lines, and key is empty");
        return Ok(Prompt { text: line, objects: Vec::new() });
    }
    let line = JsonLine::parse(&line)?;
    let objects = settings.objects_key.as_ref().map_or(Ok(Vec::new()), |key| line.strings(key))?;
    let text = line.string(&settings.key)?.trim();
    as_text(text.as_bytes()).with_context(|| format!("what is under {:?}", settings.key))?;
    Ok(Prompt { text: text.to_string(), objects: objects.into_iter().map(String::from).collect() })
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
        let none = String::new();
        (folder, TextPrompts { path, key: key.into(), objects_key: None, held_out: 0, split_seed: 1, drop_words: none })
    }

    fn source(settings: &TextPrompts) -> Result<Listed> {
        Listed::new(Store::Own(load(settings)?.end().0), settings.held_out, settings.split_seed)
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
    fn objects_come_with_their_prompts() {
        let lines = br#"{"prompt": "a cat on a mat", "objects": ["cat", "mat"]}
{"prompt": "a cat on a mat", "objects": ["cat"]}
{"prompt": "nothing", "objects": []}"#;
        let (_folder, mut settings) = settings(lines, "prompt");
        settings.objects_key = Some("objects".into());
        let source = source(&settings).unwrap();
        let prompts: Vec<Prompt> = (0..3).map(|i| source.prompt(Split::Train, i)).collect();
        let expected = [("a cat on a mat", vec!["cat", "mat"]), ("a cat on a mat", vec!["cat"]), ("nothing", vec![])];
        for (prompt, (text, objects)) in prompts.iter().zip(expected) {
            assert_eq!(
                (prompt.text.as_str(), &prompt.objects),
                (text, &objects.iter().map(|o| o.to_string()).collect())
            );
        }
        assert_eq!(source.objects(), ["cat", "mat"]);

        settings.objects_key = Some("things".into());
        let e = format!("{:#}", load(&settings).err().unwrap());
        assert!(e.contains("line 1: there is no \"things\"; keys are"), "{e}");
        settings.key = String::new();
        assert!(format!("{:#}", load(&settings).err().unwrap()).contains("objects_key is for JSON lines"));
        let (_folder, mut settings) = self::settings(br#"{"prompt": "x", "objects": [" "]}"#, "prompt");
        settings.objects_key = Some("objects".into());
        let e = format!("{:#}", load(&settings).err().unwrap());
        assert!(e.contains("line 1: an object without a name"), "{e}");
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
