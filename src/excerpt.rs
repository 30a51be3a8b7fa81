//! What people are shown of a text that came from outside: a prompt, a cell of a table, a line that a program wrote. It may
//! be as long as a file and hold anything; messages, pages and sheets get a bounded piece of it, on one line.

use std::borrow::Cow;

/// Characters of a prompt in a log line or an error.
pub const IN_MESSAGES: usize = 120;
/// Characters of a caption on a picture or in a table of a page.
pub const IN_CAPTIONS: usize = 300;
/// Bytes of a text that goes along whole: a PNG's text chunk, the tooltip of a caption.
pub const WHOLE: usize = 64 << 10;

/// `text` on one line of at most `most` characters, "…" for what is cut off. White space and control characters, runs of
/// them, become one space; marks that turn the direction of writing around go, since they would turn what stands beside
/// the text around, too.
pub fn one_line(text: &str, most: usize) -> String {
    let mut line = String::new();
    let mut count = 0;
    let mut gap = false;
    for character in text.chars().filter(|&c| !turns_direction(c)) {
        if character.is_whitespace() || character.is_control() {
            gap = count > 0;
            continue;
        }
        let wanted = 1 + usize::from(gap);
        if count + wanted > most {
            // room for the ellipsis
            while count + 1 > most && line.pop().is_some() {
                count -= 1;
            }
            line.truncate(line.trim_end().len());
            line.push('…');
            return line;
        }
        if gap {
            line.push(' ');
        }
        line.push(character);
        count += wanted;
        gap = false;
    }
    line
}

/// As [`one_line`], in quotation marks.
pub fn quoted(text: &str, most: usize) -> String {
    format!("\"{}\"", one_line(text, most))
}

/// The first [`IN_MESSAGES`] characters of what a program wrote, in quotation marks, with everything that is no ordinary
/// character escaped; the line's end is left out.
pub fn escaped(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * IN_MESSAGES + 4)]).into_owned();
    let shown: String = start.chars().take(IN_MESSAGES).collect();
    let more = if shown.len() < start.len() || start.len() < bytes.len() { "…" } else { "" };
    format!("{shown:?}{more}")
}

/// `text` as it is, or its first `most` bytes (a few less where that is within a character) and "…".
pub fn bounded(text: &str, most: usize) -> Cow<'_, str> {
    if text.len() <= most {
        return Cow::Borrowed(text);
    }
    let end = (0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    Cow::Owned(format!("{}…", &text[..end]))
}

/// The beginning of `text` up to the first white space at or after byte `least`, all of it where there is none.
pub fn whole_words(text: &str, least: usize) -> &str {
    if text.len() <= least {
        return text;
    }
    let from = (least..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(text.len());
    text[from..].find(char::is_whitespace).map_or(text, |at| &text[..from + at])
}

/// Unicode's marks, embeddings, overrides and isolates of direction, and the byte-order mark.
fn turns_direction(character: char) -> bool {
    matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_short_and_has_no_surprises() {
        for (text, most, wanted) in [
            ("a cat", 5, "a cat"),
            ("a cats", 5, "a ca…"),
            ("a cat on a mat", 6, "a cat…"),
            (" two\r\n\tlines \u{7}\0here ", 99, "two lines here"),
            ("a \u{202e}tac\u{202c} b", 99, "a tac b"),
            ("ééééé", 4, "ééé…"),
            ("x", 0, "…"),
            ("", 0, ""),
        ] {
            assert_eq!(one_line(text, most), wanted, "{text:?}");
        }
        assert_eq!(one_line(&"word ".repeat(400_000), 300).chars().count(), 300);
        assert_eq!(quoted("a\nb", 9), "\"a b\"");
    }

    #[test]
    fn what_a_program_wrote_is_escaped() {
        assert_eq!(escaped(b"load\x1b[1m\xff\n"), "\"load\\u{1b}[1m\u{fffd}\"");
        assert_eq!(escaped(b""), "\"\"");
        let long = escaped(&b"x".repeat(9000));
        assert_eq!(long, format!("\"{}\"…", "x".repeat(IN_MESSAGES)));
    }

    #[test]
    fn cuts_are_between_characters_and_words() {
        assert_eq!(bounded("aé", 3), "aé");
        assert_eq!(bounded("aéb", 2), "a…");
        assert_eq!(whole_words("one two three", 4), "one two");
        assert_eq!(whole_words("one two three", 3), "one");
        assert_eq!(whole_words("éé éé", 1), "éé");
        assert_eq!(whole_words("one", 2), "one");
    }
}
