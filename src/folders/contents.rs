//! What is in a folder, and whether it is a run's.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};

use super::{owner::Owner, places::can_be_folder};
use crate::{store, telemetry::RunFiles};

/// The lock of a folder that is in use.
pub const LOCK: &str = "rldiff.lock";

/// What a run finds where its results are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// No folder yet, or an empty one.
    Free,
    /// An earlier run's folder, or this one's.
    Run,
}

impl Place {
    /// # Errors
    /// Something else is there; the line says what.
    pub fn of_run(root: &Path) -> Result<Self> {
        can_be_folder(root)?;
        let Some(first) = first_entry(root)? else { return Ok(Place::Free) };
        if is_run(root) {
            return Ok(Place::Run);
        }
        let shown = root.display();
        let inside = fs::read_dir(root)?.flatten().map(|entry| entry.path()).find(|path| path.is_dir() && is_run(path));
        match inside {
            Some(run) => bail!(
                "{shown} is no run's folder but one of runs ({}): give another folder for the results (--out)",
                run.display()
            ),
            None => bail!(
                "{shown} is not empty and no run's folder ({} is in it): give another folder for the results (--out)",
                Path::new(&first).display()
            ),
        }
    }
}

/// Whether `name`, the value of `key`, can be a folder's name of its own.
///
/// # Errors
/// It has slashes or characters that cannot be seen, is nothing but dots, begins with ~, or is too long.
pub fn check_name(key: &str, name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && !name.contains('/')
        && !name.chars().any(char::is_control)
        && name.trim() == name
        && !name.chars().all(|c| c == '.')
        && !name.starts_with('~');
    ensure!(plain, "{key} {name:?} must be a plain folder name");
    ensure!(name.len() <= 200, "{key} has {} bytes, a folder's name at most 200", name.len());
    Ok(())
}

/// Whether an entry counts as nothing: a lock and what belongs to it, what NFS leaves of files in use, and the folder of
/// every new file system.
fn counts_as_nothing(name: &str) -> bool {
    name == LOCK || name.starts_with(".rldiff.lock.") || name.starts_with(".nfs") || name == "lost+found"
}

/// The entry of `folder` that comes first in order; None where it is empty or not there.
pub fn first_entry(folder: &Path) -> Result<Option<OsString>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", folder.display())),
    };
    let names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
    let names = names.with_context(|| format!("cannot read {}", folder.display()))?;
    Ok(names.into_iter().filter(|name| !counts_as_nothing(&name.to_string_lossy())).min())
}

/// Whether `folder` is empty or holds an entry that `is_own` knows by its name as one of the command's.
///
/// # Errors
/// Names the first of what is there instead.
pub fn can_take(folder: &Path, is_own: impl Fn(&str) -> bool) -> Result<()> {
    can_be_folder(folder)?;
    match first_entry(folder)? {
        Some(first) if !names(folder).iter().any(|name| is_own(name)) => bail!(
            "{} is not empty ({} is in it) and was not written by this command: give another --out",
            folder.display(),
            Path::new(&first).display()
        ),
        _ => Ok(()),
    }
}

/// Whether a run has written `root`: its config, metrics and event files are there; or nothing is there but what a run
/// writes, and a part of it that only a run writes, where it was killed before it had all of them.
pub fn is_run(root: &Path) -> bool {
    let files = RunFiles::new(root);
    let config = fs::read(files.config()).is_ok_and(|bytes| is_run_config(&bytes));
    let events = names(&files.tensorboard()).iter().any(|name| name.starts_with("events.out.tfevents."));
    if config && events && is_metrics(&files.metrics()) {
        return true;
    }
    let begun = || {
        let lock = fs::read(root.join(LOCK)).ok().and_then(|bytes| Owner::parse(&bytes));
        lock.is_some_and(|owner| owner.command == "train")
            || config && files.watch().is_dir() && files.tensorboard().is_dir()
            || store::checkpoint::is_any(&files.checkpoints())
    };
    names(root).iter().all(|name| RunFiles::NAMES.contains(&name.as_str())) && begun()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !counts_as_nothing(name)).collect()
}

/// A training config of any version, as a run saves it.
pub fn is_run_config(bytes: &[u8]) -> bool {
    let table = std::str::from_utf8(bytes).ok().and_then(|text| text.parse::<toml::Table>().ok());
    table.is_some_and(|table| {
        let run = table.get("run").and_then(toml::Value::as_table);
        run.is_some_and(|run| run.contains_key("name") && run.contains_key("iterations"))
            && table.contains_key("model")
            && table.contains_key("task")
    })
}

/// Lines with iterations, or none yet.
fn is_metrics(path: &Path) -> bool {
    let Ok(text) = fs::read_to_string(path) else { return false };
    let first = text.lines().next().unwrap_or("{\"iteration\": 0}");
    serde_json::from_str::<serde_json::Value>(first).is_ok_and(|line| line.get("iteration").is_some())
}

/// Whether the run's folder `root` can be given another name without anything that is needed going with it. `needed` are
/// paths, each with what it is.
///
/// # Errors
/// A needed path lies inside, the command was started from inside, or a file system is mounted there.
pub fn set_aside_is_safe(root: &Path, needed: &[(String, PathBuf)]) -> Result<()> {
    let shown = root.display();
    let why = "an earlier run is there, which would be set aside";
    let real = fs::canonicalize(root).with_context(|| format!("cannot use {shown}"))?;
    for (what, path) in needed {
        if fs::canonicalize(path).is_ok_and(|path| path.starts_with(&real)) {
            bail!("{what} = {} lies in {shown}: {why}; give another folder for the results (--out)", path.display());
        }
    }
    if std::env::current_dir().is_ok_and(|here| here.starts_with(&real)) {
        bail!("{shown}: {why}, together with the folder this command was started from; go on with --resume auto, or start it from elsewhere");
    }
    let device = |path: &Path| fs::metadata(path).map(|there| there.dev());
    if real.parent().is_none_or(|parent| device(parent).ok() != device(&real).ok()) {
        bail!(
            "{shown}: {why}, but a file system is mounted there; go on with --resume auto, or give a folder inside it"
        );
    }
    Ok(())
}

