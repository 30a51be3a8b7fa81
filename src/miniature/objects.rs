//! The twelve objects: each a distinct shape in a distinct colour, a few parts that survive 32×32 pixels.

use super::raster::{convex, line, rect, Canvas, Frame, Part, Point, Rgb, Shape};

/// Names as in the paper's Table 8, in the order of [`parts`].
pub const NAMES: [&str; 12] =
    ["apple", "ball", "book", "box", "carrot", "coin", "cucumber", "donut", "eggplant", "kite", "tire", "tree"];

/// Objects that the pictures show but that no composition prompt of the RL training names.
pub const HELD_OUT: [&str; 4] = ["coin", "cucumber", "kite", "tree"];

/// Names that occur in the composition prompts of the RL training.
pub fn trained() -> Vec<&'static str> {
    NAMES.into_iter().filter(|name| !HELD_OUT.contains(name)).collect()
}

/// Position of `name` in [`NAMES`].
pub fn index(name: &str) -> Option<usize> {
    NAMES.iter().position(|&known| known == name)
}

const LEAF: Rgb = [60, 165, 60];
const WOOD: Rgb = [110, 70, 35];

const APPLE: &[Part] = &[
    disc(225, 35, 35, (0.0, 0.14), (0.94, 0.86)),
    line(WOOD, (0.0, -0.65), (0.1, -1.05), 0.11),
    Part { shape: Shape::Ellipse { center: (0.45, -0.86), radii: (0.36, 0.2) }, color: LEAF },
];
const BALL: &[Part] =
    &[disc(40, 80, 230, (0.0, 0.0), (1.0, 1.0)), line([235, 240, 250], (-0.76, -0.28), (0.76, 0.28), 0.19)];
const BOOK: &[Part] = &[
    rect([30, 185, 195], (-0.68, -0.98), (0.68, 0.98)),
    rect([15, 110, 125], (-0.68, -0.98), (-0.4, 0.98)),
    rect([240, 245, 240], (-0.16, -0.55), (0.46, -0.15)),
];
const BOX: &[Part] = &[
    rect([150, 92, 42], (-0.88, -0.85), (0.88, 0.88)),
    rect([190, 130, 70], (-0.88, -0.85), (0.88, -0.42)),
    rect([228, 190, 128], (-0.17, -0.85), (0.17, 0.2)),
];
const CARROT: &[Part] = &[
    line(LEAF, (0.0, -0.55), (-0.36, -1.0), 0.14),
    line(LEAF, (0.0, -0.55), (0.0, -1.12), 0.14),
    line(LEAF, (0.0, -0.55), (0.36, -1.0), 0.14),
    convex([255, 130, 20], &[(-0.6, -0.6), (0.6, -0.6), (0.08, 1.15), (-0.08, 1.15)]),
];
const COIN: &[Part] = &[
    disc(196, 142, 16, (0.0, 0.0), (0.95, 0.95)),
    disc(250, 212, 50, (0.0, 0.0), (0.74, 0.74)),
    rect([196, 142, 16], (-0.13, -0.4), (0.13, 0.4)),
];
const CUCUMBER: &[Part] =
    &[line([85, 175, 45], (-0.72, 0.1), (0.72, -0.1), 0.38), line([175, 225, 110], (-0.62, 0.02), (0.6, -0.16), 0.1)];
const DONUT: &[Part] = &[
    Part { shape: Shape::Ring { outer: 1.02, inner: 0.34 }, color: [214, 158, 100] },
    Part { shape: Shape::Ring { outer: 0.88, inner: 0.44 }, color: [250, 140, 178] },
];
const EGGPLANT: &[Part] = &[
    disc(100, 40, 145, (0.0, 0.22), (0.64, 0.84)),
    line(LEAF, (0.0, -0.6), (0.1, -1.08), 0.12),
    Part { shape: Shape::Ellipse { center: (0.0, -0.58), radii: (0.44, 0.22) }, color: LEAF },
];
const KITE: &[Part] = &[
    line([90, 90, 110], (0.0, 0.7), (0.42, 1.18), 0.09),
    convex([235, 45, 190], &[(0.0, -1.05), (0.78, -0.2), (0.0, 0.85), (-0.78, -0.2)]),
    convex([250, 150, 225], &[(0.0, -1.05), (0.78, -0.2), (0.0, -0.2)]),
];
const TIRE: &[Part] = &[
    disc(28, 28, 32, (0.0, 0.0), (1.0, 1.0)),
    disc(165, 168, 178, (0.0, 0.0), (0.5, 0.5)),
    disc(60, 60, 66, (0.0, 0.0), (0.18, 0.18)),
];
const TREE: &[Part] = &[
    rect(WOOD, (-0.17, 0.5), (0.17, 1.08)),
    convex([30, 140, 50], &[(0.0, -0.55), (0.88, 0.62), (-0.88, 0.62)]),
    convex([30, 140, 50], &[(0.0, -1.12), (0.62, -0.12), (-0.62, -0.12)]),
];
const PARTS: [&[Part]; 12] = [APPLE, BALL, BOOK, BOX, CARROT, COIN, CUCUMBER, DONUT, EGGPLANT, KITE, TIRE, TREE];

/// What the object number `object` is made of; the unit is its radius.
pub fn parts(object: usize) -> &'static [Part] {
    PARTS[object]
}

/// Paints an object of radius `radius` pixels around `center`, its colours shifted by `tint` (units of 1/255).
pub fn paint(canvas: &mut Canvas, object: usize, center: Point, radius: f32, tint: [f32; 3]) {
    canvas.paint(parts(object), Frame { origin: center, unit: radius }, tint);
}

const fn disc(red: u8, green: u8, blue: u8, center: Point, radii: Point) -> Part {
    Part { shape: Shape::Ellipse { center, radii }, color: [red, green, blue] }
}
