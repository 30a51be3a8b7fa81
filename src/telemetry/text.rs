//! Text on pictures: embedded fonts, sub-pixel placement, wrapping at words.
//!
//! plotters can draw text too, but its bitmap text drops the glyphs' side bearings and rounds every advance: the
//! point of "0.45" disappears into the zero.

use std::sync::LazyLock;

use ab_glyph::{point, Font, FontRef, GlyphId, PxScale, ScaleFont};

use super::picture::Picture;
use crate::excerpt::{one_line, IN_CAPTIONS};

pub(super) const BLACK: [u8; 3] = [24, 24, 28];
pub(super) const GREY: [u8; 3] = [105, 105, 112];

/// The first font that has a character draws it: the second one brings arrows and further symbols.
static FONTS: LazyLock<[FontRef<'static>; 2]> = LazyLock::new(|| {
    [epaint_default_fonts::UBUNTU_LIGHT, epaint_default_fonts::HACK_REGULAR]
        .map(|bytes| FontRef::try_from_slice(bytes).expect("the embedded fonts parse"))
});

/// A character's place on its line.
struct Placed {
    font: &'static FontRef<'static>,
    id: GlyphId,
    /// Pixels from the start of the line to the glyph's origin.
    x: f32,
}

/// Height and colour of a text, and whether its strokes are thickened (the font is a light one).
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    /// Pixels from the highest ascender to the lowest descender.
    pub size: f32,
    pub color: [u8; 3],
    pub bold: bool,
}

impl Style {
    pub fn plain(size: f32) -> Self {
        Style { size, color: BLACK, bold: false }
    }

    pub fn grey(size: f32) -> Self {
        Style { size, color: GREY, bold: false }
    }

    pub fn bold(size: f32) -> Self {
        Style { size, color: BLACK, bold: true }
    }

    /// Distance between lines, in pixels.
    pub fn line_height(self) -> usize {
        (self.size * 1.15).ceil() as usize
    }

    /// Width of `text` on one line, in pixels, rounded up.
    pub fn width(self, text: &str) -> usize {
        (self.place(text).1 + self.strokes().last().copied().unwrap_or(0.0)).ceil() as usize
    }

