//! Finds the objects of the miniature world by shape and colour, with a confidence in [0, 1].
//!
//! For every object and a few radii there is a template: the pixels that each of the object's colours covers, and a
//! band just outside the object (with its hole, if it has one). At every position of the picture
//!
//! evidence = mean over the object's pixels of S(pixel, colour there) − λ · mean over the band of S(pixel, main colour),
//! S(x, c) = exp(−‖x − c‖² / 2σ²) in RGB,
//!
//! so that the right colours in the right places count for the object and its main colour beyond its outline counts
//! against it: a plain picture in the object's colour has evidence near 0. The confidence is a logistic function of
//! the highest evidence over positions and radii.

use std::collections::BTreeMap;

use anyhow::{anyhow, ensure, Result};
use tch::{Kind, Tensor};

use super::composition::Detector;
use crate::miniature::objects;
use crate::miniature::raster::{coverage, Frame, Rgb, SIZE};

/// σ of the colour similarity; the world varies colours by ±0.05 per channel.
const COLOR_SIGMA: f64 = 0.17;
/// λ, weight of the band outside the object.
const OUTSIDE_WEIGHT: f64 = 0.8;
/// Radii of the templates in pixels; the world draws pairs with 5.4 to 6.6.
const RADII: [f32; 4] = [5.2, 5.8, 6.4, 7.0];
/// Evidence at which the confidence is one half.
const MIDPOINT: f64 = 0.45;
/// Evidence that moves the log-odds by one.
const WIDTH: f64 = 0.08;
/// Templates reach this many pixels to each side of their centre.
const REACH: usize = 11;
const SIDE: usize = 2 * REACH + 1;

/// Detector for [`super::composition::Composition`] over the names of [`objects::NAMES`].
#[derive(Debug)]
pub struct MiniatureDetector {
    templates: Vec<Template>,
}

/// What is looked for: K colours and, per radius, where they belong.
#[derive(Debug)]
struct Template {
    /// f32 [K, 3, 1, 1].
    colors: Tensor,
    /// f32 [radii, K, SIDE, SIDE]; the positive weights sum to 1, the negative ones to −λ.
    kernels: Tensor,
}

impl Default for MiniatureDetector {
    fn default() -> Self {
        MiniatureDetector { templates: (0..objects::NAMES.len()).map(Template::new).collect() }
    }
}

impl MiniatureDetector {
    /// Confidence, f32 `[n]` in [0, 1], that `object` (an index into [`objects::NAMES`]) is in each of the pictures.
    pub fn confidence(&self, images: &Tensor, object: usize) -> Tensor {
        ((self.templates[object].evidence(images) - MIDPOINT) / WIDTH).sigmoid()
    }
}

impl Detector for MiniatureDetector {
    fn detect(&mut self, images: &Tensor, wanted: &[&[String]]) -> Result<Vec<Vec<f32>>> {
        let size = images.size();
        let side = SIZE as i64;
        ensure!(
            size.len() == 4 && size[1..] == [3, side, side],
            "pictures must be [n, 3, {SIZE}, {SIZE}], not {size:?}"
        );

        // one pass per object over the pictures that ask for it
        let mut asked: BTreeMap<usize, Vec<(usize, usize)>> = BTreeMap::new();
        for (picture, names) in wanted.iter().enumerate() {
            for (slot, name) in names.iter().enumerate() {
                let object = objects::index(name).ok_or_else(|| {
                    anyhow!("the miniature world has no object '{name}'; it has {}", objects::NAMES.join(", "))
                })?;
                asked.entry(object).or_default().push((picture, slot));
            }
        }
        let mut found: Vec<Vec<f32>> = wanted.iter().map(|names| vec![0.0; names.len()]).collect();
        for (object, places) in asked {
            let rows: Vec<i64> = places.iter().map(|&(picture, _)| picture as i64).collect();
            let confidence = self.confidence(&images.index_select(0, &Tensor::from_slice(&rows)), object);
            for (&(picture, slot), value) in places.iter().zip(Vec::<f32>::try_from(&confidence)?) {
                found[picture][slot] = value;
            }
        }
        Ok(found)
    }
}

