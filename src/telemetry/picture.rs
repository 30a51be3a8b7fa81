//! Plain RGB pictures, and PNG files with text chunks.

use std::io::{BufRead, Cursor, Seek};
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};

use super::atomic_file::write_atomic;

/// An RGB picture, 8 bits per channel, rows from the top, pixels from the left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

impl Picture {
    /// `rgb` holds 3 · `width` · `height` bytes, row by row.
    pub fn new(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self> {
        ensure!(width > 0 && height > 0, "a picture of {width}×{height} pixels");
        let expected = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3));
        ensure!(expected == Some(rgb.len()), "{} bytes for {width}×{height} RGB pixels", rgb.len());
        Ok(Picture { width, height, rgb })
    }

    /// `color(x, y)` for every pixel. At least one pixel in each direction.
    pub fn from_fn(width: usize, height: usize, color: impl Fn(usize, usize) -> [u8; 3]) -> Self {
        let (width, height) = (width.max(1), height.max(1));
        let pixels = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
        Picture { width, height, rgb: pixels.flat_map(|(x, y)| color(x, y)).collect() }
    }

    /// From planes as the models make them: `chw` is f32 [3, `height`, `width`], 0 black, 1 full. Values outside
    /// [0, 1] are clamped, NaN becomes 0.
    pub fn from_planes(width: usize, height: usize, chw: &[f32]) -> Result<Self> {
        let plane = width * height;
        ensure!(chw.len() == 3 * plane, "{} values for 3 planes of {width}×{height}", chw.len());
        let rgb = (0..plane).flat_map(|pixel| (0..3).map(move |channel| chw[channel * plane + pixel])).map(to_byte);
        Picture::new(width, height, rgb.collect())
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn height(&self) -> usize {
        self.height
    }

    /// 3 · width · height bytes, row by row.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }

    /// The colour at (`x`, `y`), counted from the top left.
    ///
    /// # Panics
    /// Outside the picture.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        assert!(x < self.width && y < self.height, "({x}, {y}) outside {}×{}", self.width, self.height);
        let start = 3 * (y * self.width + x);
        [self.rgb[start], self.rgb[start + 1], self.rgb[start + 2]]
    }

    /// Every pixel as a square of `factor`² pixels.
    pub fn enlarged(&self, factor: usize) -> Self {
        let factor = factor.max(1);
        Picture::from_fn(self.width * factor, self.height * factor, |x, y| self.pixel(x / factor, y / factor))
    }

    /// The mean of every square of `factor`² pixels as one pixel; what is left over at the right and below is cut off.
    pub fn reduced(&self, factor: usize) -> Self {
        let factor = factor.clamp(1, self.width.min(self.height));
        let pixels = factor * factor;
        Picture::from_fn(self.width / factor, self.height / factor, |x, y| {
            let mut sums = [0; 3];
            for k in 0..pixels {
                let pixel = self.pixel(x * factor + k % factor, y * factor + k / factor);
                sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += usize::from(value));
            }
            sums.map(|sum| ((sum + pixels / 2) / pixels) as u8)
        })
    }

    /// Copies `other` onto this picture with its top left corner at (`x`, `y`); what does not fit is cut off.
    pub(super) fn paste(&mut self, other: &Picture, x: usize, y: usize) {
        let columns = other.width.min(self.width.saturating_sub(x));
        for row in 0..other.height.min(self.height.saturating_sub(y)) {
            let from = 3 * row * other.width;
            let to = 3 * ((y + row) * self.width + x);
            self.rgb[to..to + 3 * columns].copy_from_slice(&other.rgb[from..from + 3 * columns]);
        }
    }

    /// Mixes `color` into one pixel: `coverage` 0 leaves it, 1 replaces it. Outside the picture nothing happens.
    pub(super) fn blend(&mut self, x: i64, y: i64, color: [u8; 3], coverage: f32) {
        let (Ok(x), Ok(y)) = (usize::try_from(x), usize::try_from(y)) else { return };
        if x >= self.width || y >= self.height {
            return;
        }
        let start = 3 * (y * self.width + x);
        for (old, new) in self.rgb[start..start + 3].iter_mut().zip(color) {
            let mixed = f32::from(*old) + (f32::from(new) - f32::from(*old)) * coverage.clamp(0.0, 1.0);
            *old = mixed.round() as u8;
        }
    }

    pub(super) fn rgb_mut(&mut self) -> &mut [u8] {
        &mut self.rgb
    }
}

