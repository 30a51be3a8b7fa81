//! Scenes: which picture with which caption number `index` is, and its pixels.

use crate::prompts::article::with_article;
use crate::prompts::compositions::{self, RELATIONS};
use crate::prompts::{occupations, places as place_prompts};
use crate::random::{Coordinates, Purpose, Stream};

use super::edition::Edition;
use super::people::Person;
use super::raster::Canvas;
use super::{objects, places, portraits};

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
    // of the second edition
    Person { person: Person, tone: usize },
    Worker { occupation: usize, object: usize, tone: usize },
    PairInPlace { first: usize, second: usize, place: usize, washed_out: bool },
}

impl Content {
    /// Whether there is a face in the picture.
    pub fn is_portrait(self) -> bool {
        matches!(self, Content::Portrait { .. } | Content::Person { .. } | Content::Worker { .. })
    }
}

/// A picture with its caption.
#[derive(Clone, Debug, PartialEq)]
pub struct Scene {
    pub content: Content,
    pub caption: String,
    /// Planar RGB [3, 32, 32], values in [0, 1].
    pub pixels: Vec<f32>,
}

/// Scene number `index` of the world of this edition and `seed`.
pub fn draw(edition: Edition, seed: u64, index: u64) -> Scene {
    let mut stream = scene_stream(seed, index);
    let content = choose(edition, &mut stream);
    draw_content(content, &mut stream)
}

/// Number `index` of the pictures that show exactly `content`: contact sheets, clean examples, tests.
pub fn draw_only(content: Content, seed: u64, index: u64) -> Scene {
    draw_content(content, &mut scene_stream(seed, index))
}

/// Everything that the edition shows, without the defects: portraits in each tone.
pub fn flawless(edition: Edition) -> Vec<Content> {
    let tones = 0..portraits::TONES.len();
    let pairs = || ordered_pairs(objects::NAMES.len());
    let mut all = Vec::new();
    for (first, second) in pairs() {
        all.extend((0..RELATIONS.len()).map(|relation| Content::Pair { first, second, relation, second_drawn: true }));
    }
    for occupation in 0..portraits::OCCUPATIONS.len() {
        all.extend(tones.clone().map(|tone| Content::Portrait { occupation, tone }));
    }
    for object in 0..objects::NAMES.len() {
        all.extend((0..places::NAMES.len()).map(|place| Content::Place { object, place, washed_out: false }));
        all.push(Content::Single { object });
    }
    if edition == Edition::First {
        return all;
    }
    for person in Person::all() {
        all.extend(tones.clone().map(|tone| Content::Person { person, tone }));
    }
    for occupation in 0..portraits::OCCUPATIONS.len() {
        for object in 0..objects::NAMES.len() {
            all.extend(tones.clone().map(|tone| Content::Worker { occupation, object, tone }));
        }
    }
    for (first, second) in pairs() {
        let of = |place| Content::PairInPlace { first, second, place, washed_out: false };
        all.extend((0..places::NAMES.len()).map(of));
    }
    all
}

fn ordered_pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count)
        .flat_map(move |first| (0..count).filter(move |&second| second != first).map(move |second| (first, second)))
}

fn scene_stream(seed: u64, index: u64) -> Stream {
    Coordinates { sample: index as u32, iteration: (index >> 32) as u32, ..Coordinates::new(seed, Purpose::Scene) }
        .stream()
}

fn choose(edition: Edition, stream: &mut Stream) -> Content {
    let one_of = |stream: &mut Stream, names: usize| stream.below(names as u64) as usize;
    let tone = |stream: &mut Stream| stream.weighted(&portraits::TONE_FREQUENCIES);
    match stream.weighted(edition.mixture()) {
        0 => {
            let pair = stream.choose(objects::NAMES.len(), 2);
            let relation = one_of(stream, RELATIONS.len());
            let second_drawn = stream.uniform() >= MISSING_SECOND;
            Content::Pair { first: pair[0], second: pair[1], relation, second_drawn }
        }
        1 => {
            let occupation = one_of(stream, portraits::OCCUPATIONS.len());
            Content::Portrait { occupation, tone: tone(stream) }
        }
        2 => {
            let object = one_of(stream, objects::NAMES.len());
            let place = one_of(stream, places::NAMES.len());
            Content::Place { object, place, washed_out: stream.uniform() < WASHED_OUT }
        }
        3 => Content::Single { object: one_of(stream, objects::NAMES.len()) },
        4 => {
            let person = Person::choose(stream);
            Content::Person { person, tone: tone(stream) }
        }
        5 => {
            let occupation = one_of(stream, portraits::OCCUPATIONS.len());
            let object = one_of(stream, objects::NAMES.len());
            Content::Worker { occupation, object, tone: tone(stream) }
        }
        _ => {
            let pair = stream.choose(objects::NAMES.len(), 2);
            let place = one_of(stream, places::NAMES.len());
            let washed_out = stream.uniform() < WASHED_OUT;
            Content::PairInPlace { first: pair[0], second: pair[1], place, washed_out }
        }
    }
}

fn draw_content(content: Content, stream: &mut Stream) -> Scene {
    let caption = caption(content);
    let canvas = match content {
        Content::Pair { first, second, second_drawn, .. } => draw_pair(first, second_drawn.then_some(second), stream),
        Content::Portrait { occupation, tone } => portraits::draw(occupation, tone, stream),
        Content::Place { object, place, washed_out } => {
            draw_place(place, washed_out, stream, |canvas, stream| places::put(canvas, object, place, stream))
        }
        Content::Single { object } => draw_single(object, stream),
        Content::Person { person, tone } => person.draw(tone, stream),
        Content::Worker { occupation, object, tone } => draw_worker(occupation, object, tone, stream),
        Content::PairInPlace { first, second, place, washed_out } => {
            draw_place(place, washed_out, stream, |canvas, stream| {
                places::put_two(canvas, first, second, place, stream)
            })
        }
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
        Content::Person { person, .. } => person.caption(),
        Content::Worker { occupation, object, .. } => {
            format!("{} with {}", with_article(portraits::OCCUPATIONS[occupation]), with_article(name(object)))
        }
        Content::PairInPlace { first, second, place, .. } => {
            format!("{} and {} {}", with_article(name(first)), with_article(name(second)), places::NAMES[place])
        }
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

fn draw_place(
    place: usize,
    washed_out: bool,
    stream: &mut Stream,
    put: impl FnOnce(&mut Canvas, &mut Stream),
) -> Canvas {
    let mut canvas = places::backdrop(place, stream);
    put(&mut canvas, stream);
    if washed_out {
        canvas.wash_out(stream.between(0.25, 0.4) as f32, stream.between(0.5, 0.65) as f32);
    }
    canvas
}

/// A portrait with a small object in one of the lower corners.
fn draw_worker(occupation: usize, object: usize, tone: usize, stream: &mut Stream) -> Canvas {
    let mut canvas = portraits::draw(occupation, tone, stream);
    let x = if stream.uniform() < 0.5 { 5.5 } else { 26.5 } + stream.between(-0.7, 0.7) as f32;
    let y = 26.2 + stream.between(-0.7, 0.7) as f32;
    objects::paint(&mut canvas, object, (x, y), stream.between(4.2, 4.8) as f32, object_tint(stream));
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
