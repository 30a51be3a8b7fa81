//! What raters get: a folder of static pages that needs neither a server nor the network.
//!
//! ```text
//! OUT/
//! ├── study.json        which model is on which side: not for raters
//! └── pages/
//!     ├── index.html, style.css, app.js
//!     ├── study.js      prompts, questions and file names (a script, since a page from disk may read no file)
//!     ├── guidelines/   pictures of the worked examples; none where the user has his own guidelines
//!     └── images/       <query>-<side>-<n>.png; neither name nor content says which model drew it
//! ```
//! Where queries are shared out each rater has such a folder, `raters/001` and so on, with his own queries on the sides on
//! which he sees them; the pictures of all of them lie in `pictures/` (hard links, where the file system has them).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Map, Value};

use super::{
    assignment::Assignment,
    example_pictures,
    guidelines::Page,
    questions::Form,
    study::{Query, Study},
};
use crate::{
    cannot_write::{make_folder, CannotWrite},
    excerpt::bounded,
    folders::{can_be_folder, contents::first_entry},
    telemetry::{encode_png, picture_size, write_atomic},
};

const INDEX: &str = include_str!("pages/index.html");
const GUIDELINES: &str = include_str!("pages/guidelines.html");
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

    /// Where the folders of raters are, if queries are shared out.
    pub fn raters(&self) -> PathBuf {
        self.root.join("raters")
    }

    pub fn of_rater(&self, number: usize) -> PathBuf {
        self.raters().join(format!("{number:03}"))
    }

    /// Where the pictures of all queries are.
    fn images(&self, study: &Study) -> PathBuf {
        if study.is_shared_out() {
            self.root.join("pictures")
        } else {
            self.pages().join("images")
        }
    }

    /// The file that is written last.
    fn last(&self, study: &Study) -> PathBuf {
        let folder = study.assignments.last().map_or(self.pages(), |last| self.of_rater(last.number));
        folder.join("index.html")
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
        if Study::read(&self.study())?.as_planned() != *study {
            bail!("{root} holds another study: give another --out");
        }
        Ok(if self.last(study).exists() { State::Complete } else { State::Begun })
    }

    /// Makes the folders and writes the key.
    pub fn begin(&self, study: &Study) -> Result<()> {
        make_folder(&self.images(study))?;
        // raters who got queries again are in it, and only there
        if !self.study().exists() {
            study.write(&self.study())?;
        }
        Ok(())
    }

    /// Which files the pictures of `model` are, by the number of their noise.
    pub fn pictures(&self, study: &Study, model: usize) -> BTreeMap<usize, Picture> {
        let mut pictures: BTreeMap<usize, Picture> = BTreeMap::new();
        for query in &study.queries {
            for (side, of_side) in [("left", query.left), ("right", query.right)] {
                for n in (0..query.form.pictures()).filter(|_| of_side == model) {
                    let new = || Picture { prompt: query.prompt.clone(), files: Vec::new() };
                    let picture = pictures.entry(query.first_sample + n).or_insert_with(new);
                    picture.files.push(self.images(study).join(image_name(query, side, n)));
                }
            }
        }
        pictures
    }

    /// Writes the pages. `size` is that of a picture.
    pub fn finish(&self, study: &Study, size: (usize, usize)) -> Result<()> {
        let examples = Examples::of(study)?;
        if !study.is_shared_out() {
            return write_pages(&self.pages(), study, None, size, &examples);
        }
        study.assignments.iter().try_for_each(|rater| self.write_rater(study, rater, size, &examples))
    }

    /// Writes the folders of the raters with numbers above `before`, who got queries of missing ones, then the study that
    /// knows them.
    ///
    /// # Errors
    /// A folder that is not the rater's; a picture that is not there any more.
    pub fn hand_out_again(&self, study: &Study, before: usize) -> Result<()> {
        let first = study.queries.first().map(|query| self.images(study).join(image_name(query, "left", 0)));
        let first = first.context("a study without queries")?;
        let bytes = fs::read(&first).with_context(|| format!("cannot read {}", first.display()))?;
        let size = picture_size(&bytes).with_context(|| format!("cannot decode {}", first.display()))?;
        let examples = Examples::of(study)?;
        for rater in study.again.iter().filter(|rater| rater.number > before) {
            self.write_rater(study, rater, size, &examples)?;
        }
        study.write(&self.study())
    }

    fn write_rater(&self, study: &Study, rater: &Assignment, size: (usize, usize), examples: &Examples) -> Result<()> {
        let (folder, images) = (self.of_rater(rater.number), self.images(study));
        make_folder(&folder.join("images"))?;
        for (query, mirrored) in queries_of(study, rater) {
            for side in ["left", "right"] {
                let shown = if mirrored { other(side) } else { side };
                for n in 0..query.form.pictures() {
                    let to = folder.join("images").join(image_name(query, shown, n));
                    link(&images.join(image_name(query, side, n)), &to)?;
                }
            }
        }
        write_pages(&folder, study, Some(rater), size, examples)
    }
}