impl Template {
    fn new(object: usize) -> Self {
        let colors = distinct_colors(object);
        let kernels: Vec<f32> = RADII.iter().flat_map(|&radius| kernel(object, &colors, radius)).collect();
        let values: Vec<f32> = colors.iter().flatten().map(|&c| f32::from(c) / 255.0).collect();
        let (count, side) = (colors.len() as i64, SIDE as i64);
        Template {
            colors: Tensor::from_slice(&values).view([count, 3, 1, 1]),
            kernels: Tensor::from_slice(&kernels).view([RADII.len() as i64, count, side, side]),
        }
    }

    /// Highest evidence over all positions and radii, f32 `[n]`. Beyond the border of the picture nothing is similar.
    fn evidence(&self, images: &Tensor) -> Tensor {
        let images = images.to_kind(Kind::Float).unsqueeze(1);
        let distance = (images - &self.colors.view([1, -1, 3, 1, 1])).square().sum_dim_intlist(2, false, Kind::Float);
        let similarity = (distance * (-0.5 / COLOR_SIGMA.powi(2))).exp();
        let padding = REACH as i64;
        let evidence = similarity.conv2d(&self.kernels, None::<&Tensor>, [1, 1], [padding, padding], [1, 1], 1);
        evidence.amax([1, 2, 3].as_slice(), false)
    }
}

/// The colours of an object's parts, each once, in the order of painting.
fn distinct_colors(object: usize) -> Vec<Rgb> {
    let mut colors = Vec::new();
    for part in objects::parts(object) {
        if !colors.contains(&part.color) {
            colors.push(part.color);
        }
    }
    colors
}

/// Weights [K, SIDE, SIDE] of the template of one radius.
fn kernel(object: usize, colors: &[Rgb], radius: f32) -> Vec<f32> {
    let visible = visible_shares(object, colors, radius);
    // pixels on an edge mix two colours: only what is more than half covered counts, the more the purer
    let mut weights: Vec<f32> = visible.iter().map(|&share| (2.0 * share - 1.0).max(0.0)).collect();
    let total: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= total);

    let area = |color: &usize| visible[color * PIXELS..(color + 1) * PIXELS].iter().sum::<f32>();
    let main = (0..colors.len()).max_by(|a, b| area(a).total_cmp(&area(b))).unwrap_or(0);
    let covered: Vec<f32> =
        (0..PIXELS).map(|at| (0..colors.len()).map(|color| visible[color * PIXELS + at]).sum()).collect();
    let band: Vec<usize> = (0..PIXELS).filter(|&at| is_in_band(&covered, at)).collect();
    for &at in &band {
        weights[main * PIXELS + at] -= OUTSIDE_WEIGHT as f32 / band.len() as f32;
    }
    weights
}

const PIXELS: usize = SIDE * SIDE;

/// Share of every pixel in which each colour is seen, [K, SIDE, SIDE]: later parts hide earlier ones.
fn visible_shares(object: usize, colors: &[Rgb], radius: f32) -> Vec<f32> {
    let center = REACH as f32 + 0.5;
    let frame = Frame { origin: (center, center), unit: radius };
    let mut visible = vec![0f32; colors.len() * PIXELS];
    for part in objects::parts(object) {
        for at in 0..PIXELS {
            let share = coverage(&part.shape, frame, at % SIDE, at / SIDE);
            for (color, value) in colors.iter().enumerate() {
                let seen = &mut visible[color * PIXELS + at];
                *seen = *seen * (1.0 - share) + if *value == part.color { share } else { 0.0 };
            }
        }
    }
    visible
}

