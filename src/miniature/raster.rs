//! A very small software rasteriser: a square RGB canvas on which shapes are composited with antialiasing by
//! supersampling (3×3 points per pixel).

use anyhow::{ensure, Result};

/// Width and height of every picture, in pixels.
pub const SIZE: usize = 32;
/// Number of values of one picture: three planes of SIZE × SIZE.
pub const VALUES: usize = 3 * SIZE * SIZE;
/// # Errors
/// These are not the pixels of the miniature's pictures, which `what` is for.
pub fn ensure_size(what: &str, height: i64, width: i64) -> Result<()> {
    let side = SIZE as i64;
    ensure!([height, width] == [side; 2], "{what} is for pictures of {side}×{side} pixels, not of {width}×{height}");
    Ok(())
}

/// Sample points per pixel and axis.
const SUPERSAMPLES: usize = 3;

/// Red, green, blue in 0..=255.
pub type Rgb = [u8; 3];
/// x to the right, y downwards.
pub type Point = (f32, f32);

/// An area in the coordinates of a [`Frame`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// Axis-parallel ellipse.
    Ellipse { center: Point, radii: Point },
    /// Annulus around the origin.
    Ring { outer: f32, inner: f32 },
    /// Axis-parallel rectangle.
    Rect { min: Point, max: Point },
    /// Convex polygon, corners in either sense of rotation.
    Polygon(&'static [Point]),
    /// All points nearer than `half_width` to a segment: a line with round ends.
    Stroke { from: Point, to: Point, half_width: f32 },
}

/// A shape in one colour; an object is a list of parts, painted in order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    pub shape: Shape,
    pub color: Rgb,
}

pub const fn oval(color: Rgb, center: Point, radii: Point) -> Part {
    Part { shape: Shape::Ellipse { center, radii }, color }
}

pub const fn rect(color: Rgb, min: Point, max: Point) -> Part {
    Part { shape: Shape::Rect { min, max }, color }
}

/// Of a convex polygon.
pub const fn convex(color: Rgb, corners: &'static [Point]) -> Part {
    Part { shape: Shape::Polygon(corners), color }
}

/// A thick line with round ends.
pub const fn line(color: Rgb, from: Point, to: Point, half_width: f32) -> Part {
    Part { shape: Shape::Stroke { from, to, half_width }, color }
}

/// Where the coordinates of a shape lie on the canvas: origin and length of the unit, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frame {
    pub origin: Point,
    pub unit: f32,
}

impl Shape {
    pub fn contains(&self, (x, y): Point) -> bool {
        match *self {
            Shape::Ellipse { center, radii } => {
                ((x - center.0) / radii.0).powi(2) + ((y - center.1) / radii.1).powi(2) < 1.0
            }
            Shape::Ring { outer, inner } => {
                let square = x * x + y * y;
                square < outer * outer && square > inner * inner
            }
            Shape::Rect { min, max } => x > min.0 && x < max.0 && y > min.1 && y < max.1,
            Shape::Polygon(corners) => {
                let side = |i: usize| {
                    let (a, b) = (corners[i], corners[(i + 1) % corners.len()]);
                    (b.0 - a.0) * (y - a.1) - (b.1 - a.1) * (x - a.0) > 0.0
                };
                let first = side(0);
                (1..corners.len()).all(|i| side(i) == first)
            }
            Shape::Stroke { from, to, half_width } => {
                let (dx, dy) = (to.0 - from.0, to.1 - from.1);
                let along = ((x - from.0) * dx + (y - from.1) * dy) / (dx * dx + dy * dy);
                let along = along.clamp(0.0, 1.0);
                (x - from.0 - along * dx).powi(2) + (y - from.1 - along * dy).powi(2) < half_width * half_width
            }
        }
    }

    /// Smallest axis-parallel box around the shape: (left, top), (right, bottom).
    fn bounds(&self) -> (Point, Point) {
        match *self {
            Shape::Ellipse { center: (x, y), radii: (rx, ry) } => ((x - rx, y - ry), (x + rx, y + ry)),
            Shape::Ring { outer, .. } => ((-outer, -outer), (outer, outer)),
            Shape::Rect { min, max } => (min, max),
            Shape::Polygon(corners) => corners.iter().fold(
                ((f32::INFINITY, f32::INFINITY), (f32::NEG_INFINITY, f32::NEG_INFINITY)),
                |(low, high), &(x, y)| ((low.0.min(x), low.1.min(y)), (high.0.max(x), high.1.max(y))),
            ),
            Shape::Stroke { from, to, half_width: w } => {
                ((from.0.min(to.0) - w, from.1.min(to.1) - w), (from.0.max(to.0) + w, from.1.max(to.1) + w))
            }
        }
    }
}

/// A picture under construction: planar RGB, values in [0, 1].
#[derive(Clone, Debug, PartialEq)]
pub struct Canvas {
    pixels: Vec<f32>,
}

impl Canvas {
    /// A canvas of one colour, components in [0, 1].
    pub fn plain(color: [f32; 3]) -> Self {
        Canvas { pixels: color.iter().flat_map(|&c| std::iter::repeat_n(c, SIZE * SIZE)).collect() }
    }

