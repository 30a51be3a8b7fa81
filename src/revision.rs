//! Which commit a build is of, asked of git where the sources lie in a checkout. `build.rs` makes [`crate::CODE_VERSION`]
//! of it. What has been changed since that commit it does not know.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The commit of a checkout, and what must be watched to notice another one.
#[derive(Debug, PartialEq)]
pub struct Revision {
    /// The first 10 hexadecimal digits of the commit; more where they would be ambiguous.
    pub hash: String,
    /// Files of git that exist and of which at least one changes with the commit. (Cargo builds again and again for a
    /// file that does not exist.)
    pub watched: Vec<PathBuf>,
}

/// The revision of the checkout whose top level is `folder`; none where there is no git, no commit, or where `folder` only
/// lies somewhere below another project's checkout.
pub fn of_checkout(folder: &Path) -> Option<Revision> {
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        // set inside git's hooks, for another folder perhaps
        command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env_remove("GIT_INDEX_FILE");
        let done = command.args(args).current_dir(folder).output().ok()?;
        let text = String::from_utf8(done.stdout).ok()?;
        done.status.success().then(|| text.trim().to_string())
    };
    if !git(&["rev-parse", "--show-prefix"])?.is_empty() {
        return None;
    }
    let hash = git(&["rev-parse", "--short=10", "HEAD"])?;
    // in a worktree .git is a file, and HEAD lies elsewhere
    let existing = |name: &str| {
        let path = folder.join(git(&["rev-parse", "--git-path", name])?);
        path.is_file().then_some(path)
    };
    // of a branch; a detached HEAD holds the commit itself
    let branch = git(&["symbolic-ref", "--quiet", "HEAD"]);
    let reference = branch.and_then(|name| existing(&name).or_else(|| existing("packed-refs")));
    // the log also tells of the first commit on a branch that has only been in packed-refs
    let watched = [existing("HEAD"), existing("logs/HEAD"), reference].into_iter().flatten().collect();
    Some(Revision { hash, watched })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(folder: &Path, args: &[&str]) -> String {
        let identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"];
        let done = Command::new("git").args(identity).args(args).current_dir(folder).output().unwrap();
        assert!(done.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().trim().to_string()
    }

    fn commit(folder: &Path) -> String {
        git(folder, &["commit", "--quiet", "--allow-empty", "--message", "another"]);
        git(folder, &["rev-parse", "HEAD"])
    }

    /// What cargo looks at.
    fn state(files: &[PathBuf]) -> Vec<Vec<u8>> {
        assert!(!files.is_empty());
        files.iter().map(|file| std::fs::read(file).unwrap()).collect()
    }

    #[test]
    fn every_commit_is_noticed() {
        if Command::new("git").arg("--version").output().is_err() {
            eprintln!("SKIPPED: there is no git");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (main, worktree) = (folder.path().join("main"), folder.path().join("worktree"));
        std::fs::create_dir_all(main.join("below")).unwrap();
        assert_eq!(of_checkout(folder.path()), None, "no git");
        git(&main, &["init", "--quiet"]);
        assert_eq!(of_checkout(&main), None, "no commit");
        commit(&main);
        git(&main, &["worktree", "add", "--quiet", "-b", "other", worktree.to_str().unwrap()]);
        assert_eq!(of_checkout(&main.join("below")), None, "another project's checkout");

        for place in [&main, &worktree] {
            for prepare in [&["status"][..], &["pack-refs", "--all"], &["checkout", "--quiet", "--detach"]] {
                git(place, prepare);
                let before = of_checkout(place).unwrap();
                let seen = state(&before.watched);
                git(place, &["status"]);
                assert_eq!(
                    (of_checkout(place).unwrap(), state(&before.watched)),
                    (before, seen),
                    "nothing has changed"
                );
                let seen = state(&of_checkout(place).unwrap().watched);
                let old = of_checkout(place).unwrap();
                let hash = commit(place);
                let new = of_checkout(place).unwrap();
                assert!(hash.starts_with(&new.hash) && new.hash.len() >= 10 && new.hash != old.hash, "{new:?}, {hash}");
                assert_ne!(state(&old.watched), seen, "{place:?}, {prepare:?}: a commit goes unnoticed");
            }
        }
    }
}
