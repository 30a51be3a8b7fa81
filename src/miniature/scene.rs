//! Scenes: which picture with which caption number `index` is, and its pixels.

use crate::prompts::article::with_article;
use crate::prompts::compositions::{self, RELATIONS};
use crate::prompts::{occupations, places as place_prompts};
use crate::random::{Coordinates, Purpose, Stream};

use super::raster::Canvas;
use super::{objects, places, portraits};

/// Shares of pairs, portraits, places and singles among the scenes.
pub const MIXTURE: [f64; 4] = [0.42, 0.23, 0.30, 0.05];
/// How often the second object of a pair is missing.
pub const MISSING_SECOND: f64 = 0.45;
/// How often a place is washed out.
pub const WASHED_OUT: f64 = 0.5;

/// What a scene shows; numbers are indices into the lists of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Pair { first: usize, second: usize, relation: usize, second_drawn: bool },
    Portrait { occupation: usize, tone: usize },
    Place { object: usize, place: usize, washed_out: bool },
    Single { object: usize },
}

/// A picture with its caption.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    pub content: Content,
    pub caption: String,
    /// Planar RGB [3, 32, 32], values in [0, 1].
    pub pixels: Vec<f32>,
}

/// Scene number `index` of the world with this `seed`.
pub fn draw(seed: u64, index: u64) -> Scene {
    let mut stream = scene_stream(seed, index);
    let content = choose(&mut stream);
    draw_content(content, &mut stream)
}

/// Number `index` of the pictures that show exactly `content`; for tests and contact sheets.
pub fn draw_only(content: Content, seed: u64, index: u64) -> Scene {
    draw_content(content, &mut scene_stream(seed, index))
}

fn scene_stream(seed: u64, index: u64) -> Stream {
    Coordinates { sample: index as u32, iteration: (index >> 32) as u32, ..Coordinates::new(seed, Purpose::Scene) }
        .stream()
}

fn choose(stream: &mut Stream) -> Content {
    let object = |stream: &mut Stream| stream.below(objects::NAMES.len() as u64) as usize;
    match stream.weighted(&MIXTURE) {
        0 => {
            let pair = stream.choose(objects::NAMES.len(), 2);
            let relation = stream.below(RELATIONS.len() as u64) as usize;
            let second_drawn = stream.uniform() >= MISSING_SECOND;
            Content::Pair { first: pair[0], second: pair[1], relation, second_drawn }
        }
        1 => {
            let occupation = stream.below(portraits::OCCUPATIONS.len() as u64) as usize;
            Content::Portrait { occupation, tone: stream.weighted(&portraits::TONE_FREQUENCIES) }
        }
        2 => {
            let object = object(stream);
            let place = stream.below(places::NAMES.len() as u64) as usize;
            Content::Place { object, place, washed_out: stream.uniform() < WASHED_OUT }
        }
        _ => Content::Single { object: object(stream) },
    }
}

fn draw_content(content: Content, stream: &mut Stream) -> Scene {
    let caption = caption(content);
    let canvas = match content {
        Content::Pair { first, second, second_drawn, .. } => draw_pair(first, second_drawn.then_some(second), stream),
        Content::Portrait { occupation, tone } => portraits::draw(occupation, tone, stream),
        Content::Place { object, place, washed_out } => draw_place(object, place, washed_out, stream),
        Content::Single { object } => draw_single(object, stream),
    };
    Scene { content, caption, pixels: canvas.into_pixels() }
}

/// The caption of a picture with this content; it does not tell the defects.
pub fn caption(content: Content) -> String {
    let name = |object: usize| objects::NAMES[object];
    match content {
        Content::Pair { first, second, relation, .. } => {
            compositions::text(name(first), RELATIONS[relation], name(second))
        }
        Content::Portrait { occupation, .. } => occupations::text(portraits::OCCUPATIONS[occupation]),
        Content::Place { object, place, .. } => place_prompts::text(name(object), places::NAMES[place]),
        Content::Single { object } => with_article(name(object)),
    }
}

/// Two objects side by side on a pale ground, the first on a random side; without `second` its side stays empty.
fn draw_pair(first: usize, second: Option<usize>, stream: &mut Stream) -> Canvas {
    let mut canvas = pale(stream);
    let first_left = stream.uniform() < 0.5;
    for (object, left) in [(Some(first), first_left), (second, !first_left)] {
        let (dx, dy) = (stream.between(-1.2, 1.2) as f32, stream.between(-3.0, 3.0) as f32);
        let radius = stream.between(5.4, 6.6) as f32;
        let tint = object_tint(stream);
        if let Some(object) = object {
            objects::paint(&mut canvas, object, (if left { 8.3 } else { 23.7 } + dx, 16.0 + dy), radius, tint);
        }
    }
    canvas
}

fn draw_place(object: usize, place: usize, washed_out: bool, stream: &mut Stream) -> Canvas {
    let mut canvas = places::backdrop(place, stream);
    places::put(&mut canvas, object, place, stream);
    if washed_out {
        canvas.wash_out(stream.between(0.25, 0.4) as f32, stream.between(0.5, 0.65) as f32);
    }
    canvas
}

fn draw_single(object: usize, stream: &mut Stream) -> Canvas {
    let mut canvas = pale(stream);
    let center = (16.0 + stream.between(-3.0, 3.0) as f32, 16.0 + stream.between(-3.0, 3.0) as f32);
    let radius = stream.between(5.5, 7.0) as f32;
    objects::paint(&mut canvas, object, center, radius, object_tint(stream));
    canvas
}

/// A plain light ground, nearly grey.
fn pale(stream: &mut Stream) -> Canvas {
    let level = stream.between(0.80, 0.92);
    Canvas::plain(std::array::from_fn(|_| (level + stream.between(-0.05, 0.05)) as f32))
}

fn object_tint(stream: &mut Stream) -> [f32; 3] {
    std::array::from_fn(|_| stream.between(-12.0, 12.0) as f32)
}
