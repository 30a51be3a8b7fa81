//! People: portraits whose captions name clothes and no occupation, "a woman in a red shirt with a cap". Parity is trained on
//! them and tested on occupations, as in the paper, which trains on captions of people (section 4.2).

use crate::prompts::article::with_article;
use crate::random::Stream;

use super::{
    portraits::{paint, Hair, Look},
    raster::{convex, line, oval, Canvas, Part, Rgb},
};

pub const WHO: [&str; 3] = ["man", "woman", "person"];
pub const COLORS: [&str; 8] = ["red", "yellow", "green", "blue", "purple", "pink", "white", "black"];
/// What is worn beside the shirt; "" is nothing.
pub const WORN: [&str; 4] = ["", "cap", "hat", "scarf"];

const CLOTHS: [Rgb; 8] = [
    [205, 45, 45],
    [240, 205, 60],
    [60, 150, 75],
    [50, 90, 200],
    [120, 60, 160],
    [240, 140, 180],
    [240, 241, 244],
    [34, 34, 40],
];

/// Indices into [`WHO`], [`COLORS`] and [`WORN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Person {
    pub who: usize,
    pub color: usize,
    pub worn: usize,
}

impl Person {
    pub fn all() -> Vec<Person> {
        let of = |who| (0..COLORS.len()).flat_map(move |color| (0..WORN.len()).map(move |worn| (who, color, worn)));
        (0..WHO.len()).flat_map(of).map(|(who, color, worn)| Person { who, color, worn }).collect()
    }

    pub fn choose(stream: &mut Stream) -> Person {
        let mut below = |names: usize| stream.below(names as u64) as usize;
        Person { who: below(WHO.len()), color: below(COLORS.len()), worn: below(WORN.len()) }
    }

    pub fn caption(self) -> String {
        let shirt = format!("{} in a {} shirt", with_article(WHO[self.who]), COLORS[self.color]);
        match WORN[self.worn] {
            "" => shirt,
            worn => format!("{shirt} with {}", with_article(worn)),
        }
    }

    /// The portrait in skin tone number `tone`. Women have long hair, men short, a person either.
    pub fn draw(self, tone: usize, stream: &mut Stream) -> Canvas {
        let hair = match WHO[self.who] {
            "man" => Hair::Short,
            "woman" => Hair::Long,
            _ if stream.uniform() < 0.5 => Hair::Short,
            _ => Hair::Long,
        };
        let worn: &[Part] = match WORN[self.worn] {
            "cap" => CAP,
            "hat" => HAT,
            "scarf" => SCARF,
            _ => &[],
        };
        paint(&Look { cloth: CLOTHS[self.color], behind: &[], before: worn }, tone, hair, stream)
    }
}

const CAP: &[Part] =
    &[oval([36, 120, 190], (0.0, -7.8), (7.6, 3.2)), line([24, 84, 140], (-1.0, -5.8), (8.4, -5.8), 0.8)];
const HAT: &[Part] = &[
    oval([96, 92, 100], (0.0, -9.0), (5.8, 3.8)),
    oval([120, 116, 124], (0.0, -6.6), (10.8, 1.6)),
    line([40, 38, 46], (-5.2, -8.0), (5.2, -8.0), 0.6),
];
const SCARF: &[Part] = &[
    line([245, 130, 40], (-5.0, 9.4), (5.0, 9.4), 1.3),
    convex([245, 130, 40], &[(2.6, 9.6), (5.2, 9.6), (5.6, 15.5), (3.4, 15.5)]),
];