/// All texts of a config that name something that exists, with their keys.
pub fn paths_of(config: &toml::Value) -> Vec<(String, PathBuf)> {
    fn walk(key: &str, value: &toml::Value, found: &mut Vec<(String, PathBuf)>) {
        match value {
            toml::Value::String(text) if !text.is_empty() && Path::new(text).exists() => {
                found.push((key.to_owned(), PathBuf::from(text)));
            }
            toml::Value::Array(values) => values.iter().for_each(|value| walk(key, value, found)),
            toml::Value::Table(table) => table.iter().for_each(|(part, value)| {
                let inside = if key.is_empty() { part.clone() } else { format!("{key}.{part}") };
                walk(&inside, value, found);
            }),
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk("", config, &mut found);
    // names, which may be those of folders by chance
    found.retain(|(key, _)| !key.ends_with("name"));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders() {
        let long = "x".repeat(201);
        for bad in ["", ".", "..", "...", "a/b", "/etc", " a", "a ", "a\nb", "a\0b", "~", "~root", "\t", &long] {
            let error = check_name("run.name", bad).unwrap_err().to_string();
            assert!(error.starts_with("run.name"), "{bad:?}: {error}");
        }
        for good in ["joint", "a b", "müller-2", ".hidden", "a..b", "-x", &"x".repeat(200)] {
            check_name("run.name", good).unwrap();
        }
    }

    #[test]
    fn a_folder_is_taken_where_it_is_empty_or_has_something_of_ones_own() {
        let folder = tempfile::tempdir().unwrap();
        let own = |name: &str| name.starts_with("pairs-");
        can_take(&folder.path().join("new"), own).unwrap();
        can_take(folder.path(), own).unwrap();
        fs::write(folder.path().join("a.jpg"), b"").unwrap();
        let error = can_take(folder.path(), own).unwrap_err().to_string();
        assert!(error.contains("is not empty (a.jpg is in it)"), "{error}");
        fs::write(folder.path().join("pairs-00000.h5"), b"").unwrap();
        can_take(folder.path(), own).unwrap();
    }

    /// A folder that looks like a run's.
    fn run_at(root: &Path) {
        let files = RunFiles::new(root);
        files.create().unwrap();
        let config = "[run]\nname = 'a'\niterations = 2\n[model]\npath = 'embedded'\n[[task]]\nname = 'x'\n";
        fs::write(files.config(), config).unwrap();
        fs::write(files.metrics(), "{\"iteration\":0}\n").unwrap();
        fs::write(files.tensorboard().join("events.out.tfevents.1.host"), b"").unwrap();
    }

    #[test]
    fn only_what_a_run_wrote_is_a_runs_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs/a");
        assert_eq!(Place::of_run(&root).unwrap(), Place::Free);
        fs::create_dir_all(&root).unwrap();
        assert_eq!(Place::of_run(&root).unwrap(), Place::Free);
        fs::create_dir(root.join("lost+found")).unwrap();
        assert_eq!(Place::of_run(&root).unwrap(), Place::Free);
        run_at(&root);
        assert_eq!(Place::of_run(&root).unwrap(), Place::Run);
        // what its owner puts there belongs to it
        fs::write(root.join("notes.txt"), b"mine").unwrap();
        assert_eq!(Place::of_run(&root).unwrap(), Place::Run);
        let error = Place::of_run(&folder.path().join("runs")).unwrap_err().to_string();
        assert!(error.contains("runs/a") && error.contains("one of runs"), "{error}");
        // a project's folder with a config to start runs with
        for missing in ["metrics.jsonl", "config.toml", "tensorboard"] {
            let other = folder.path().join(format!("without-{missing}"));
            run_at(&other);
            fs::write(other.join("holiday.jpg"), b"mine").unwrap();
            let path = other.join(missing);
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap()
            } else {
                fs::remove_file(path).unwrap()
            }
            let error = Place::of_run(&other).unwrap_err().to_string();
            assert!(error.contains("is not empty and no run's folder"), "{missing}: {error}");
        }
        // killed before the metrics were there
        let begun = folder.path().join("begun");
        run_at(&begun);
        fs::remove_file(begun.join("metrics.jsonl")).unwrap();
        assert!(Place::of_run(&begun).is_err());
        fs::create_dir(begun.join("watch")).unwrap();
        assert_eq!(Place::of_run(&begun).unwrap(), Place::Run);
    }

    #[test]
    fn what_is_needed_is_not_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("a");
        run_at(&root);
        let needed = |path: PathBuf| [("model.path".to_owned(), path)];
        set_aside_is_safe(&root, &needed(folder.path().join("b"))).unwrap();
        for path in [root.clone(), root.join("tensorboard"), root.join("../a/config.toml")] {
            let error = set_aside_is_safe(&root, &needed(path)).unwrap_err().to_string();
            assert!(error.starts_with("model.path = ") && error.contains("lies in"), "{error}");
        }
        let config =
            format!("[model]\npath = '{0}'\n[[task]]\nname = '{0}'\nprompts = {{ path = '{0}' }}\n", root.display());
        let found = paths_of(&toml::from_str(&config).unwrap());
        let keys: Vec<&str> = found.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["model.path", "task.prompts.path"]);
    }
}
