//! Files that a command writes at a place that its user names: what rldiff itself wrote there is replaced, nothing else.

use std::{fs, path::Path};

use anyhow::{bail, Context, Result};
use serde_json::Value;

use super::places::can_be_folder;
use crate::telemetry::png_text;

/// Whether `path` may be written: nothing is there, or a file that `is_ours` knows by its content.
///
/// # Errors
/// Something else is in the way.
pub fn may_replace(path: &Path, is_ours: impl Fn(&[u8]) -> bool) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(_) => return path.parent().map_or(Ok(()), can_be_folder),
        Ok(there) if there.is_dir() => bail!("{shown} is a folder, where a file is to be written: give another name"),
        Ok(there) if there.is_symlink() && !path.exists() => bail!("{shown} is a symbolic link to nothing"),
        // a device, such as /dev/stdout, keeps nothing that could be lost
        Ok(_) if !path.is_file() => return Ok(()),
        Ok(_) => {}
    }
    let bytes = fs::read(path).with_context(|| format!("cannot read {shown}"))?;
    if bytes.is_empty() || is_ours(&bytes) {
        return Ok(());
    }
    bail!("{shown} is there and was not written by this command: give another name, or remove it")
}

/// JSON with these keys: an object, or a list that begins with one.
pub fn is_json_with<'a>(keys: &'a [&'a str]) -> impl Fn(&[u8]) -> bool + 'a {
    move |bytes| {
        let Ok(value) = serde_json::from_slice::<Value>(bytes) else { return false };
        let object = value.as_array().map_or(Some(&value), |list| list.first());
        object.is_some_and(|object| keys.iter().all(|key| object.get(key).is_some()))
    }
}

/// A PNG that says who made it: `software` begins with rldiff.
pub fn is_own_png(bytes: &[u8]) -> bool {
    png_has(bytes, "software", |text| text.starts_with("rldiff"))
}

/// A PNG with a text of this keyword that `holds`.
pub fn png_has(bytes: &[u8], keyword: &str, holds: impl Fn(&str) -> bool) -> bool {
    png_text(std::io::Cursor::new(bytes))
        .is_ok_and(|text| text.iter().any(|(key, value)| key == keyword && holds(value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{save_png, Picture};

    #[test]
    fn only_what_is_known_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let ours = is_json_with(&["reward", "mean"]);
        may_replace(&at("new.json"), &ours).unwrap();
        fs::write(at("ours.json"), br#"{"reward": "x", "mean": 1.0, "more": 2}"#).unwrap();
        fs::write(at("list.json"), br#"[{"reward": "x", "mean": 1.0}]"#).unwrap();
        fs::write(at("empty.json"), b"").unwrap();
        for name in ["ours.json", "list.json", "empty.json"] {
            may_replace(&at(name), &ours).unwrap();
        }
        fs::write(at("theirs.json"), br#"{"reward": "x"}"#).unwrap();
        fs::write(at("photo.jpg"), b"\xff\xd8\xff").unwrap();
        fs::create_dir(at("folder")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        for (name, wanted) in [
            ("theirs.json", "was not written by this command"),
            ("photo.jpg", "was not written by this command"),
            ("folder", "is a folder"),
            ("dangling", "symbolic link to nothing"),
            ("photo.jpg/x", "is not a folder"),
        ] {
            let error = format!("{:#}", may_replace(&at(name), &ours).unwrap_err());
            assert!(error.contains(wanted), "{name}: {error}");
        }
        may_replace(Path::new("/dev/null"), &ours).unwrap();
    }

    #[test]
    fn pictures_are_known_by_their_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let picture = Picture::from_fn(2, 2, |_, _| [1, 2, 3]);
        for (text, ours) in [
            (vec![("software".to_owned(), "rldiff 0.1".to_owned())], true),
            (vec![("software".to_owned(), "gimp".to_owned())], false),
            (vec![("Author".to_owned(), "rldiff".to_owned())], false),
            (vec![], false),
        ] {
            save_png(&path, &picture, &text).unwrap();
            assert_eq!(is_own_png(&fs::read(&path).unwrap()), ours, "{text:?}");
        }
        assert!(!is_own_png(b"no picture"));
    }
}