/// A rater's queries in his order, and whether he sees each mirrored.
fn queries_of<'a>(study: &'a Study, rater: &'a Assignment) -> impl Iterator<Item = (&'a Query, bool)> {
    let by_id: BTreeMap<&str, &Query> = study.queries.iter().map(|query| (query.id.as_str(), query)).collect();
    rater.queries.iter().map(move |asked| (by_id[asked.query.as_str()], asked.mirrored))
}

fn other(side: &str) -> &'static str {
    if side == "left" {
        "right"
    } else {
        "left"
    }
}

/// The same file under another name, a copy where the file system has no hard links.
fn link(from: &Path, to: &Path) -> Result<()> {
    ensure!(from.is_file(), "{} is not there any more: its study's folder is to be kept whole", from.display());
    if to.exists() {
        fs::remove_file(to).context(CannotWrite::file(to))?;
    }
    if fs::hard_link(from, to).is_err() {
        fs::copy(from, to).map(drop).context(CannotWrite::file(to))?;
    }
    Ok(())
}

/// What the guidelines of a study are made of.
struct Examples {
    /// Templates of index.html.
    html: String,
    /// Names and bytes of pictures.
    pictures: Vec<(&'static str, Vec<u8>)>,
}

impl Examples {
    fn of(study: &Study) -> Result<Self> {
        if let Some(own) = &study.guidelines {
            let html = format!("<template id=\"guidelines-own\">\n{}</template>", Page::of(own).html);
            return Ok(Examples { html, pictures: Vec::new() });
        }
        let forms = Form::ALL.into_iter().filter(|form| study.queries.iter().any(|query| query.form == *form));
        let pictures = forms.flat_map(example_pictures::of_form).map(|(name, draw)| {
            let png = encode_png(&draw().picture()?, &[]).with_context(|| format!("cannot encode {name}"))?;
            Ok((*name, png))
        });
        Ok(Examples { html: GUIDELINES.trim_end().to_owned(), pictures: pictures.collect::<Result<_>>()? })
    }
}

/// Writes a folder of pages but for the pictures; `index.html` last, since a folder that has it is complete.
fn write_pages(
    folder: &Path,
    study: &Study,
    rater: Option<&Assignment>,
    size: (usize, usize),
    examples: &Examples,
) -> Result<()> {
    if !examples.pictures.is_empty() {
        make_folder(&folder.join("guidelines"))?;
    }
    for (name, png) in &examples.pictures {
        write_atomic(&folder.join("guidelines").join(name), png)?;
    }
    write_atomic(&folder.join("study.js"), study_script(study, rater, size).as_bytes())?;
    write_atomic(&folder.join("style.css"), STYLE.as_bytes())?;
    write_atomic(&folder.join("app.js"), APP.as_bytes())?;
    let index = INDEX.replacen("<!-- guidelines -->", &examples.html, 1);
    write_atomic(&folder.join("index.html"), index.as_bytes())
}

/// A picture to draw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub prompt: String,
    /// One per query in which it is shown.
    pub files: Vec<PathBuf>,
}

fn image_name(query: &Query, side: &str, n: usize) -> String {
    format!("{}-{side}-{}.png", query.id, n + 1)
}

