//! Skin tone in the portraits of the miniature world: finds the face where the world puts faces, takes the median
//! colour of its cheeks and chin, and puts its individual typology angle into one of four buckets.

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};

use super::ita::{bucket, ita_degrees, srgb_to_lab, BUCKETS, DEFAULT_CUTS};
use super::parity::Classifier;
use crate::miniature::portraits::{FACE_CENTER, FACE_RADIUS};
use crate::miniature::raster::{ensure_size, Point, SIZE, VALUES};

/// Classifier for [`super::parity::Parity`]; classes are those of [`BUCKETS`].
#[derive(Clone, Debug)]
pub struct MiniatureSkinTone {
    cuts: [f64; 3],
}

impl Default for MiniatureSkinTone {
    fn default() -> Self {
        MiniatureSkinTone { cuts: DEFAULT_CUTS }
    }
}

impl Classifier for MiniatureSkinTone {
    fn classes(&self) -> Vec<String> {
        BUCKETS.map(str::to_owned).to_vec()
    }

    fn check_size(&mut self, height: i64, width: i64) -> Result<()> {
        ensure_size("the miniature's skin-tone classifier", height, width)
    }

    /// Errors: pictures that are not f32-convertible [n, 3, 32, 32].
    fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>> {
        let size = images.size();
        let side = SIZE as i64;
        ensure!(
            size.len() == 4 && size[1..] == [3, side, side],
            "portraits must be [n, 3, {SIZE}, {SIZE}], not {size:?}"
        );
        let values: Vec<f32> = Vec::try_from(images.to_kind(Kind::Float).contiguous().flatten(0, -1))?;
        Ok(values.chunks(VALUES).map(|picture| self.tone(picture)).collect())
    }
}

/// Faces are sought up to this many pixels off [`FACE_CENTER`] along each axis; the world's own jitter is 1.
const REACH: i32 = 2;
/// Eye centres relative to the face, in pixels.
const EYES: [Point; 2] = [(-3.0, -1.5), (3.0, -1.5)];
/// Points of the row of the eyes that must be skin: between them and at the temples.
const BETWEEN_EYES: [Point; 3] = [(-5.8, -1.5), (0.0, -1.5), (5.8, -1.5)];
/// The darkest pixel of an eye is at most this bright, as a share of the skin's luma. Eyes as drawn reach 0.1 (light
/// skin) to 0.4 (dark).
const EYE_DARKNESS: f32 = 0.8;
/// How far the points between the eyes may be from the skin's colour in any channel; blurred eyes reach them.
const BETWEEN_TOLERANCE: f32 = 0.16;
/// At least this share of the skin area must have the skin's colour, within [`SKIN_TOLERANCE`].
const SKIN_SHARE: f32 = 0.6;
/// Largest difference of a channel from the median of the skin.
const SKIN_TOLERANCE: f32 = 0.10;
/// The background beside the face must differ from the skin by this much in some channel.
const BACKGROUND_DIFFERENCE: f32 = 0.08;
/// Skin is warmer than grey by at least this much (red over blue).
const WARMTH: f32 = 0.06;

impl MiniatureSkinTone {
    /// The bucket of the face in a planar picture [3, 32, 32], `None` without a face.
    fn tone(&self, picture: &[f32]) -> Option<usize> {
        let skin = find_face(picture)?;
        let ita = ita_degrees(srgb_to_lab(skin.map(|value| f64::from(value.clamp(0.0, 1.0)))));
        Some(bucket(ita, self.cuts))
    }
}

/// Skin colour of the most likely face, the one with the darkest eyes relative to its skin.
fn find_face(picture: &[f32]) -> Option<[f32; 3]> {
    let offsets = (-REACH..=REACH).flat_map(|dy| (-REACH..=REACH).map(move |dx| (dx as f32, dy as f32)));
    offsets
        .filter_map(|(dx, dy)| face_at(picture, (FACE_CENTER.0 + dx, FACE_CENTER.1 + dy)))
        .min_by(|a, b| a.eye_darkness.total_cmp(&b.eye_darkness))
        .map(|face| face.skin)
}

