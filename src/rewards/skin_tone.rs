//! The attribute classifier of Eq. 12 for photographs: skin tone in four buckets, from pixels.
//!
//! 1. Faces by SeetaFace's detector (the `rustface` crate) on the luma; the largest one counts.
//! 2. Of its box the middle half in each direction: cheeks, nose and forehead without hair and background.
//! 3. Of these pixels the skin-coloured ones, by their chroma alone: 77 ≤ Cb ≤ 127 and 130 ≤ Cr ≤ 173 (full-range
//!    YCbCr). There is no bound on the luma, which would reject dark skin, and Cr begins at 130 instead of the usual 133,
//!    which the darkest swatch of the Monk scale does not reach.
//! 4. Of the remaining pixels the middle 80 % by lightness (no highlights, no pupils): mean L* and b*, their angle (ITA)
//!    and its bucket (`ita.rs`).
//!
//! No face, or fewer than 10 % skin-coloured pixels in it: no class, which `parity` charges as the worst. The paper's
//! own classifier is proprietary; this one measures the colour in the picture, light included, not a person.

use anyhow::{ensure, Context, Result};
use rustface::{Detector, FaceInfo, ImageData};
use sha2::{Digest, Sha256};
use tch::Tensor;

use super::{
    ita::{bucket, ita_degrees, srgb_to_lab, BUCKETS},
    parity::Classifier,
    rgb_bytes,
};
use crate::config::SkinToneSettings;

/// SHA-256 of `seeta_fd_frontal_v1.0.bin`, the only model of this format that was published.
const FACE_MODEL: &str = "c4619d066ed35e84d9a8e842860b0dff567aba0cbb139881075538761db3ff5d";
/// Share of the face's box, in each direction, that is looked at.
const MIDDLE: f64 = 0.5;
const CB: std::ops::RangeInclusive<f64> = 77.0..=127.0;
const CR: std::ops::RangeInclusive<f64> = 130.0..=173.0;
/// Below this share of skin-coloured pixels a face has no class.
const MIN_SKIN: f64 = 0.1;
/// Share of the pixels left out at each end of the lightness.
const TAIL: f64 = 0.1;

/// See the module.
pub struct SkinTone {
    detector: Box<dyn Detector>,
    cuts: [f64; 3],
}

impl SkinTone {
    /// # Errors
    /// A model file that cannot be read or is none.
    pub fn load(settings: &SkinToneSettings) -> Result<Self> {
        let path = &settings.face_model;
        let file = std::fs::read(path).with_context(|| format!("cannot read {path}"))?;
        // the crate's reader trusts every count in the file, so nothing but the published file is given to it
        let digest: String = Sha256::digest(&file).iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(digest == FACE_MODEL, "{path} is not SeetaFace's seeta_fd_frontal_v1.0.bin: its SHA-256 is {digest}");
        let model = rustface::read_model(file.as_slice()).with_context(|| format!("cannot read {path}"))?;
        let mut detector = rustface::create_detector_with_model(model);
        detector.set_min_face_size(settings.min_face_pixels);
        detector.set_score_thresh(settings.face_score);
        detector.set_pyramid_scale_factor(0.8);
        detector.set_slide_window_step(4, 4);
        Ok(SkinTone { detector, cuts: settings.cuts })
    }

    fn classify_one(&mut self, rgb: &[u8], width: usize, height: usize) -> Option<usize> {
        // the detector's window is 40 pixels wide
        if width < 40 || height < 40 {
            return None;
        }
        let luma: Vec<u8> = rgb.chunks_exact(3).map(|p| ycbcr(p)[0].round() as u8).collect();
        let faces = self.detector.detect(&ImageData::new(&luma, width as u32, height as u32));
        let area = |face: &FaceInfo| u64::from(face.bbox().width()) * u64::from(face.bbox().height());
        let largest = faces.iter().max_by_key(|face| area(face))?;
        let (across, down) = middle(largest, width, height);
        let pixels: Vec<&[u8]> =
            down.flat_map(|y| across.clone().map(move |x| &rgb[3 * (y * width + x)..][..3])).collect();
        Some(bucket(skin_angle(&pixels)?, self.cuts))
    }
}