fn to_byte(value: f32) -> u8 {
    // `as` turns NaN into 0
    (value.clamp(0.0, 1.0) * 255.0).round() as u8
}

/// Writes a PNG atomically. `text` are (keyword, text) pairs for tEXt chunks, or iTXt where the text is not Latin-1:
/// the prompt, the seed, the digest of the weights. Keywords are Latin-1 and 1 to 79 characters long.
pub fn save_png(path: &Path, picture: &Picture, text: &[(String, String)]) -> Result<()> {
    let bytes = encode_png(picture, text).with_context(|| format!("cannot encode {}", path.display()))?;
    write_atomic(path, &bytes)
}

/// The picture and the text chunks of an 8-bit RGB PNG without transparency, as [`save_png`] writes it.
pub fn read_png(path: &Path) -> Result<(Picture, Vec<(String, String)>)> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    decode_png(&bytes).with_context(|| format!("cannot decode {}", path.display()))
}

pub(crate) fn encode_png(picture: &Picture, text: &[(String, String)]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let width = u32::try_from(picture.width).context("too wide for a PNG")?;
    let height = u32::try_from(picture.height).context("too high for a PNG")?;
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in text {
        // it would end the chunk's text
        let text = &text.replace('\0', " ");
        let fits = is_latin1(keyword) && (1..=79).contains(&keyword.chars().count());
        ensure!(fits, "text chunk keyword {keyword:?}: 1 to 79 Latin-1 characters are allowed");
        let added = if is_latin1(text) {
            encoder.add_text_chunk(keyword.clone(), text.clone())
        } else {
            encoder.add_itxt_chunk(keyword.clone(), text.clone())
        };
        added.with_context(|| format!("text chunk {keyword:?}"))?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&picture.rgb)?;
    writer.finish()?;
    Ok(bytes)
}

fn is_latin1(text: &str) -> bool {
    text.chars().all(|character| u32::from(character) < 256)
}

/// Width and height of a PNG.
pub(crate) fn picture_size(bytes: &[u8]) -> Result<(usize, usize)> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    Ok((reader.info().width as usize, reader.info().height as usize))
}

/// The text chunks of any PNG that stand before its pixels, without decoding these.
pub fn png_text(png: impl BufRead + Seek) -> Result<Vec<(String, String)>> {
    text_of(png::Decoder::new(png).read_info()?.info())
}