struct Face {
    skin: [f32; 3],
    /// Luma of the darkest pixel of the brighter eye over the luma of the skin.
    eye_darkness: f32,
}

/// The face centred at `center`, if there is one.
fn face_at(picture: &[f32], center: Point) -> Option<Face> {
    let area = pixels_where(center, is_bare_skin);
    let skin: [f32; 3] =
        std::array::from_fn(|plane| median(area.iter().map(|&at| picture[plane * PLANE + at]).collect()));
    let like_skin = |at: usize, tolerance: f32| {
        skin.iter().enumerate().all(|(plane, value)| (picture[plane * PLANE + at] - value).abs() < tolerance)
    };
    let even = area.iter().filter(|&&at| like_skin(at, SKIN_TOLERANCE)).count() as f32 / area.len() as f32;
    let beside = pixels_where(center, is_beside);
    let background = beside.iter().filter(|&&at| !like_skin(at, BACKGROUND_DIFFERENCE)).count() * 2 > beside.len();
    let warm = skin[0] - skin[2] > WARMTH && skin[0] >= skin[1] && skin[1] >= skin[2] - 0.06;

    let between = BETWEEN_EYES.iter().all(|point| {
        let pixels = pixels_where((center.0 + point.0, center.1 + point.1), is_column);
        pixels.iter().all(|&at| like_skin(at, BETWEEN_TOLERANCE))
    });
    let skin_luma = luma(skin);
    let darkest = |eye: &Point| {
        let pixels = pixels_where((center.0 + eye.0, center.1 + eye.1), is_eye);
        let lumas = pixels.iter().map(|&at| luma([0, 1, 2].map(|plane| picture[plane * PLANE + at])));
        lumas.fold(f32::INFINITY, f32::min)
    };
    let eye_darkness = EYES.iter().map(darkest).fold(0.0, f32::max) / skin_luma.max(1e-3);
    (even >= SKIN_SHARE && background && warm && between && eye_darkness <= EYE_DARKNESS)
        .then_some(Face { skin, eye_darkness })
}

const PLANE: usize = SIZE * SIZE;

/// Cheeks, nose and chin: inside the face, below the eyes, away from the mouth (coordinates relative to the face).
fn is_bare_skin((x, y): Point) -> bool {
    let inside = x * x + y * y < (FACE_RADIUS - 1.5).powi(2);
    let mouth = x.abs() < 3.2 && (2.2..5.8).contains(&y);
    inside && y > 0.0 && !mouth
}

/// Left and right of the face at the height of the cheeks.
fn is_beside((x, y): Point) -> bool {
    (FACE_RADIUS + 2.0..FACE_RADIUS + 4.0).contains(&x.abs()) && (-2.0..3.0).contains(&y)
}

/// Offsets within a plane of the pixels whose centre, relative to `center`, satisfies `wanted`.
fn pixels_where(center: Point, wanted: fn(Point) -> bool) -> Vec<usize> {
    (0..PLANE).filter(|at| wanted(((at % SIZE) as f32 + 0.5 - center.0, (at / SIZE) as f32 + 0.5 - center.1))).collect()
}

/// The four pixels around an eye's centre.
fn is_eye((x, y): Point) -> bool {
    x.abs() < 1.0 && y.abs() < 1.0
}

/// Pixels in the rows of the eyes, so that an edge along these rows is not taken for eyes.
fn is_column((x, y): Point) -> bool {
    x.abs() <= 0.5 && y.abs() < 1.0
}

fn luma(rgb: [f32; 3]) -> f32 {
    0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
}

