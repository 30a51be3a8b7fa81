//! Names of UniDet's classes, from the label space that comes with its code (`learned_mAP+M.json`).
//!
//! A class is named after what it is called in Open Images, Objects365 and COCO, `<OID>_<O365>_<COCO>` with empty parts
//! and with `/` between two words for the same, or after its place in Mapillary Vistas,
//! `human--rider--bicyclist`. An object is looked up in any of these names, in any case, and means every class that
//! carries it: "book" is class 14 (Open Images and Objects365) and 378 (COCO).

use std::{collections::HashMap, path::Path};

use anyhow::{ensure, Context, Result};
use serde::Deserialize;

use crate::python_json;

/// Objects of the paper that no class is called, with what their class is called.
const BY_HAND: [(&str, &str); 3] = [("crosswalk", "crosswalk plain"), ("fig", "common fig"), ("sofa", "sofa bed")];

#[derive(Deserialize)]
struct LabelSpace {
    categories: Vec<Category>,
}

#[derive(Deserialize)]
struct Category {
    id: usize,
    name: String,
}

pub struct Labels {
    classes_of: HashMap<String, Vec<i64>>,
    pub classes: i64,
}

impl Labels {
    /// # Errors
    /// A file that cannot be read, is no label space, or whose classes are not numbered from 0 in order.
    pub fn load(path: &str) -> Result<Labels> {
        let bytes = std::fs::read(Path::new(path)).with_context(|| format!("cannot read {path}"))?;
        let space: LabelSpace = python_json::read(&bytes).with_context(|| format!("{path} is no label space"))?;
        Labels::new(space).with_context(|| path.to_string())
    }

    fn new(space: LabelSpace) -> Result<Labels> {
        let mut classes_of: HashMap<String, Vec<i64>> = HashMap::new();
        for (number, category) in space.categories.iter().enumerate() {
            ensure!(category.id == number, "category {number} has id {}", category.id);
            for name in names(&category.name) {
                let classes = classes_of.entry(name).or_default();
                if classes.last() != Some(&(number as i64)) {
                    classes.push(number as i64);
                }
            }
        }
        Ok(Labels { classes_of, classes: space.categories.len() as i64 })
    }

    /// The classes that show `object`; one named by several words, "rifle, gun", carries all of them.
    ///
    /// # Errors
    /// There is none.
    pub fn classes_of(&self, object: &str) -> Result<Vec<i64>> {
        let find = |name: &str| {
            let name = name.trim().to_lowercase();
            let other = BY_HAND.iter().find(|(object, _)| *object == name).map(|(_, name)| *name);
            self.classes_of.get(&name).or_else(|| self.classes_of.get(other?))
        };
        let mut words = object.split(',');
        let first = words.next().and_then(find);
        let all = words.map(find).fold(first.cloned(), |all, next| {
            let (all, next) = (all?, next?);
            Some(all.into_iter().filter(|class| next.contains(class)).collect())
        });
        all.filter(|classes| !classes.is_empty()).with_context(|| format!("no class is called {object:?}"))
    }
}

/// What a category is called, in lower case.
fn names(category: &str) -> Vec<String> {
    match category.rsplit_once("--") {
        Some((_, last)) => vec![last.replace('-', " ").to_lowercase()],
        None => {
            let words = category.split('_').flat_map(|name| name.split('/'));
            words.map(|word| word.trim().to_lowercase()).filter(|word| !word.is_empty()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::paper;

    fn labels(names: &[&str]) -> Labels {
        let category = |(id, name): (usize, &&str)| Category { id, name: name.to_string() };
        Labels::new(LabelSpace { categories: names.iter().enumerate().map(category).collect() }).unwrap()
    }

    #[test]
    fn every_name_of_a_class_finds_it() {
        let l = labels(&[
            "Picture frame_picture/frame_",
            "__book",
            "Book_book_",
            "object--bike-rack",
            "Rifle_gun_",
            "Sofa bed__",
            "Gun__",
        ]);
        let found = |object: &str| l.classes_of(object).unwrap();
        assert_eq!((found("picture"), found("Picture frame"), found("book")), (vec![0], vec![0], vec![1, 2]));
        assert_eq!(
            (found("bike rack"), found("rifle, gun"), found("sofa"), found("gun")),
            (vec![3], vec![4], vec![5], vec![4, 6])
        );
        assert!(l.classes_of("rifle, book").unwrap_err().to_string().contains("no class is called \"rifle, book\""));
        assert!(l.classes_of("").is_err());
        let twisted = LabelSpace { categories: vec![Category { id: 3, name: "x".into() }] };
        assert!(Labels::new(twisted).err().unwrap().to_string().contains("category 0 has id 3"));
    }

    /// All of the paper's objects are classes of the published label space (data of the project, not shipped).
    #[test]
    fn the_papers_objects_are_classes() {
        let Some(data) = std::env::var_os("RLDIFF_TEST_DATA") else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with unidet/learned_mAP+M.json");
            return;
        };
        let labels = Labels::load(Path::new(&data).join("unidet/learned_mAP+M.json").to_str().unwrap()).unwrap();
        assert_eq!(labels.classes, 722);
        let found: Vec<usize> = paper::objects().iter().map(|o| labels.classes_of(o).unwrap().len()).collect();
        let several = found.iter().filter(|&&n| n > 1).count();
        println!("{} objects, {several} of them in several classes", found.len());
        for (object, wanted) in [
            ("bear", vec![88, 127]),
            ("book", vec![14, 378]),
            ("cabinet", vec![191]),
            ("fig", vec![668]),
            ("sofa", vec![572]),
            ("pot", vec![found_pot(&labels)]),
        ] {
            assert_eq!(labels.classes_of(object).unwrap(), wanted, "{object}");
        }
    }

    fn found_pot(labels: &Labels) -> i64 {
        labels.classes_of("pan").unwrap()[0]
    }
}