    /// Breaks `text` at spaces so that every line fits `width` pixels; a longer word is broken within.
    pub fn wrap(self, text: &str, width: usize) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            if let Some(line) = lines.last_mut() {
                let longer = format!("{line} {word}");
                if self.width(&longer) <= width {
                    *line = longer;
                    continue;
                }
            }
            lines.extend(self.pieces(word, width));
        }
        lines
    }

    /// As [`Style::wrap`], at most `most` lines of what [`one_line`] leaves of the text; the last one ends with "…" where
    /// there would be more.
    pub fn wrap_within(self, text: &str, width: usize, most: usize) -> Vec<String> {
        let text = one_line(text, IN_CAPTIONS);
        let mut lines = self.wrap(&text, width);
        if lines.len() > most {
            lines.truncate(most);
            if let Some(last) = lines.last_mut() {
                while !last.is_empty() && self.width(&format!("{last}…")) > width {
                    last.pop();
                }
                last.truncate(last.trim_end().len());
                last.push('…');
            }
        }
        lines
    }

    /// `word`, cut where it would not fit `width`; at least one character each.
    fn pieces(self, word: &str, width: usize) -> Vec<String> {
        let mut pieces = vec![String::new()];
        for character in word.chars() {
            let piece = pieces.last_mut().expect("starts with one piece");
            piece.push(character);
            if self.width(piece) > width && piece.chars().count() > 1 {
                piece.pop();
                pieces.push(character.to_string());
            }
        }
        pieces
    }

    /// Draws one line with its top left corner at (`x`, `y`).
    pub fn draw(self, on: &mut Picture, text: &str, x: usize, y: usize) {
        let ascent = FONTS[0].as_scaled(PxScale::from(self.size)).ascent();
        let baseline = (y as f32 + ascent).round();
        let (glyphs, _) = self.place(text);
        for shift in self.strokes() {
            for Placed { font, id, x: offset } in &glyphs {
                let origin = point(x as f32 + offset + shift, baseline);
                let Some(outline) = font.outline_glyph(id.with_scale_and_position(self.size, origin)) else { continue };
                let corner = outline.px_bounds().min;
                outline.draw(|dx, dy, coverage| {
                    on.blend(corner.x as i64 + i64::from(dx), corner.y as i64 + i64::from(dy), self.color, coverage);
                });
            }
        }
    }

    /// Draws lines one below the other, each centred between `x` and `x` + `width`.
    pub fn draw_centred(self, on: &mut Picture, lines: &[String], x: usize, y: usize, width: usize) {
        for (index, line) in lines.iter().enumerate() {
            let indent = width.saturating_sub(self.width(line)) / 2;
            self.draw(on, line, x + indent, y + index * self.line_height());
        }
    }

    /// The glyphs of one line and its length in pixels.
    fn place(self, text: &str) -> (Vec<Placed>, f32) {
        let mut glyphs: Vec<Placed> = Vec::new();
        let mut pen = 0.0;
        for character in text.chars() {
            let font = FONTS.iter().find(|font| font.glyph_id(character).0 != 0).unwrap_or(&FONTS[0]);
            let scaled = font.as_scaled(PxScale::from(self.size));
            let id = scaled.glyph_id(character);
            if let Some(previous) = glyphs.last().filter(|previous| std::ptr::eq(previous.font, font)) {
                pen += scaled.kern(previous.id, id);
            }
            glyphs.push(Placed { font, id, x: pen });
            pen += scaled.h_advance(id);
        }
        (glyphs, pen)
    }

    /// Offsets at which the glyphs are drawn over each other.
    fn strokes(self) -> &'static [f32] {
        if self.bold {
            &[0.0, 0.6]
        } else {
            &[0.0]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLE: Style = Style { size: 18.0, color: [0; 3], bold: false };

    #[test]
    fn wrapped_lines_fit_and_lose_no_word() {
        let text = "a portrait of a librarian, in an extraordinarily-long-place-name-of-the-north at dusk";
        for width in [40, 90, 128, 400] {
            let lines = STYLE.wrap(text, width);
            assert!(lines.iter().all(|line| STYLE.width(line) <= width), "{lines:?}");
            let joined: String = lines.concat().split_whitespace().collect();
            assert_eq!(joined, text.split_whitespace().collect::<String>());
        }
        assert_eq!(STYLE.wrap(text, 4000), [text]);
        assert!(STYLE.wrap("  ", 100).is_empty());
        // narrower than any character: one character a line, and it ends
        assert_eq!(STYLE.wrap("abc", 1).len(), 3);
    }

    #[test]
    fn captions_have_an_end() {
        let text = "a portrait of a librarian\nat\u{202e} dusk ".repeat(50_000);
        for (width, most) in [(128, 4), (200, 8), (40, 1)] {
            let lines = STYLE.wrap_within(&text, width, most);
            assert!(lines.len() == most && lines.iter().all(|line| STYLE.width(line) <= width), "{lines:?}");
            assert!(lines[most - 1].ends_with('…') && lines.iter().all(|line| !line.contains(char::is_control)));
        }
        assert_eq!(STYLE.wrap_within("a cat", 400, 8), ["a cat"]);
        // narrower than the ellipsis: it stands alone
        assert_eq!(STYLE.wrap_within("abc def", 1, 2)[1], "…");
    }

    /// The missing glyph of a font is its glyph 0.
    #[test]
    fn symbols_of_tables_and_equations_exist() {
        let (glyphs, _) = STYLE.place("±→←·×μσ√≤≥−…é");
        assert!(glyphs.iter().all(|glyph| glyph.id.0 != 0));
        assert!(STYLE.place("人").0[0].id.0 == 0, "neither font is expected to hold Chinese");
    }

    #[test]
    fn ink_stays_within_the_measured_box() {
        for style in [STYLE, Style { bold: true, ..STYLE }] {
            let (text, x, y) = ("Ågj|Qpwx 0.123 ± →", 10, 5);
            let mut picture = Picture::from_fn(300, 40, |_, _| [255; 3]);
            style.draw(&mut picture, text, x, y);
            let inked = |x: usize, y: usize| picture.pixel(x, y) != [255; 3];
            let columns: Vec<_> = (0..300).filter(|x| (0..40).any(|y| inked(*x, y))).collect();
            let rows: Vec<_> = (0..40).filter(|y| (0..300).any(|x| inked(x, *y))).collect();
            let (left, right) = (columns[0], columns[columns.len() - 1]);
            assert!(left >= x && right <= x + style.width(text), "{left}..{right}");
            assert!(rows[0] >= y && rows[rows.len() - 1] <= y + 18, "{rows:?}");
            // dark, not just a haze
            assert!((0..40).any(|y| (0..300).any(|x| picture.pixel(x, y)[0] < 60)));
        }
    }
}
