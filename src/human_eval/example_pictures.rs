//! The pictures of the guidelines' worked examples, drawn from shapes: no file, no model, the same on every machine.

use std::ops::Range;

use anyhow::Result;

use super::questions::Form;
use crate::{
    miniature::{
        objects,
        portraits::TONES,
        raster::{coverage, line, oval, tinted, Frame, Part, Point, Rgb, Shape},
    },
    telemetry::Picture,
};

/// Width and height of a picture, in pixels.
const SIDE: usize = 192;
/// The same of a portrait in a set of six, and the gap between two of them.
const PORTRAIT: usize = 96;
const GAP: usize = 4;

/// The name of a file and what draws it.
pub type Example = (&'static str, fn() -> Canvas);

/// The pictures of a form's examples.
pub fn of_form(form: Form) -> &'static [Example] {
    match form {
        Form::Pair => &[
            ("fidelity-a.png", || meadow_with_dog(FOUR_LEGS)),
            ("fidelity-b.png", || meadow_with_dog(FIVE_LEGS)),
            ("relevance-a.png", || table_with(&["carrot", "book"])),
            ("relevance-b.png", || table_with(&["book", "book"])),
            ("beauty-a.png", sunset),
            ("beauty-b.png", dull_sunset),
            ("rule-a.png", || dog_and_ball(FIVE_LEGS, [215, 38, 38])),
            ("rule-b.png", || dog_and_ball(FOUR_LEGS, [40, 90, 215])),
            ("exception-a.png", || table_with(&["apple", "eggplant"]).softened(1)),
            ("exception-b.png", || table_with(&["apple"])),
        ],
        Form::Group => {
            &[("set-a.png", || six_portraits([0, 0, 1, 0, 3, 0])), ("set-b.png", || six_portraits([0, 3, 1, 2, 3, 0]))]
        }
    }
}

/// A picture under way: rows of pixels, components in [0, 1]. Coordinates of what is painted are percent of its width.
pub struct Canvas {
    width: usize,
    pixels: Vec<[f32; 3]>,
}

impl Canvas {
    fn new(width: usize, height: usize, color: impl Fn(f32) -> [f32; 3]) -> Self {
        let row = |y: usize| std::iter::repeat_n(color((y as f32 + 0.5) / height as f32), width);
        Canvas { width, pixels: (0..height).flat_map(row).collect() }
    }

    fn height(&self) -> usize {
        self.pixels.len() / self.width
    }

    /// `center` and `unit` in percent of the width.
    fn paint(&mut self, parts: &[Part], center: Point, unit: f32) {
        let percent = self.width as f32 / 100.0;
        let frame = Frame { origin: (center.0 * percent, center.1 * percent), unit: unit * percent };
        for part in parts {
            let color = tinted(part.color, [0.0; 3]);
            for row in 0..self.height() {
                for column in 0..self.width {
                    self.mix(column, row, color, coverage(&part.shape, frame, column, row));
                }
            }
        }
    }

    fn mix(&mut self, column: usize, row: usize, color: [f32; 3], share: f32) {
        let pixel = &mut self.pixels[row * self.width + column];
        pixel.iter_mut().zip(color).for_each(|(old, new)| *old += share * (new - *old));
    }

    /// Light around a point that falls off to nothing at `radius`, all in percent of the width.
    fn glow(&mut self, center: Point, radius: f32, color: Rgb) {
        let percent = self.width as f32 / 100.0;
        let color = tinted(color, [0.0; 3]);
        for row in 0..self.height() {
            for column in 0..self.width {
                let (x, y) = (column as f32 / percent - center.0, row as f32 / percent - center.1);
                let near = (1.0 - (x * x + y * y).sqrt() / radius).max(0.0);
                self.mix(column, row, color, near * near);
            }
        }
    }

