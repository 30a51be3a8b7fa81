//! The editions of the miniature world. Pictures, captions, vocabulary and embedded weights belong together, so that a config or
//! checkpoint of the first edition keeps its meaning, bit for bit.

use serde::{Deserialize, Serialize};

use super::embedded;

/// Which kinds of pictures the world has; written as its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub enum Edition {
    /// Pairs, portraits of occupations, places and singles.
    #[default]
    First,
    /// Also captions of people that name no occupation, which parity is trained on, and two kinds of captions that no
    /// training names: a worker with an object, and two objects in a place.
    Second,
}

/// The editions by the names that configs and options have for their models.
const NAMES: [(&str, Edition); 2] = [("miniature", Edition::Second), ("embedded", Edition::First)];

impl Edition {
    /// The edition whose embedded model a config or an option calls `name`; none for a folder.
    pub fn of_model(name: &str) -> Option<Edition> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, edition)| *edition)
    }

    /// What configs and options call its embedded model.
    pub fn model_name(self) -> &'static str {
        NAMES.iter().find(|(_, edition)| *edition == self).expect("every edition has a name").0
    }

    /// Its embedded model: (path inside a diffusers folder, contents).
    pub fn model(self) -> &'static [(&'static str, &'static [u8])] {
        match self {
            Edition::First => embedded::EMBEDDED_MODEL,
            Edition::Second => embedded::MINIATURE_MODEL,
        }
    }

    /// Shares of pairs, portraits of occupations, places, singles, people, workers with an object, and pairs in places.
    pub fn mixture(self) -> &'static [f64] {
        match self {
            Edition::First => &[0.42, 0.23, 0.30, 0.05],
            Edition::Second => &[0.36, 0.16, 0.24, 0.04, 0.12, 0.04, 0.04],
        }
    }
}

impl TryFrom<u8> for Edition {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            1 => Ok(Edition::First),
            2 => Ok(Edition::Second),
            other => Err(format!("the miniature world has the editions 1 and 2, not {other}")),
        }
    }
}

impl From<Edition> for u8 {
    fn from(edition: Edition) -> u8 {
        match edition {
            Edition::First => 1,
            Edition::Second => 2,
        }
    }
}
