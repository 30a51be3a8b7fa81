//! What raters get: a folder of static pages that needs neither a server nor the network.
//!
//! ```text
//! OUT/
//! ├── study.json        which model is on which side: not for raters
//! └── pages/
//!     ├── index.html, style.css, app.js
//!     ├── study.js      prompts, questions and file names (a script, since a page from disk may read no file)
//!     └── images/       <query>-<side>-<n>.png; neither name nor content says which model drew it
//! ```

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{bail, Result};
use serde_json::{json, Map, Value};

use super::{
    questions::Form,
    study::{Query, Study},
};
use crate::{
    cannot_write::make_folder,
    excerpt::bounded,
    folders::{can_be_folder, contents::first_entry},
    telemetry::write_atomic,
};

const INDEX: &str = include_str!("pages/index.html");
const STYLE: &str = include_str!("pages/style.css");
const APP: &str = include_str!("pages/app.js");

/// Bytes of a prompt on the pages; models read 77 tokens of it.
const LONGEST_PROMPT: usize = 4 << 10;

/// Where the files of a study lie.
#[derive(Clone, Debug)]
pub struct StudyFiles {
    root: PathBuf,
}

/// What is in a study's folder already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Absent,
    /// The same study, interrupted.
    Begun,
    Complete,
}

impl StudyFiles {
    pub fn new(root: &Path) -> Self {
        StudyFiles { root: root.to_path_buf() }
    }

    pub fn study(&self) -> PathBuf {
        self.root.join("study.json")
    }

    pub fn pages(&self) -> PathBuf {
        self.root.join("pages")
    }

    fn index(&self) -> PathBuf {
        self.pages().join("index.html")
    }

    /// # Errors
    /// If the folder holds anything but a study.
    pub fn check_place(&self) -> Result<()> {
        can_be_folder(&self.root)?;
        if !self.study().exists() && first_entry(&self.root)?.is_some() {
            bail!("{} is not empty: give another --out", self.root.display());
        }
        Ok(())
    }

    /// # Errors
    /// If the folder holds anything but this very study.
    pub fn state(&self, study: &Study) -> Result<State> {
        self.check_place()?;
        let root = self.root.display();
        if !self.study().exists() {
            return Ok(State::Absent);
        }
        if Study::read(&self.study())? != *study {
            bail!("{root} holds another study: give another --out");
        }
        Ok(if self.index().exists() { State::Complete } else { State::Begun })
    }

    /// Makes the folders and writes the key.
    pub fn begin(&self, study: &Study) -> Result<()> {
        let images = self.pages().join("images");
        make_folder(&images)?;
        study.write(&self.study())
    }

    /// Which files the pictures of `model` are, by the number of their noise.
    pub fn pictures(&self, study: &Study, model: usize) -> BTreeMap<usize, Picture> {
        let mut pictures: BTreeMap<usize, Picture> = BTreeMap::new();
        for query in &study.queries {
            for (side, of_side) in [("left", query.left), ("right", query.right)] {
                for n in (0..query.form.pictures()).filter(|_| of_side == model) {
                    let new = || Picture { prompt: query.prompt.clone(), files: Vec::new() };
                    let picture = pictures.entry(query.first_sample + n).or_insert_with(new);
                    picture.files.push(self.pages().join(image_path(query, side, n)));
                }
            }
        }
        pictures
    }

    /// Writes the pages; `index.html` last, since a folder that has it is complete. `size` is that of a picture.
    pub fn finish(&self, study: &Study, size: (usize, usize)) -> Result<()> {
        let pages = self.pages();
        write_atomic(&pages.join("study.js"), study_script(study, size).as_bytes())?;
        write_atomic(&pages.join("style.css"), STYLE.as_bytes())?;
        write_atomic(&pages.join("app.js"), APP.as_bytes())?;
        write_atomic(&self.index(), INDEX.as_bytes())
    }
}

/// A picture to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub prompt: String,
    /// One per query in which it is shown.
    pub files: Vec<PathBuf>,
}

fn image_path(query: &Query, side: &str, n: usize) -> String {
    format!("images/{}-{side}-{}.png", query.id, n + 1)
}

/// Everything the pages know, without the models.
fn study_script(study: &Study, (width, height): (usize, usize)) -> String {
    let forms: Map<String, Value> = Form::ALL
        .iter()
        .map(|form| (form.name().to_owned(), json!({"questions": form.questions(study.edition)})))
        .collect();
    let paths = |query: &Query, side| -> Vec<String> {
        (0..query.form.pictures()).map(|n| image_path(query, side, n)).collect()
    };
    let queries: Vec<Value> = study
        .queries
        .iter()
        .map(|query| {
            json!({
                "id": query.id, "form": query.form, "prompt": bounded(&query.prompt, LONGEST_PROMPT),
                "left": paths(query, "left"), "right": paths(query, "right"),
            })
        })
        .collect();
    let data = json!({
        "id": study.id(), "title": study.title, "votesFormat": super::votes::FORMAT,
        "width": width, "height": height, "forms": forms, "queries": queries,
    });
    format!("\"use strict\";\nwindow.RLDIFF_STUDY = {data};\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::human_eval::study::tests::example;

    #[test]
    fn nothing_that_raters_get_names_a_model() {
        let mut study = example(2, 4, 1);
        study.models[0].name = "secret-base".into();
        study.models[1].name = "secret-tuned".into();
        study.models[1].digest = "feedbeef".into();
        let script = study_script(&study, (32, 32));
        assert!(!script.contains("secret") && !script.contains("feedbeef"), "{script}");
        let data = script.split_once(" = ").unwrap().1.trim_end().trim_end_matches(';');
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["queries"].as_array().unwrap().len(), 5);
        assert_eq!(data["queries"][4]["left"].as_array().unwrap().len(), 6);
        assert_eq!(data["forms"]["pair"]["questions"].as_array().unwrap().len(), 3);
        assert_eq!(data["forms"]["pair"]["questions"][2]["answers"][3][0], "did_not_load");
    }

    #[test]
    fn every_side_of_every_query_is_drawn_by_its_model() {
        let study = example(3, 2, 1);
        let files = StudyFiles::new(Path::new("out"));
        let mut seen = BTreeMap::new();
        for model in 0..3 {
            for (sample, picture) in files.pictures(&study, model) {
                for file in picture.files {
                    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
                    assert!(seen.insert(name, (model, sample)).is_none());
                }
            }
        }
        // 3 meetings × (2 pairs + 1 group of 6) × 2 sides
        assert_eq!(seen.len(), 3 * (2 + 6) * 2);
        for query in &study.queries {
            for n in 0..query.form.pictures() {
                let at = |side| seen[&format!("{}-{side}-{}.png", query.id, n + 1)];
                assert_eq!(at("left"), (query.left, query.first_sample + n));
                assert_eq!(at("right"), (query.right, query.first_sample + n));
            }
        }
    }

    #[test]
    fn a_folder_with_anything_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("study");
        let (files, study) = (StudyFiles::new(&root), example(2, 1, 0));
        assert_eq!(files.state(&study).unwrap(), State::Absent);
        files.begin(&study).unwrap();
        assert_eq!(files.state(&study).unwrap(), State::Begun);
        files.finish(&study, (32, 32)).unwrap();
        assert_eq!(files.state(&study).unwrap(), State::Complete);
        let error = files.state(&example(2, 2, 0)).unwrap_err().to_string();
        assert!(error.contains("holds another study"), "{error}");
        std::fs::remove_file(files.study()).unwrap();
        let error = files.state(&study).unwrap_err().to_string();
        assert!(error.ends_with("is not empty: give another --out"), "{error}");
    }
}