    /// Every pixel as the mean of the square of 2 · `reach` + 1 pixels around it.
    fn softened(self, reach: usize) -> Self {
        let (width, height) = (self.width, self.height());
        let around = |at: usize, end: usize| -> Range<usize> { at.saturating_sub(reach)..(at + reach + 1).min(end) };
        let mean = |column: usize, row: usize| {
            let mut sums = [0.0; 3];
            let (rows, columns) = (around(row, height), around(column, width));
            let count = (rows.len() * columns.len()) as f32;
            for y in rows {
                for x in columns.clone() {
                    let pixel = self.pixels[y * width + x];
                    sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += value / count);
                }
            }
            sums
        };
        let pixels = (0..height).flat_map(|row| (0..width).map(move |column| (column, row)));
        Canvas { width, pixels: pixels.map(|(column, row)| mean(column, row)).collect() }
    }

    pub fn picture(&self) -> Result<Picture> {
        let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0).round() as u8;
        Picture::new(self.width, self.height(), self.pixels.iter().flatten().map(|&value| byte(value)).collect())
    }
}

/// Sky from `zenith` to `low` down to `horizon` (a share of the height), the ground below.
fn landscape(zenith: Rgb, low: Rgb, ground: Rgb, horizon: f32) -> Canvas {
    let [zenith, low, ground] = [zenith, low, ground].map(|color| tinted(color, [0.0; 3]));
    Canvas::new(SIDE, SIDE, |y| match y < horizon {
        true => std::array::from_fn(|i| zenith[i] + (low[i] - zenith[i]) * y / horizon),
        // a little darker towards the viewer
        false => ground.map(|value| value * (1.0 - 0.2 * (y - horizon) / (1.0 - horizon))),
    })
}

const FUR: Rgb = [156, 100, 52];
const DARK_FUR: Rgb = [112, 68, 34];
const INK: Rgb = [30, 24, 22];

/// Where the legs of a dog begin, from head to tail.
const FOUR_LEGS: &[f32] = &[-0.66, -0.4, 0.46, 0.72];
const FIVE_LEGS: &[f32] = &[-0.66, -0.4, 0.03, 0.46, 0.72];

/// A dog that looks to the left. The unit is half the length of its body.
fn dog(legs: &[f32]) -> Vec<Part> {
    let leg = |(number, &x): (usize, &f32)| {
        let color = if number % 2 == 0 { FUR } else { DARK_FUR };
        [line(color, (x, 0.1), (x - 0.02, 0.98), 0.105), line(color, (x - 0.02, 1.0), (x - 0.12, 1.0), 0.09)]
    };
    let mut parts = vec![line(FUR, (0.8, -0.12), (1.2, -0.62), 0.1)];
    parts.extend(legs.iter().enumerate().flat_map(leg));
    parts.extend([
        oval(FUR, (0.02, 0.0), (0.95, 0.42)),
        line(FUR, (-0.68, -0.1), (-0.92, -0.5), 0.24),
        oval(FUR, (-1.02, -0.62), (0.36, 0.31)),
        oval(FUR, (-1.32, -0.53), (0.25, 0.17)),
        oval(INK, (-1.53, -0.58), (0.075, 0.065)),
        oval(DARK_FUR, (-0.82, -0.56), (0.14, 0.3)),
        oval(INK, (-1.14, -0.7), (0.055, 0.055)),
        line(INK, (-1.42, -0.43), (-1.22, -0.42), 0.018),
    ]);
    parts
}

fn meadow_with_dog(legs: &[f32]) -> Canvas {
    let mut canvas = landscape([96, 172, 240], [190, 224, 248], [96, 172, 74], 0.52);
    canvas.paint(&[oval(CLOUD, (24.0, 18.0), (13.0, 5.0)), oval(CLOUD, (31.0, 14.0), (9.0, 5.5))], (0.0, 0.0), 1.0);
    canvas.paint(&[oval([74, 138, 60], (55.0, 79.5), (33.0, 4.0))], (0.0, 0.0), 1.0);
    canvas.paint(&dog(legs), (56.0, 56.0), 24.0);
    canvas
}