/// Everything the pages know, without the models. A rater's pages know his own queries, in his order; his pictures are
/// named by the sides on which he sees them.
fn study_script(study: &Study, rater: Option<&Assignment>, (width, height): (usize, usize)) -> String {
    let forms: Map<String, Value> = Form::ALL
        .iter()
        .map(|form| (form.name().to_owned(), json!({"questions": form.questions(study.edition)})))
        .collect();
    let paths = |query: &Query, side| -> Vec<String> {
        (0..query.form.pictures()).map(|n| format!("images/{}", image_name(query, side, n))).collect()
    };
    let shown = |query: &Query| {
        json!({
            "id": query.id, "form": query.form, "prompt": bounded(&query.prompt, LONGEST_PROMPT),
            "left": paths(query, "left"), "right": paths(query, "right"),
        })
    };
    let queries: Vec<Value> = match rater {
        Some(rater) => queries_of(study, rater).map(|(query, _)| shown(query)).collect(),
        None => study.queries.iter().map(shown).collect(),
    };
    let mut data = json!({
        "id": study.id(), "title": study.title, "votesFormat": super::votes::FORMAT,
        "width": width, "height": height, "forms": forms, "queries": queries,
    });
    if let Some(rater) = rater {
        data["number"] = rater.number.into();
    }
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
        let script = study_script(&study, None, (32, 32));
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

    /// Writes as its content which side of which query a picture is.
    fn with_pictures(study: &Study, root: &Path) -> StudyFiles {
        let files = StudyFiles::new(root);
        files.begin(study).unwrap();
        for picture in (0..study.models.len()).flat_map(|model| files.pictures(study, model).into_values()) {
            for file in picture.files {
                let name = file.file_name().unwrap().to_str().unwrap().to_owned();
                let mark = name.bytes().fold(7u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
                let color = [mark as u8, (mark >> 8) as u8, (mark >> 16) as u8];
                let picture = crate::telemetry::Picture::from_fn(4, 6, |_, _| color);
                fs::write(file, encode_png(&picture, &[]).unwrap()).unwrap();
            }
        }
        files
    }

    #[test]
    fn each_rater_has_his_own_folder_with_his_sides() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("study");
        let mut study = example(2, 6, 1).shared_out(Some(5)).unwrap();
        let files = with_pictures(&study, &root);
        assert_eq!(files.state(&study).unwrap(), State::Begun);
        files.finish(&study, (4, 6)).unwrap();
        assert_eq!(files.state(&study).unwrap(), State::Complete);
        assert!(!files.pages().exists());
        let same_pictures = |study: &Study, rater: &Assignment| {
            let own = files.of_rater(rater.number).join("images");
            let read = |path: PathBuf| fs::read(path).unwrap();
            let mut count = 0;
            for (query, mirrored) in queries_of(study, rater) {
                let left = if mirrored { "right" } else { "left" };
                for n in 0..query.form.pictures() {
                    let (seen, stock) = (own.join(image_name(query, "left", n)), files.images(study));
                    assert_eq!(read(seen), read(stock.join(image_name(query, left, n))));
                    count += 2;
                }
            }
            assert_eq!(fs::read_dir(own).unwrap().count(), count);
            let script = fs::read_to_string(files.of_rater(rater.number).join("study.js")).unwrap();
            assert!(script.contains(&format!("\"number\":{}", rater.number)), "{script}");
            assert_eq!(script.matches("\"prompt\":").count(), rater.queries.len());
        };
        study.assignments.iter().for_each(|rater| same_pictures(&study, rater));
        assert!(study.assignments.iter().flat_map(|rater| &rater.queries).any(|asked| asked.mirrored));

        // handed out again: new folders, and the study is still the planned one
        let planned = study.clone();
        let before = crate::human_eval::places::hand_out_again(&mut study, &[], &[2]).unwrap();
        files.hand_out_again(&study, before).unwrap();
        assert_eq!(study.again.len(), 1);
        same_pictures(&study, &study.again[0]);
        assert_eq!(Study::read(&files.study()).unwrap(), study);
        assert_eq!(files.state(&planned).unwrap(), State::Complete);
        files.begin(&planned).unwrap();
        assert_eq!(Study::read(&files.study()).unwrap(), study, "a build that goes on forgets nobody");
        fs::remove_file(files.images(&study).join("pair-0001-left-1.png")).unwrap();
        let error = format!("{:#}", files.hand_out_again(&study, before).unwrap_err());
        assert!(error.starts_with("cannot read ") && error.contains("pair-0001-left-1.png"), "{error}");
    }

    #[test]
    fn the_pages_have_pictures_of_their_examples_or_the_users_guidelines() {
        let folder = tempfile::tempdir().unwrap();
        let pages = |name: &str, study: &Study| {
            let files = with_pictures(study, &folder.path().join(name));
            files.finish(study, (4, 6)).unwrap();
            (fs::read_to_string(files.pages().join("index.html")).unwrap(), files.pages().join("guidelines"))
        };
        let (index, pictures) = pages("both", &example(2, 1, 1));
        let named: Vec<&str> =
            index.split("src=\"guidelines/").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(named.len(), 12);
        for name in &named {
            let (width, height) = picture_size(&fs::read(pictures.join(name)).unwrap()).unwrap();
            let tag = format!("src=\"guidelines/{name}\" width=\"{width}\" height=\"{height}\"\n");
            assert!(index.contains(&tag), "{tag}");
        }
        assert_eq!(fs::read_dir(pictures).unwrap().count(), named.len());
        // each example prefers one side, and says so in words and by a frame
        assert_eq!((index.matches("class=\"example\"").count(), index.matches("class=\"better\"").count()), (6, 6));
        assert!(fs::read_dir(pages("pairs", &example(2, 1, 0)).1).unwrap().count() == 10);

        let mut own = example(2, 1, 1);
        own.guidelines = Some("# Ours\n\nLook *twice*.".into());
        assert_ne!(own.id(), example(2, 1, 1).id());
        let (index, pictures) = pages("own", &own);
        let text = "<template id=\"guidelines-own\">\n<h2>Ours</h2>\n<p>Look <em>twice</em>.</p>\n</template>";
        assert!(index.contains(text) && !index.contains("guidelines-pair") && !pictures.exists(), "{index}");
    }
}
