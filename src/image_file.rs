//! Image files that a user gives, as bytes, to RGB pictures.

use std::{
    fs::File,
    io::{BufRead, BufReader, Cursor, Seek},
    path::Path,
};

use anyhow::{anyhow, ensure, Context, Result};
use image::{imageops::FilterType, ImageReader, Limits};

/// Wider or higher images are refused.
const MAX_SIDE: u32 = 16_384;
/// Images of more pixels are refused: the decoded one takes four times this.
const MAX_PIXELS: u64 = 100_000_000;

/// JPEG, PNG or WebP to RGB bytes `[height, width, 3]`: the largest part in the middle with the wanted shape, resized by
/// a cubic filter that averages where it shrinks. That is short side to size, then centre crop. Transparency is ignored.
///
/// # Errors
/// Broken bytes, another format, or an image above the limits.
pub fn decode_middle(bytes: &[u8], [height, width]: [u32; 2]) -> Result<Vec<u8>> {
    let image = decode_any(bytes)?;
    let (own_width, own_height) = (image.width(), image.height());
    // the larger of both parts that keep the wanted shape; at least one pixel
    let fit = |side: u32, own: u32, other: u32| {
        ((u64::from(side) * u64::from(own) + u64::from(other) / 2) / u64::from(other)).max(1) as u32
    };
    let (part_width, part_height) =
        match u64::from(own_width) * u64::from(height) > u64::from(own_height) * u64::from(width) {
            true => (fit(width, own_height, height).min(own_width), own_height),
            false => (own_width, fit(height, own_width, width).min(own_height)),
        };
    let (left, top) = ((own_width - part_width) / 2, (own_height - part_height) / 2);
    let part = image.crop_imm(left, top, part_width, part_height);
    Ok(part.resize_exact(width, height, FilterType::CatmullRom).to_rgb8().into_raw())
}

/// The image as it is, as RGB bytes. Errors as [`decode_middle`].
pub fn decode_whole(bytes: &[u8]) -> Result<image::RgbImage> {
    Ok(decode_any(bytes)?.to_rgb8())
}

/// Width and height, from the file's beginning. Errors as [`decode_middle`], but for what comes after it.
pub fn dimensions(path: &Path) -> Result<(u32, u32)> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let size = reader(BufReader::new(file))?.into_dimensions().map_err(broken)?;
    ensure_size(size)?;
    Ok(size)
}

fn decode_any(bytes: &[u8]) -> Result<image::DynamicImage> {
    ensure_size(reader(Cursor::new(bytes))?.into_dimensions().map_err(broken)?)?;
    reader(Cursor::new(bytes))?.decode().map_err(broken)
}

fn ensure_size((width, height): (u32, u32)) -> Result<()> {
    let pixels = u64::from(width) * u64::from(height);
    ensure!(
        width.max(height) <= MAX_SIDE && (1..=MAX_PIXELS).contains(&pixels),
        "{width} × {height} pixels; the limits are {MAX_SIDE} a side and {MAX_PIXELS} in all"
    );
    Ok(())
}

/// The decoders' errors on one line; as a chain they say everything twice.
fn broken(error: image::ImageError) -> anyhow::Error {
    anyhow!("broken image: {}", error.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
}

fn reader<R: BufRead + Seek>(bytes: R) -> Result<ImageReader<R>> {
    let mut reader = ImageReader::new(bytes).with_guessed_format().context("not an image")?;
    ensure!(reader.format().is_some(), "not an image (JPEG, PNG or WebP)");
    let mut limits = Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_PIXELS * 8);
    reader.limits(limits);
    Ok(reader)
}

#[cfg(test)]
pub mod tests {
    use image::{ImageFormat, Rgb, RgbImage};

    use super::*;
    use crate::mutations::mutate;

    pub fn encode(image: &RgbImage, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// Left third red, middle third green, right third blue.
    fn thirds(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| {
            let mut pixel = [0; 3];
            pixel[(x * 3 / width) as usize] = 255;
            Rgb(pixel)
        })
    }

    #[test]
    fn the_middle_in_the_models_size() {
        for format in [ImageFormat::Png, ImageFormat::WebP, ImageFormat::Jpeg] {
            // the middle square of 90 × 30 is all green
            let pixels = decode_middle(&encode(&thirds(90, 30), format), [16, 16]).unwrap();
            assert_eq!(pixels.len(), 16 * 16 * 3);
            let middle = &pixels[(8 * 16 + 8) * 3..][..3];
            assert!(middle[0] < 8 && middle[1] > 247 && middle[2] < 8, "{format:?}: {middle:?}");
        }
        // high images lose top and bottom, all three colours stay
        let pixels = decode_middle(&encode(&thirds(30, 90), ImageFormat::Png), [8, 24]).unwrap();
        assert_eq!(pixels.len(), 8 * 24 * 3);
        for (x, channel) in [(2, 0), (12, 1), (21, 2)] {
            assert_eq!(pixels[(4 * 24 + x) * 3 + channel], 255);
        }
        // smaller than wanted, and one pixel thin
        assert_eq!(decode_middle(&encode(&thirds(3, 3), ImageFormat::Png), [32, 32]).unwrap().len(), 32 * 32 * 3);
        assert_eq!(decode_middle(&encode(&thirds(600, 1), ImageFormat::Png), [32, 32]).unwrap().len(), 32 * 32 * 3);
    }

    /// An image that already has the size comes back as it is.
    #[test]
    fn the_same_size_changes_nothing() {
        let image = RgbImage::from_fn(20, 12, |x, y| Rgb([(x * 12) as u8, (y * 20) as u8, (x * y) as u8]));
        assert_eq!(decode_middle(&encode(&image, ImageFormat::Png), [12, 20]).unwrap(), image.into_raw());
    }

    #[test]
    fn absurd_images_are_refused() {
        // a PNG header that announces 100,000 × 100,000 pixels
        let mut png = encode(&thirds(3, 3), ImageFormat::Png);
        png[16..20].copy_from_slice(&100_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&100_000u32.to_be_bytes());
        let crc = crc32fast::hash(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        let e = format!("{:#}", decode_middle(&png, [8, 8]).unwrap_err());
        println!("{e}");
        assert!(!e.contains('\n'));
        for bytes in [&b""[..], b"GIF89a", b"\xff\xd8\xff\xe0 broken", &encode(&thirds(3, 3), ImageFormat::Png)[..40]] {
            assert!(decode_middle(bytes, [8, 8]).is_err());
        }
    }

    fn mutate_images(rounds: usize) {
        let images: Vec<Vec<u8>> =
            [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP].map(|f| encode(&thirds(17, 11), f)).to_vec();
        mutate(&images, rounds, |bytes| {
            if let Ok(pixels) = decode_middle(bytes, [8, 8]) {
                assert_eq!(pixels.len(), 8 * 8 * 3);
            }
        });
    }

    #[test]
    fn mutated_images_never_panic() {
        mutate_images(2000);
    }

    #[test]
    #[ignore = "100,000 mutated images take about a minute"]
    fn many_mutated_images_never_panic() {
        mutate_images(100_000);
    }
}