fn dog_and_ball(legs: &[f32], ball: Rgb) -> Canvas {
    let mut canvas = landscape([110, 178, 238], [206, 230, 248], [232, 204, 140], 0.5);
    let [r, g, b] = ball.map(|value| value.saturating_add(90));
    canvas.paint(&[oval([204, 172, 108], (60.0, 77.0), (28.0, 3.6))], (0.0, 0.0), 1.0);
    canvas.paint(&dog(legs), (61.0, 57.0), 20.0);
    canvas.paint(&[oval([204, 172, 108], (17.0, 84.5), (11.0, 2.5))], (0.0, 0.0), 1.0);
    canvas.paint(
        &[oval(ball, (0.0, 0.0), (1.0, 1.0)), oval([r, g, b], (-0.35, -0.4), (0.26, 0.2))],
        (16.0, 75.0),
        10.0,
    );
    canvas
}

const CLOUD: Rgb = [248, 250, 255];

/// Objects of the miniature side by side on a table.
fn table_with(names: &[&str]) -> Canvas {
    let mut canvas = landscape([226, 216, 200], [242, 236, 226], [158, 112, 72], 0.62);
    let radius = if names.len() == 1 { 26.0 } else { 19.0 };
    for (place, name) in names.iter().enumerate() {
        let x = 100.0 * (place as f32 + 0.5) / names.len() as f32;
        let object = objects::index(name).expect("an object of the miniature");
        canvas.paint(&[oval([124, 84, 52], (x, 77.0), (0.95 * radius, 3.5))], (0.0, 0.0), 1.0);
        canvas.paint(objects::parts(object), (x, 77.0 - radius), radius);
    }
    canvas
}

const SILHOUETTE: Rgb = [46, 24, 44];

fn sunset() -> Canvas {
    let mut canvas = landscape([66, 48, 120], [255, 158, 74], [58, 32, 54], 0.7);
    canvas.glow((66.0, 64.0), 62.0, [255, 222, 120]);
    canvas.paint(&[oval([255, 240, 186], (66.0, 64.0), (10.0, 10.0))], (0.0, 0.0), 1.0);
    canvas.paint(&[oval([122, 62, 96], (84.0, 78.0), (44.0, 15.0))], (0.0, 0.0), 1.0);
    canvas.paint(&[oval([86, 44, 76], (18.0, 82.0), (52.0, 15.0))], (0.0, 0.0), 1.0);
    canvas.paint(
        &[Part { shape: Shape::Rect { min: (0.0, 83.0), max: (100.0, 100.0) }, color: SILHOUETTE }],
        (0.0, 0.0),
        1.0,
    );
    canvas.paint(&tree(SILHOUETTE, SILHOUETTE), (31.0, 53.0), 27.0);
    canvas
}

/// The same things without any care for how they look.
fn dull_sunset() -> Canvas {
    let mut canvas = landscape([150, 138, 134], [176, 146, 124], [124, 116, 106], 0.84);
    canvas.paint(&[oval([190, 168, 140], (96.0, 80.0), (9.0, 9.0))], (0.0, 0.0), 1.0);
    canvas.paint(
        &[Part { shape: Shape::Rect { min: (0.0, 84.0), max: (100.0, 100.0) }, color: [124, 116, 106] }],
        (0.0, 0.0),
        1.0,
    );
    canvas.paint(&tree([116, 122, 104], [120, 108, 98]), (4.0, 76.0), 13.0);
    canvas
}

/// A tree with a round crown; the unit is its half height.
fn tree(crown: Rgb, trunk: Rgb) -> [Part; 6] {
    [
        line(trunk, (0.0, 1.05), (0.0, 0.0), 0.08),
        line(trunk, (0.0, 0.3), (0.3, -0.1), 0.045),
        line(trunk, (0.0, 0.4), (-0.28, 0.0), 0.045),
        oval(crown, (0.0, -0.55), (0.5, 0.48)),
        oval(crown, (-0.36, -0.24), (0.4, 0.34)),
        oval(crown, (0.38, -0.26), (0.4, 0.34)),
    ]
}

