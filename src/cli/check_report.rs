//! What `rldiff check` says: lines for people, and whether the run can start.

use anyhow::{ensure, Result};

use crate::config::needs::{self, Missing, Need};

/// What a check says of a config, and what stands in the run's way.
pub struct Report {
    name: String,
    /// What was not looked at, if anything.
    pub closed: Option<&'static str>,
    pub missing: Vec<Missing>,
    wrong: Vec<String>,
    lines: Vec<String>,
}

impl Report {
    pub fn new(name: &str, with_files: bool) -> Self {
        let closed = (!with_files).then_some("its files were not looked at");
        Report { name: name.to_string(), closed, missing: Vec::new(), wrong: Vec::new(), lines: Vec::new() }
    }

    pub fn line(&mut self, name: &str, value: impl AsRef<str>) {
        self.lines.push(format!("{name:<26} {}", value.as_ref()));
    }

    /// Looks for what a config names, and says whether all of it is here.
    pub fn look_for(&mut self, needs: &[Need]) -> bool {
        let missing = needs::missing(needs);
        let new: Vec<Missing> =
            missing.iter().filter(|m| self.missing.iter().all(|old| old.what != m.what)).cloned().collect();
        self.missing.extend(new);
        missing.is_empty()
    }

    /// Takes down what is wrong; gives what is not.
    pub fn keep<T>(&mut self, found: Result<T>) -> Option<T> {
        match found {
            Ok(found) => Some(found),
            Err(e) => {
                self.wrong.push(format!("{e:#}"));
                None
            }
        }
    }

    fn can_start(&self) -> bool {
        self.missing.is_empty() && self.wrong.is_empty()
    }

    pub fn text(&self) -> String {
        let verdict = match (self.can_start(), self.closed) {
            (true, None) => "is sound".to_string(),
            (true, Some(closed)) => format!("is valid; {closed}"),
            (false, _) => "cannot start here".to_string(),
        };
        let mut lines = vec![format!("{:<26} {} {verdict}", "config", self.name)];
        if !self.missing.is_empty() {
            let width = self.missing.iter().map(|m| m.key.len()).max().unwrap_or(0).max(24);
            lines.push(format!("{:<26} {}, the run cannot start here", "missing", self.missing.len()));
            lines.extend(self.missing.iter().map(|m| format!("  {:<width$} {}", m.key, m.what)));
        }
        lines.extend(self.wrong.iter().map(|wrong| format!("{:<26} {wrong}", "wrong")));
        [lines, self.lines.clone()].concat().join("\n")
    }

    /// # Errors
    /// All that stands in the run's way, in one line.
    pub fn verdict(&self) -> Result<()> {
        let missing = (!self.missing.is_empty()).then(|| needs::in_words(&self.missing));
        let all: Vec<String> = missing.into_iter().chain(self.wrong.iter().cloned()).collect();
        ensure!(self.can_start(), "{}: the run cannot start here: {}", self.name, all.join("; "));
        Ok(())
    }
}