fn text_of(info: &png::Info) -> Result<Vec<(String, String)>> {
    let latin1 = info.uncompressed_latin1_text.iter().map(|chunk| (chunk.keyword.clone(), chunk.text.clone()));
    let mut text: Vec<_> = latin1.collect();
    for chunk in &info.utf8_text {
        text.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(text)
}

pub(super) fn decode_png(bytes: &[u8]) -> Result<(Picture, Vec<(String, String)>)> {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    let mut rgb = vec![0; reader.output_buffer_size().context("picture too large")?];
    let frame = reader.next_frame(&mut rgb)?;
    if (frame.color_type, frame.bit_depth) != (png::ColorType::Rgb, png::BitDepth::Eight) {
        bail!("{:?} with {:?} bits, expected 8-bit RGB", frame.color_type, frame.bit_depth);
    }
    let text = text_of(reader.info())?;
    Ok((Picture::new(frame.width as usize, frame.height as usize, rgb)?, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(width: usize, height: usize) -> Picture {
        Picture::from_fn(width, height, |x, y| [(x * 7) as u8, (y * 11) as u8, (x * y) as u8])
    }

    fn pair(keyword: &str, text: &str) -> (String, String) {
        (keyword.to_owned(), text.to_owned())
    }

    #[test]
    fn png_and_its_text_chunks_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let picture = pattern(17, 9);
        // Latin-1 goes to tEXt, the others to iTXt, which a reader lists after them
        let text = [pair("prompt", "a red cube, café"), pair("seed", "7"), pair("note", "μ ± σ 人")];
        save_png(&path, &picture, &text).unwrap();
        assert_eq!(read_png(&path).unwrap(), (picture, text.to_vec()));
        let bytes = std::fs::read(&path).unwrap();
        let holds = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
        assert!(holds(b"tEXtprompt\0a red cube, caf\xe9") && holds(b"iTXtnote\0"));
    }

    #[test]
    fn reducing_undoes_enlarging_and_takes_means() {
        let picture = pattern(5, 4);
        assert_eq!(picture.enlarged(3).reduced(3), picture);
        assert_eq!(picture.reduced(1), picture);
        // 0, 1, 2, 4 in red: 1.75 is rounded; the fifth column is cut off
        let values = [[0, 9, 9], [1, 9, 9], [2, 9, 9], [4, 9, 9]];
        let four = Picture::from_fn(5, 4, |x, y| values[(x % 2 + 2 * (y % 2)) % 4]);
        assert_eq!(four.reduced(2), Picture::from_fn(2, 2, |_, _| [2, 9, 9]));
        assert_eq!((four.reduced(99).width(), four.reduced(99).height()), (1, 1));
    }

    #[test]
    fn bad_keywords_and_files_are_errors_with_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for keyword in ["", &"k".repeat(80), "ключ"] {
            let error = format!("{:#}", save_png(&path, &pattern(1, 1), &[pair(keyword, "x")]).unwrap_err());
            assert!(error.contains("a.png") && error.contains(keyword), "{error}");
        }
        std::fs::write(&path, b"no png").unwrap();
        assert!(format!("{:#}", read_png(&path).unwrap_err()).contains("a.png"));
    }

    #[test]
    fn planes_are_clamped_and_interleaved() {
        // 2×1 pixels: planes R, G, B
        let planes = [0.0, 1.0, 0.5, -3.0, 7.0, f32::NAN];
        let picture = Picture::from_planes(2, 1, &planes).unwrap();
        assert_eq!(picture.rgb(), [0, 128, 255, 255, 0, 0]);
        assert!(Picture::from_planes(2, 2, &planes).is_err());
        assert!(Picture::new(2, 2, vec![0; 11]).is_err());
        assert!(Picture::new(0, 2, vec![]).is_err());
    }

    #[test]
    fn enlarging_repeats_pixels_and_pasting_cuts() {
        let small = pattern(3, 2);
        let large = small.enlarged(4);
        assert_eq!((large.width(), large.height()), (12, 8));
        assert_eq!(large.pixel(11, 7), small.pixel(2, 1));
        assert_eq!(large.pixel(3, 4), small.pixel(0, 1));

        let mut sheet = Picture::from_fn(4, 3, |_, _| [255; 3]);
        sheet.paste(&small, 2, 1);
        assert_eq!(sheet.pixel(3, 2), small.pixel(1, 1));
        assert_eq!(sheet.pixel(1, 2), [255; 3]);
        sheet.paste(&small, 9, 9);
    }

    #[test]
    fn blending_is_linear_and_stays_inside() {
        let mut picture = Picture::from_fn(2, 2, |_, _| [100; 3]);
        picture.blend(1, 0, [200, 0, 100], 0.5);
        assert_eq!(picture.pixel(1, 0), [150, 50, 100]);
        let before = picture.clone();
        for (x, y) in [(-1, 0), (2, 0), (0, 2)] {
            picture.blend(x, y, [0; 3], 1.0);
        }
        assert_eq!(picture, before);
    }
}