impl Classifier for SkinTone {
    fn classes(&self) -> Vec<String> {
        BUCKETS.map(str::to_owned).to_vec()
    }

    fn classify(&mut self, images: &Tensor) -> Result<Vec<Option<usize>>> {
        let pictures = rgb_bytes(images)?;
        let (width, height) = (pictures.width, pictures.height);
        Ok(pictures.rgb.iter().map(|rgb| self.classify_one(rgb.as_ref()?, width, height)).collect())
    }
}

/// Columns and rows of the middle of a face's box, within the picture.
fn middle(face: &FaceInfo, width: usize, height: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
    let part = |start: i32, length: u32, limit: usize| {
        let centre = f64::from(start) + f64::from(length) / 2.0;
        let half = f64::from(length) * MIDDLE / 2.0;
        let clip = |v: f64| (v.round().max(0.0) as usize).min(limit);
        clip(centre - half)..clip(centre + half)
    };
    let bbox = face.bbox();
    (part(bbox.x(), bbox.width(), width), part(bbox.y(), bbox.height(), height))
}

/// Y, Cb, Cr of JPEG, 0 to 255.
fn ycbcr(rgb: &[u8]) -> [f64; 3] {
    let [r, g, b] = [0, 1, 2].map(|i| f64::from(rgb[i]));
    [
        0.299 * r + 0.587 * g + 0.114 * b,
        128.0 - 0.168736 * r - 0.331264 * g + 0.5 * b,
        128.0 + 0.5 * r - 0.418688 * g - 0.081312 * b,
    ]
}

