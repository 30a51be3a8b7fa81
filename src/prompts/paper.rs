//! The paper's own lists: the objects of its Table 8 and the occupations of its Table 7, with a seeded held-out part.

use anyhow::{ensure, Result};

use super::{compositions::Compositions, occupations::Occupations};
use crate::random::{Coordinates, Purpose};

const OBJECTS: &str = include_str!("objects.txt");
const OCCUPATIONS: &str = include_str!("occupations.txt");

/// The 532 object names.
pub fn objects() -> Vec<String> {
    names(OBJECTS)
}

/// The 100 occupations.
pub fn occupations() -> Vec<String> {
    names(OCCUPATIONS)
}

/// Prompts of two objects; `held_out` of the 532 (the paper: 82) occur in no training prompt, and the held-out prompts
/// are of these alone.
pub fn compositions_of(held_out: usize, split_seed: u64) -> Result<Compositions> {
    let (trained, held_out) = split("objects", objects(), held_out, split_seed)?;
    Compositions::new(trained, held_out)
}

/// Portraits; `held_out` of the 100 occupations are never trained on.
pub fn portraits_of(held_out: usize, split_seed: u64) -> Result<Occupations> {
    let (trained, held_out) = split("occupations", occupations(), held_out, split_seed)?;
    Occupations::new(trained, held_out)
}

/// Names of a list: `#` begins a comment, `a:` heads a letter, a semicolon or the end of a line parts two names.
fn names(list: &str) -> Vec<String> {
    let lines = list.lines().filter(|line| !line.starts_with('#') && !line.ends_with(':'));
    lines.flat_map(|line| line.split(';')).map(str::trim).filter(|n| !n.is_empty()).map(String::from).collect()
}

/// Both parts keep the order of the list.
fn split(what: &str, names: Vec<String>, held_out: usize, seed: u64) -> Result<(Vec<String>, Vec<String>)> {
    ensure!(held_out < names.len(), "held_out = {held_out} must be below the {} {what}", names.len());
    let chosen = Coordinates::new(seed, Purpose::Split).stream().choose(names.len(), held_out);
    let mut is_held_out = vec![false; names.len()];
    chosen.into_iter().for_each(|i| is_held_out[i] = true);
    let (mut trained, mut kept) = (Vec::new(), Vec::new());
    for (name, held_out) in names.into_iter().zip(is_held_out) {
        if held_out { &mut kept } else { &mut trained }.push(name);
    }
    Ok((trained, kept))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::{PromptSource, Split};

    #[test]
    fn the_lists_are_whole() {
        let (objects, occupations) = (objects(), occupations());
        assert_eq!((objects.len(), occupations.len()), (532, 100));
        assert!(objects.iter().any(|o| o == "rifle, gun") && occupations.iter().any(|o| o == "PR person"));
        assert_eq!((objects[0].as_str(), objects[531].as_str()), ("accordion", "zucchini"));
    }

    /// Entry by entry the lists of the paper's Tables 7 and 8: SHA-256 over the sorted names, a line each.
    #[test]
    fn the_lists_are_the_papers() {
        let digest = |mut names: Vec<String>| {
            names.sort_unstable();
            crate::store::digest::of_bytes(names.join("\n").as_bytes())
        };
        assert_eq!(digest(occupations()), "d30f351f9cb8fca7560b721824ac67cde328cc31584d5802784ea92b2d54462a");
        assert_eq!(digest(objects()), "98d5fffc0dd27a698353b6cbba95a9306bb65e6a39f082db28c328ac4a6326a4");
    }

    /// The counts of sections 4.2 and 4.3.
    #[test]
    fn the_papers_prompts() {
        let source = compositions_of(82, 1).unwrap();
        assert_eq!(source.len(Split::Train), 1_010_250);
        assert_eq!(source.len(Split::HeldOut), 33_210);
        let prompt = source.prompt(Split::Train, 1_010_249);
        assert_eq!(prompt.objects.len(), 2);
        assert_eq!(portraits_of(0, 1).unwrap().len(Split::Train), 100);
        let people = portraits_of(20, 1).unwrap();
        assert_eq!((people.len(Split::Train), people.len(Split::HeldOut)), (80, 20));
    }

    #[test]
    fn the_split_depends_on_the_seed_alone() {
        let parts = |seed| split("objects", objects(), 82, seed).unwrap();
        assert_eq!(parts(1), parts(1));
        assert_ne!(parts(1), parts(2));
        let (trained, held_out) = parts(3);
        assert_eq!((trained.len(), held_out.len()), (450, 82));
        assert!(held_out.iter().all(|name| !trained.contains(name)));
        assert!(split("objects", objects(), 532, 1).unwrap_err().to_string().contains("held_out = 532"));
    }
}