/// Whether the pixel lies between 1.5 and 3 pixels outside the object (or inside its hole).
fn is_in_band(covered: &[f32], at: usize) -> bool {
    let square = |other: usize| {
        let (dx, dy) = ((at % SIDE).abs_diff(other % SIDE), (at / SIDE).abs_diff(other / SIDE));
        dx * dx + dy * dy
    };
    let nearest = (0..PIXELS).filter(|&other| covered[other] > 0.3).map(square).min().unwrap_or(usize::MAX);
    (2..=9).contains(&nearest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::places;
    use crate::miniature::scene::{draw_only, Content};

    fn batch(pictures: Vec<Vec<f32>>) -> Tensor {
        Tensor::from_slice(&pictures.concat()).view([-1, 3, SIZE as i64, SIZE as i64])
    }

    fn stats(what: &str, t: &Tensor) {
        let mut v: Vec<f32> = Vec::try_from(t).unwrap();
        v.sort_by(f32::total_cmp);
        let q = |p: f64| v[((v.len() - 1) as f64 * p) as usize];
        print!("{what} [{:.2} {:.2} {:.2} {:.2} {:.2}]  ", q(0.0), q(0.01), q(0.5), q(0.99), q(1.0));
    }

    #[test]
    fn tune() {
        let detector = MiniatureDetector::default();
        let blur = |x: &Tensor| {
            let kernel = Tensor::from_slice(&[1f32, 2.0, 1.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0]).view([1, 1, 3, 3]) / 16.0;
            x.replication_pad2d([1, 1, 1, 1]).conv2d(
                &kernel.repeat([3, 1, 1, 1]),
                None::<&Tensor>,
                [1, 1],
                [0, 0],
                [1, 1],
                3,
            )
        };
        let mut pictures = Vec::new();
        let mut shown = Vec::new();
        let n = objects::NAMES.len();
        for first in 0..n {
            for second in 0..n {
                if first == second {
                    continue;
                }
                for k in 0..4 {
                    let content = Content::Pair { first, second, relation: 0, second_drawn: k < 3 };
                    pictures.push(draw_only(content, 21, k).pixels);
                    shown.push((first, if k < 3 { second } else { first }));
                }
            }
        }
        let images = batch(pictures);
        let images = Tensor::cat(&[&images, &blur(&images)], 0);
        let m = shown.len();
        let start = std::time::Instant::now();
        for object in 0..n {
            let e = detector.templates[object].evidence(&images);
            let pick = |present: bool, half: usize| {
                let rows: Vec<i64> = (0..m)
                    .filter(|&i| (shown[i].0 == object || shown[i].1 == object) == present)
                    .map(|i| (i + half * m) as i64)
                    .collect();
                (e.index_select(0, &Tensor::from_slice(&rows)), rows)
            };
            print!("{:9}", objects::NAMES[object]);
            stats("present", &pick(true, 0).0);
            stats("blurred", &pick(true, 1).0);
            let (absent, rows) = pick(false, 0);
            stats("absent", &absent);
            stats("blurred", &pick(false, 1).0);
            let worst = rows[absent.argmax(0, false).int64_value(&[]) as usize] as usize;
            print!("worst {} {}  ", objects::NAMES[shown[worst].0], objects::NAMES[shown[worst].1]);
            let washed = batch(
                (0..places::NAMES.len())
                    .flat_map(|place| {
                        (0..10).map(move |i| draw_only(Content::Place { object, place, washed_out: true }, 5, i).pixels)
                    })
                    .collect(),
            );
            stats("washed", &detector.templates[object].evidence(&washed));
            let vivid = batch(
                (0..places::NAMES.len())
                    .flat_map(|place| {
                        (0..10)
                            .map(move |i| draw_only(Content::Place { object, place, washed_out: false }, 5, i).pixels)
                    })
                    .collect(),
            );
            stats("places", &detector.templates[object].evidence(&vivid));
            println!();
        }
        println!("{} evaluations in {:?}", images.size()[0] * n as i64, start.elapsed());
    }
}
