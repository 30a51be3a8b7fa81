//! Pieces of HTML.

use anyhow::Result;

use crate::{
    excerpt::{bounded, one_line, IN_CAPTIONS},
    telemetry::{encode_png, Picture},
};

/// Bytes of a tooltip.
pub const TOOLTIP: usize = 4 << 10;

/// `text` as text or as an attribute in double quotes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// A prompt in a page: one line, the whole of it (up to a bound) where one points at it.
pub fn prompt(text: &str) -> String {
    let line = one_line(text, IN_CAPTIONS);
    let title = if line == text { String::new() } else { format!(" title=\"{}\"", escape(&bounded(text, TOOLTIP))) };
    format!("<bdi{title}>{}</bdi>", escape(&line))
}

/// A table: a heading row, then the rows, whose cells are HTML already. The first column is the heading of its row.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let cells: String = heading.iter().map(|cell| format!("<th scope=\"col\">{}</th>", escape(cell))).collect();
    let mut text = format!("<div class=\"wide\"><table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n");
    for row in rows {
        let mut cells = row.iter();
        let first = cells.next().map_or(String::new(), |cell| format!("<th scope=\"row\">{cell}</th>"));
        let others: String = cells.map(|cell| format!("<td>{cell}</td>")).collect();
        text.push_str(&format!("<tr>{first}{others}</tr>\n"));
    }
    text + "</tbody></table></div>\n"
}

/// An `<img>` with the picture inside.
pub fn image(picture: &Picture, alt: &str) -> Result<String> {
    Ok(image_of_png(&encode_png(picture, &[])?, (picture.width(), picture.height()), alt))
}

/// As [`image()`], of a PNG file's bytes.
pub fn image_of_png(png: &[u8], (width, height): (usize, usize), alt: &str) -> String {
    let small = if width < 128 { " class=\"small\"" } else { "" };
    format!(
        "<img{small} width=\"{width}\" height=\"{height}\" alt=\"{}\" loading=\"lazy\" src=\"data:image/png;base64,{}\">",
        escape(alt),
        base64(png)
    )
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..4 {
            let digit = ALPHABET[(word >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= three.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of RFC 4648, section 10, and all bytes.
    #[test]
    fn base64_has_its_known_values() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0x00]), "+/8A");
    }

    #[test]
    fn prompts_are_short_and_whole() {
        assert_eq!(prompt("a <b>"), "<bdi>a &lt;b&gt;</bdi>");
        assert_eq!(prompt("a\n\"b\""), "<bdi title=\"a\n&quot;b&quot;\">a &quot;b&quot;</bdi>");
        assert!(prompt(&"word ".repeat(100_000)).len() < TOOLTIP + 2 * IN_CAPTIONS);
    }

    #[test]
    fn nothing_breaks_out() {
        assert_eq!(escape("a < \"b\" & </td>"), "a &lt; &quot;b&quot; &amp; &lt;/td&gt;");
        let table = table(&["<x>", "y"], &[vec!["a".into(), "b".into()]]);
        assert!(table.contains("<th scope=\"col\">&lt;x&gt;</th>"), "{table}");
        assert!(table.contains("<tr><th scope=\"row\">a</th><td>b</td></tr>"), "{table}");
    }
}