    /// A canvas whose row `y` has the colour `row(y)`, components in [0, 1].
    pub fn rows(row: impl Fn(usize) -> [f32; 3]) -> Self {
        let mut canvas = Canvas { pixels: vec![0.0; VALUES] };
        for y in 0..SIZE {
            let color = row(y);
            for (plane, value) in color.into_iter().enumerate() {
                let start = plane * SIZE * SIZE + y * SIZE;
                canvas.pixels[start..start + SIZE].fill(value);
            }
        }
        canvas
    }

    /// Paints `shape` in `color` (components in [0, 1]); pixels on its edge are blended by covered area.
    pub fn fill(&mut self, shape: &Shape, frame: Frame, color: [f32; 3]) {
        let (low, high) = shape.bounds();
        let to_pixel = |value: f32, origin: f32| (origin + value * frame.unit).clamp(0.0, SIZE as f32);
        let columns = to_pixel(low.0, frame.origin.0) as usize..to_pixel(high.0, frame.origin.0).ceil() as usize;
        let rows = to_pixel(low.1, frame.origin.1) as usize..to_pixel(high.1, frame.origin.1).ceil() as usize;
        for row in rows {
            for column in columns.clone() {
                let covered = coverage(shape, frame, column, row);
                if covered > 0.0 {
                    for (plane, &value) in color.iter().enumerate() {
                        let pixel = &mut self.pixels[plane * SIZE * SIZE + row * SIZE + column];
                        *pixel += covered * (value - *pixel);
                    }
                }
            }
        }
    }

    /// Paints `parts` in order, every colour shifted by `tint` (in units of 1/255).
    pub fn paint(&mut self, parts: &[Part], frame: Frame, tint: [f32; 3]) {
        for part in parts {
            self.fill(&part.shape, frame, tinted(part.color, tint));
        }
    }

    /// Pulls every value towards `grey`: `contrast` 1 changes nothing, 0 gives a plain grey picture.
    pub fn wash_out(&mut self, contrast: f32, grey: f32) {
        for value in &mut self.pixels {
            *value = grey + contrast * (*value - grey);
        }
    }

    /// The finished picture: planar RGB [3, SIZE, SIZE], values in [0, 1].
    pub fn into_pixels(self) -> Vec<f32> {
        self.pixels
    }
}

/// `color` shifted by `tint` (in units of 1/255), as components in [0, 1].
pub fn tinted(color: Rgb, tint: [f32; 3]) -> [f32; 3] {
    std::array::from_fn(|i| ((f32::from(color[i]) + tint[i]) / 255.0).clamp(0.0, 1.0))
}

/// Share of the pixel at (`column`, `row`) that `shape` covers, in steps of 1 / SUPERSAMPLES².
pub fn coverage(shape: &Shape, frame: Frame, column: usize, row: usize) -> f32 {
    let at = |pixel: usize, sub: usize| pixel as f32 + (sub as f32 + 0.5) / SUPERSAMPLES as f32;
    let mut inside = 0;
    for sub_y in 0..SUPERSAMPLES {
        let y = (at(row, sub_y) - frame.origin.1) / frame.unit;
        for sub_x in 0..SUPERSAMPLES {
            let x = (at(column, sub_x) - frame.origin.0) / frame.unit;
            inside += u32::from(shape.contains((x, y)));
        }
    }
    inside as f32 / (SUPERSAMPLES * SUPERSAMPLES) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: Frame = Frame { origin: (16.0, 16.0), unit: 8.0 };

    fn painted_area(shape: Shape) -> f32 {
        let mut canvas = Canvas::plain([0.0; 3]);
        canvas.fill(&shape, FRAME, [1.0; 3]);
        canvas.into_pixels()[..SIZE * SIZE].iter().sum()
    }

    /// Areas in closed form. The 3×3 grid of points resolves 1/9 pixel; the largest error seen is 0.3 %; an
    /// edge along the grid may err by a third of a pixel.
    #[test]
    fn areas_are_right() {
        use std::f32::consts::PI;
        let unit = 64.0;
        // no edge through the sample points; area = half the cross product of the diagonals
        let kite: &[Point] = &[(0.03, -1.0), (1.02, 0.07), (0.0, 1.0), (-1.0, -0.05)];
        for (shape, area) in [
            (Shape::Ellipse { center: (0.1, 0.2), radii: (0.8, 0.5) }, PI * 0.4),
            (Shape::Ring { outer: 1.0, inner: 0.5 }, PI * 0.75),
            (Shape::Rect { min: (-0.5, -1.0), max: (0.75, 0.25) }, 1.5625),
            (Shape::Polygon(kite), 2.0218),
            (Shape::Stroke { from: (-0.6, -0.2), to: (0.6, 0.17), half_width: 0.3 }, 0.75345 + PI * 0.09),
        ] {
            let painted = painted_area(shape) / unit;
            println!("{shape:?}: {:.4}", painted / area - 1.0);
            assert!((painted / area - 1.0).abs() < 0.01, "{shape:?}: {painted} instead of {area}");
        }
    }

    #[test]
    fn a_shape_over_the_border_is_cut() {
        let mut canvas = Canvas::plain([0.0; 3]);
        canvas.fill(&Shape::Ring { outer: 3.0, inner: 0.0 }, Frame { origin: (0.0, 40.0), unit: 8.0 }, [1.0; 3]);
        let pixels = canvas.into_pixels();
        assert_eq!(pixels[31 * SIZE], 1.0, "bottom left is inside");
        assert_eq!(pixels[SIZE - 1], 0.0, "top right is outside");
    }
}
