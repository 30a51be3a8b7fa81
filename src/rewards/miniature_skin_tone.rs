//! Skin tone in the portraits of the miniature world: finds the face where the world puts faces, takes the median
//! colour of its cheeks and chin, and puts its individual typology angle into one of four buckets.

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};

use super::ita::{bucket, ita_degrees, srgb_to_lab, BUCKETS, DEFAULT_CUTS};
use super::parity::Classifier;
use crate::miniature::portraits::{FACE_CENTER, FACE_RADIUS};
use crate::miniature::raster::{Point, SIZE, VALUES};

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
/// An eye is at most this bright, as a share of the skin's luma. Eyes as drawn reach 0.1 (light skin) to 0.4 (dark).
const EYE_DARKNESS: f32 = 0.82;
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
    /// Luma of the brighter eye over the luma of the skin.
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
    let warm = skin[0] - skin[2] > WARMTH && skin[0] >= skin[1] && skin[1] >= skin[2] - 0.02;

    let skin_luma = 0.299 * skin[0] + 0.587 * skin[1] + 0.114 * skin[2];
    let eye_darkness =
        EYES.map(|eye| luma_around(picture, (center.0 + eye.0, center.1 + eye.1))).into_iter().fold(0.0, f32::max)
            / skin_luma.max(1e-3);
    (even >= SKIN_SHARE && background && warm && eye_darkness <= EYE_DARKNESS).then_some(Face { skin, eye_darkness })
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

/// Mean luma of the pixels within 1 pixel of a point.
fn luma_around(picture: &[f32], point: Point) -> f32 {
    let near = pixels_where(point, |(x, y)| x * x + y * y < 1.0);
    let luma = |&at: &usize| 0.299 * picture[at] + 0.587 * picture[PLANE + at] + 0.114 * picture[2 * PLANE + at];
    near.iter().map(luma).sum::<f32>() / near.len() as f32
}

fn median(mut values: Vec<f32>) -> f32 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f32::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miniature::scene::{draw, draw_only, Content};
    use crate::miniature::{objects, places, portraits};
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
    fn every_tone_of_every_occupation_falls_into_its_own_bucket() {
        for tone in 0..portraits::TONES.len() {
            for occupation in 0..portraits::OCCUPATIONS.len() {
                let content = Content::Portrait { occupation, tone };
                let pictures: Vec<_> = (0..40).map(|index| draw_only(content, 11, index).pixels).collect();
                for images in [batch(&pictures), like_a_vae(&batch(&pictures))] {
                    let labels = MiniatureSkinTone::default().classify(&images).unwrap();
                    let name = portraits::OCCUPATIONS[occupation];
                    assert!(labels.iter().all(|&label| label == Some(tone)), "{name}, tone {tone}: {labels:?}");
                }
            }
        }
    }

    #[test]
    fn no_face_where_there_is_none() {
        let mut pictures: Vec<Vec<f32>> = (0..4_000)
            .map(|index| draw(12, index))
            .filter(|scene| !matches!(scene.content, Content::Portrait { .. }))
            .map(|scene| scene.pixels)
            .collect();
        for object in 0..objects::NAMES.len() {
            for place in 0..places::NAMES.len() {
                pictures.push(draw_only(Content::Place { object, place, washed_out: false }, 1, 0).pixels);
            }
        }
        // plain pictures in grey and in every skin tone, and noise
        for color in portraits::TONES.into_iter().chain([[0; 3], [128; 3], [255; 3]]) {
            pictures.push(color.iter().flat_map(|&c| vec![f32::from(c) / 255.0; PLANE]).collect());
        }
        let mut stream = Coordinates::new(1, Purpose::Sample).stream();
        for _ in 0..200 {
            pictures.push((0..VALUES).map(|_| stream.uniform() as f32).collect());
        }
        let labels = MiniatureSkinTone::default().classify(&batch(&pictures)).unwrap();
        let found = labels.iter().flatten().count();
        assert_eq!(found, 0, "faces in {found} of {} pictures without", labels.len());
    }

    #[test]
    fn another_size_is_an_error() {
        let images = Tensor::zeros([2, 3, 16, 16], (Kind::Float, tch::Device::Cpu));
        assert!(MiniatureSkinTone::default().classify(&images).is_err());
    }
}