fn median(mut values: Vec<f32>) -> f32 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f32::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::portraits;
    use crate::miniature::scene::{caption, draw, draw_only, flawless, Content};
    use crate::miniature::Edition;
    use crate::random::{Coordinates, Purpose};

    fn batch(pictures: &[Vec<f32>]) -> Tensor {
        Tensor::from_slice(&pictures.concat()).view([-1, 3, SIZE as i64, SIZE as i64])
    }

    /// Blurs with a 3×3 binomial kernel and shifts the colours, as a small VAE does.
    fn like_a_vae(images: &Tensor) -> Tensor {
        let kernel = Tensor::from_slice(&[1f32, 2.0, 1.0, 2.0, 4.0, 2.0, 1.0, 2.0, 1.0]).view([1, 1, 3, 3]) / 16.0;
        let kernel = kernel.repeat([3, 1, 1, 1]);
        let blurred =
            images.replication_pad2d([1, 1, 1, 1]).conv2d(&kernel, None::<&Tensor>, [1, 1], [0, 0], [1, 1], 3);
        let shift = Tensor::from_slice(&[0.02f32, -0.01, 0.02]).view([1, 3, 1, 1]);
        (blurred + shift).clamp(0.0, 1.0)
    }

    #[test]
    fn every_tone_of_every_portrait_falls_into_its_own_bucket() {
        let mut wrong = Vec::new();
        for content in flawless(Edition::Second) {
            let (tone, count) = match content {
                Content::Portrait { tone, .. } => (tone, 40),
                Content::Person { tone, .. } => (tone, 12),
                Content::Worker { tone, .. } => (tone, 6),
                _ => continue,
            };
            let pictures: Vec<_> = (0..count).map(|index| draw_only(content, 11, index).pixels).collect();
            for (blurred, images) in [(false, batch(&pictures)), (true, like_a_vae(&batch(&pictures)))] {
                for (index, label) in MiniatureSkinTone::default().classify(&images).unwrap().iter().enumerate() {
                    if *label != Some(tone) {
                        wrong.push((caption(content), tone, blurred, index, *label));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{} {:?}", wrong.len(), &wrong[..wrong.len().min(20)]);
    }

    /// Tells for every picture whether a face is found in it.
    fn faces(pictures: &[Vec<f32>]) -> Vec<bool> {
        MiniatureSkinTone::default().classify(&batch(pictures)).unwrap().iter().map(Option::is_some).collect()
    }

    #[test]
    fn no_face_in_the_other_pictures_of_the_world() {
        let scenes: Vec<_> = (0..6_000)
            .map(|index| draw(Edition::Second, 12, index))
            .filter(|scene| !scene.content.is_portrait())
            .collect();
        let found = faces(&scenes.iter().map(|scene| scene.pixels.clone()).collect::<Vec<_>>());
        let wrong: Vec<_> =
            scenes.iter().zip(found).filter(|(_, face)| *face).map(|(scene, _)| &scene.caption).collect();
        assert!(wrong.is_empty(), "faces in {} of {} pictures: {wrong:?}", wrong.len(), scenes.len());
    }

    #[test]
    fn no_face_in_plain_pictures_or_noise() {
        let plain = portraits::TONES.into_iter().chain([[0; 3], [128; 3], [255; 3]]);
        let mut pictures: Vec<Vec<f32>> =
            plain.map(|color| color.iter().flat_map(|&c| vec![f32::from(c) / 255.0; PLANE]).collect()).collect();
        let mut stream = Coordinates::new(1, Purpose::Sample).stream();
        for _ in 0..200 {
            pictures.push((0..VALUES).map(|_| stream.uniform() as f32).collect());
        }
        assert!(!faces(&pictures).contains(&true));
    }

    #[test]
    fn another_size_is_an_error() {
        let images = Tensor::zeros([2, 3, 16, 16], (Kind::Float, tch::Device::Cpu));
        assert!(MiniatureSkinTone::default().classify(&images).is_err());
    }
}