/// ITA in degrees of the skin among the pixels; `None` where there is too little.
fn skin_angle(pixels: &[&[u8]]) -> Option<f64> {
    let is_skin = |pixel: &&&[u8]| {
        let [_, cb, cr] = ycbcr(pixel);
        CB.contains(&cb) && CR.contains(&cr)
    };
    let mut lab: Vec<[f64; 3]> =
        pixels.iter().filter(is_skin).map(|p| srgb_to_lab([0, 1, 2].map(|i| f64::from(p[i]) / 255.0))).collect();
    if lab.is_empty() || (lab.len() as f64) < MIN_SKIN * pixels.len() as f64 {
        return None;
    }
    lab.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let cut = (lab.len() as f64 * TAIL) as usize;
    let kept = &lab[cut..lab.len() - cut];
    let mean = |i: usize| kept.iter().map(|lab| lab[i]).sum::<f64>() / kept.len() as f64;
    Some(ita_degrees([mean(0), mean(1), mean(2)]))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::rewards::ita::DEFAULT_CUTS;

    const MONK: [u32; 10] =
        [0xf6ede4, 0xf3e7db, 0xf7ead0, 0xeadaba, 0xd7bd96, 0xa07e56, 0x825c43, 0x604134, 0x3a312a, 0x292420];

    fn bytes(hex: u32) -> [u8; 3] {
        [16, 8, 0].map(|shift| (hex >> shift) as u8)
    }

    /// A patch of each Monk tone with hair and highlight around it: the tone is found, all ten of them count as skin, and
    /// the four buckets are those of the plain swatches (5, 1, 1 and 3 of ten).
    #[test]
    fn every_skin_tone_counts_as_skin() {
        let mut counts = [0; 4];
        for hex in MONK {
            let tone = bytes(hex);
            let plain = ita_degrees(srgb_to_lab(tone.map(|c| f64::from(c) / 255.0)));
            // 8 % blue shadow, 8 % white, and some light and dark of the same colour within the tails
            let (blue, white) = ([20, 20, 60], [255, 255, 255]);
            let pixels: Vec<&[u8]> = (0..100)
                .map(|i| match i {
                    0..8 => &blue[..],
                    8..16 => &white,
                    _ => &tone,
                })
                .collect();
            let angle = skin_angle(&pixels).unwrap_or_else(|| panic!("{hex:06x} is not taken for skin"));
            assert!((angle - plain).abs() < 1e-9, "{hex:06x}: {angle} instead of {plain}");
            counts[bucket(angle, DEFAULT_CUTS)] += 1;
        }
        assert_eq!(counts, [5, 1, 1, 3]);
    }

    #[test]
    fn what_is_not_skin_has_no_angle() {
        for pixel in [[128, 128, 128], [30, 60, 200], [20, 160, 40], [0, 0, 0], [255, 255, 255]] {
            assert_eq!(skin_angle(&vec![&pixel[..]; 50]), None, "{pixel:?}");
        }
        let (skin, grey) = (bytes(MONK[5]), [90u8; 3]);
        let mut pixels = vec![&grey[..]; 95];
        pixels.extend(vec![&skin[..]; 5]);
        assert_eq!(skin_angle(&pixels), None, "5 % skin");
        assert_eq!(skin_angle(&[]), None);
    }

    fn settings(path: &Path) -> SkinToneSettings {
        let face_model = path.display().to_string();
        SkinToneSettings { face_model, min_face_pixels: 40, face_score: 2.0, cuts: DEFAULT_CUTS }
    }

    #[test]
    fn a_bad_model_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.bin");
        let e = format!("{:#}", SkinTone::load(&settings(&path)).err().unwrap());
        assert!(e.contains("cannot read"), "{e}");
        std::fs::write(&path, b"short").unwrap();
        let e = format!("{:#}", SkinTone::load(&settings(&path)).err().unwrap());
        assert!(e.contains("is not SeetaFace's") && !e.contains('\n'), "{e}");
    }

    /// The real detector: no face in noise or in a plain picture, of any size.
    #[test]
    fn no_face_no_class() {
        let Some(model) = data("faces/seeta_fd_frontal_v1.0.bin") else { return };
        let mut classifier = SkinTone::load(&settings(&model)).unwrap();
        for size in [[2, 3, 96, 64], [1, 3, 32, 32], [1, 3, 40, 200]] {
            let noise = Tensor::rand(size, (tch::Kind::Float, tch::Device::Cpu));
            for images in [&noise, &(&noise * 0.0 + 0.5), &(&noise * f64::NAN)] {
                assert!(classifier.classify(images).unwrap().iter().all(Option::is_none));
            }
        }
    }

    /// A photograph of a face, in four lights: as it is and with its colours scaled down, which lowers the angle. Named
    /// by RLDIFF_TEST_FACE: a frontal portrait of somebody with light skin.
    #[test]
    fn a_real_face_gets_darker_with_its_pixels() {
        let Some(model) = data("faces/seeta_fd_frontal_v1.0.bin") else { return };
        let Some(path) = std::env::var_os("RLDIFF_TEST_FACE") else {
            eprintln!("SKIPPED: RLDIFF_TEST_FACE does not name a photograph of a face");
            return;
        };
        let image = image::open(path).unwrap().to_rgb8();
        let (width, height) = image.dimensions();
        let mut classifier = SkinTone::load(&settings(&model)).unwrap();
        let found: Vec<Option<usize>> = [1.0, 0.75, 0.5, 0.3]
            .map(|factor| {
                let darker: Vec<u8> = image.as_raw().iter().map(|&v| (f32::from(v) * factor) as u8).collect();
                classifier.classify_one(&darker, width as usize, height as usize)
            })
            .to_vec();
        println!("{found:?}");
        let found: Vec<usize> = found.into_iter().map(|class| class.expect("a face with skin")).collect();
        assert!(found.is_sorted() && found[0] < found[3], "{found:?}");
    }

    fn data(file: &str) -> Option<PathBuf> {
        let path = std::env::var_os("RLDIFF_TEST_DATA").map(|folder| Path::new(&folder).join(file));
        if path.is_none() {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with {file}");
        }
        path
    }
}
