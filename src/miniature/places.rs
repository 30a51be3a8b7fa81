//! The six places: a backdrop of sky and ground with a mark or two (clouds, a moon, a low sun) to know it by.

use crate::random::Stream;

use super::objects;
use super::raster::{tinted, Canvas, Frame, Part, Rgb, Shape, SIZE};

/// Phrases that end a caption, for example "an apple in snow".
pub const NAMES: [&str; 6] = ["on grass", "on sand", "in the sky", "at night", "in snow", "at sunset"];

/// Upper edge and horizon of the sky (blended linearly), and the ground.
struct Colors {
    zenith: Rgb,
    horizon: Rgb,
    ground: Option<Rgb>,
}

const COLORS: [Colors; 6] = [
    Colors { zenith: [105, 180, 245], horizon: [165, 212, 245], ground: Some([70, 160, 60]) },
    Colors { zenith: [120, 195, 245], horizon: [60, 140, 215], ground: Some([232, 200, 125]) },
    Colors { zenith: [80, 145, 235], horizon: [150, 200, 250], ground: None },
    Colors { zenith: [10, 12, 45], horizon: [30, 35, 85], ground: Some([28, 45, 50]) },
    Colors { zenith: [165, 190, 220], horizon: [200, 215, 232], ground: Some([243, 246, 252]) },
    Colors { zenith: [110, 50, 120], horizon: [255, 140, 60], ground: Some([85, 40, 75]) },
];

const CLOUD: Rgb = [248, 250, 255];
const MARKS: [&[Part]; 6] = [
    &[],
    &[],
    &[
        Part { shape: Shape::Ellipse { center: (-9.5, -9.0), radii: (5.0, 2.4) }, color: CLOUD },
        Part { shape: Shape::Ellipse { center: (-7.5, -11.0), radii: (2.8, 2.2) }, color: CLOUD },
        Part { shape: Shape::Ellipse { center: (10.0, 10.5), radii: (5.0, 2.2) }, color: CLOUD },
        Part { shape: Shape::Ellipse { center: (8.5, 8.8), radii: (2.6, 2.0) }, color: CLOUD },
    ],
    &[Part { shape: Shape::Ellipse { center: (11.0, -11.0), radii: (3.2, 3.2) }, color: [250, 245, 205] }],
    &[],
    &[],
];

/// The backdrop of place number `place`, its horizon, marks and colours varied by `stream`.
pub fn backdrop(place: usize, stream: &mut Stream) -> Canvas {
    let horizon = stream.between(17.0, 21.0) as usize;
    let shift = (stream.between(-1.5, 1.5) as f32, stream.between(-1.0, 1.0) as f32);
    let tint: [f32; 3] = std::array::from_fn(|_| stream.between(-8.0, 8.0) as f32);

    let colors = &COLORS[place];
    let (top, low) = (tinted(colors.zenith, tint), tinted(colors.horizon, tint));
    let reach = if colors.ground.is_some() { horizon } else { SIZE };
    let mut canvas = Canvas::rows(|y| match colors.ground {
        Some(ground) if y >= horizon => tinted(ground, tint),
        _ => std::array::from_fn(|i| top[i] + (low[i] - top[i]) * y as f32 / reach as f32),
    });
    canvas.paint(MARKS[place], Frame { origin: (16.0 + shift.0, 16.0 + shift.1), unit: 1.0 }, tint);
    canvas
}

/// Paints `object` in the place: standing on the ground, or aloft where there is none.
pub fn put(canvas: &mut Canvas, object: usize, place: usize, stream: &mut Stream) {
    let x = 16.0 + stream.between(-3.0, 3.0) as f32;
    let y = if COLORS[place].ground.is_some() { 19.0 } else { 16.0 } + stream.between(-1.5, 1.5) as f32;
    let radius = stream.between(6.5, 8.0) as f32;
    let tint = std::array::from_fn(|_| stream.between(-12.0, 12.0) as f32);
    objects::paint(canvas, object, (x, y), radius, tint);
}

/// Paints two objects side by side in the place, the first on a random side.
pub fn put_two(canvas: &mut Canvas, first: usize, second: usize, place: usize, stream: &mut Stream) {
    let first_left = stream.uniform() < 0.5;
    for (object, left) in [(first, first_left), (second, !first_left)] {
        let x = if left { 8.3 } else { 23.7 } + stream.between(-1.2, 1.2) as f32;
        let y = if COLORS[place].ground.is_some() { 20.0 } else { 16.0 } + stream.between(-1.5, 1.5) as f32;
        let radius = stream.between(5.4, 6.6) as f32;
        let tint = std::array::from_fn(|_| stream.between(-12.0, 12.0) as f32);
        objects::paint(canvas, object, (x, y), radius, tint);
    }
}

/// Whether the RL training leaves out the prompt of this object in this place (12 of the 72; every object and every
/// place occurs among them and among the others).
pub fn is_held_out(object: usize, place: usize) -> bool {
    (object + place) % 6 == 0
}