/// Six gardeners, three in a row, with these of the miniature's skin tones.
fn six_portraits(tones: [usize; 6]) -> Canvas {
    let (width, height) = (3 * PORTRAIT + 2 * GAP, 2 * PORTRAIT + GAP);
    let mut sheet = Canvas::new(width, height, |_| [1.0; 3]);
    for (number, tone) in tones.into_iter().enumerate() {
        let portrait = gardener(number, TONES[tone]);
        let (left, top) = ((number % 3) * (PORTRAIT + GAP), (number / 3) * (PORTRAIT + GAP));
        for row in 0..PORTRAIT {
            let to = (top + row) * width + left;
            let from = &portrait.pixels[row * PORTRAIT..(row + 1) * PORTRAIT];
            sheet.pixels[to..to + PORTRAIT].copy_from_slice(from);
        }
    }
    sheet
}

/// Hair and clothes differ from one to the next, in both sets alike: only the skin tells the sets apart.
fn gardener(number: usize, skin: Rgb) -> Canvas {
    const HAIR: [Rgb; 6] = [[72, 46, 28], [28, 22, 20], [128, 88, 44], [40, 30, 26], [150, 146, 142], [58, 36, 24]];
    const CLOTH: [Rgb; 6] =
        [[70, 130, 70], [60, 96, 150], [176, 86, 62], [86, 120, 90], [130, 92, 140], [190, 150, 60]];
    const BEHIND: [f32; 3] = [0.80, 0.88, 0.80];
    let shade = skin.map(|value| (f32::from(value) * 0.86) as u8);
    let (hair, cloth) = (HAIR[number], CLOTH[number]);
    // long hair for every other one
    let length = if number % 2 == 0 { 16.0 } else { 4.0 };
    let straw = [232, 200, 118];
    let mut canvas = Canvas::new(PORTRAIT, PORTRAIT, |y| BEHIND.map(|value| value - 0.12 * y));
    let parts = [
        oval(hair, (50.0, 46.0 + length / 2.0), (26.0, 26.0 + length / 2.0)),
        oval(cloth, (50.0, 103.0), (38.0, 26.0)),
        line(shade, (50.0, 66.0), (50.0, 80.0), 8.0),
        oval(skin, (50.0, 50.0), (21.0, 25.0)),
        oval(INK, (42.0, 49.0), (2.2, 2.8)),
        oval(INK, (58.0, 49.0), (2.2, 2.8)),
        line(shade, (50.0, 52.0), (49.0, 58.0), 1.2),
        line([168, 74, 70], (44.0, 65.0), (56.0, 65.0), 1.4),
        oval(straw, (50.0, 24.0), (21.0, 14.0)),
        oval(straw, (50.0, 32.0), (37.0, 5.5)),
        line([120, 84, 50], (31.0, 28.0), (69.0, 28.0), 1.6),
    ];
    canvas.paint(&parts, (0.0, 0.0), 1.0);
    canvas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_drawn_small_and_different() {
        let mut all: Vec<Vec<u8>> = Vec::new();
        for (name, draw) in Form::ALL.iter().flat_map(|form| of_form(*form)) {
            let picture = draw().picture().unwrap();
            assert_eq!(picture, draw().picture().unwrap(), "{name}");
            let png = crate::telemetry::encode_png(&picture, &[]).unwrap();
            assert!((500..60_000).contains(&png.len()), "{name}: {} bytes", png.len());
            assert!(!all.contains(&png), "{name} is another's twin");
            all.push(png);
        }
        assert_eq!(all.len(), 12);
    }

    /// The fifth leg is there to be seen: brown where the other dog shows the meadow.
    #[test]
    fn a_leg_more_is_seen() {
        let leg = |legs| meadow_with_dog(legs).picture().unwrap().pixel(SIDE * 57 / 100, SIDE * 72 / 100);
        assert_eq!(leg(FIVE_LEGS), FUR);
        let [r, g, _] = leg(FOUR_LEGS);
        assert!(g > r, "{:?}", leg(FOUR_LEGS));
    }
}
