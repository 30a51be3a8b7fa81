//! What CLIP's tokenizer does to a prompt before it cuts it into words: the repairs of the Python package `ftfy`
//! (6.x, its defaults) that a single character calls for.
//!
//! Curly quotes become straight, ligatures are spelled out, fullwidth and halfwidth forms become ordinary characters,
//! control characters and terminal escapes go, HTML entities are resolved where the text holds no `<`.
//!
//! Departures from ftfy: text that was decoded in the wrong encoding ("schÃ¶n") is not repaired, and of the named HTML
//! entities only the five of XML and `&nbsp;` are known. (Python's tokenizer, where ftfy is not installed, does none
//! of this and puts every Chinese character into a word of its own.)

/// The cleaned prompt; most prompts come out as they are.
pub fn clean(prompt: &str) -> String {
    let unescaped = if prompt.contains('<') { prompt.to_string() } else { resolve_entities(prompt) };
    let mut out = String::with_capacity(unescaped.len());
    let mut rest = unescaped.as_str();
    while let Some(c) = rest.chars().next() {
        if let Some(length) = terminal_escape(rest) {
            rest = &rest[length..];
            continue;
        }
        rest = &rest[c.len_utf8()..];
        push_repaired(&mut out, c);
    }
    out
}

fn push_repaired(out: &mut String, c: char) {
    match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => out.push('\''),
        '\u{201c}'..='\u{201f}' => out.push('"'),
        '\u{0}'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}' => {}
        '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}' => {}
        '\u{3000}' => out.push(' '),
        '\u{ff01}'..='\u{ff5e}' => out.extend(char::from_u32(c as u32 - 0xfee0)),
        '\u{ff5f}'..='\u{ffef}' => out.push_str(&compatible(c)),
        _ => match ligature(c) {
            Some(letters) => out.push_str(letters),
            None => out.push(c),
        },
    }
}

/// The compatibility form (NFKC) of one character.
fn compatible(c: char) -> String {
    let mut text = tokenizers::NormalizedString::from(c.to_string());
    text.nfkc();
    text.get().to_string()
}

fn ligature(c: char) -> Option<&'static str> {
    Some(match c {
        'Ĳ' => "IJ",
        'ĳ' => "ij",
        'ŉ' => "ʼn",
        'Ǆ' => "DŽ",
        'ǅ' => "Dž",
        'ǆ' => "dž",
        'Ǉ' => "LJ",
        'ǈ' => "Lj",
        'ǉ' => "lj",
        'Ǌ' => "NJ",
        'ǋ' => "Nj",
        'ǌ' => "nj",
        'Ǳ' => "DZ",
        'ǲ' => "Dz",
        'ǳ' => "dz",
        'ﬀ' => "ff",
        'ﬁ' => "fi",
        'ﬂ' => "fl",
        'ﬃ' => "ffi",
        'ﬄ' => "ffl",
        'ﬅ' => "ſt",
        'ﬆ' => "st",
        _ => return None,
    })
}

/// Bytes of the terminal's control sequence (`ESC [ 1 ; 31 m`) that `text` begins with.
fn terminal_escape(text: &str) -> Option<usize> {
    let arguments = text.strip_prefix("\x1b[")?;
    let end = arguments.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    arguments.as_bytes()[end].is_ascii_alphabetic().then_some(2 + end + 1)
}

fn resolve_entities(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        // an entity is short: the rest of a long text is not searched for every ampersand
        let end = after.bytes().take(25).position(|byte| byte == b';');
        match end.and_then(|end| Some((entity(&after[..end])?, end))) {
            Some((c, end)) => {
                out.push(c);
                rest = &after[end + 1..];
            }
            None => {
                out.push('&');
                rest = after;
            }
        }
    }
    out + rest
}

fn entity(name: &str) -> Option<char> {
    let number = name.strip_prefix('#');
    match (name, number) {
        ("amp", _) => Some('&'),
        ("lt", _) => Some('<'),
        ("gt", _) => Some('>'),
        ("quot", _) => Some('"'),
        ("apos", _) => Some('\''),
        ("nbsp", _) => Some('\u{a0}'),
        (_, Some(digits)) => {
            let code = match digits.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16),
                None => digits.parse(),
            };
            code.ok().and_then(char::from_u32)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn ordinary_prompts_stay() {
        for text in ["", "a cat", "café — déjà vu", "東京 😀", "R&D; a & b &c;", "x < y &amp; z", "trailing &"]
        {
            assert_eq!(clean(text), text);
        }
    }

    #[test]
    fn what_ftfy_repairs() {
        assert_eq!(clean("a conductor’s “hat” ‚low‘"), "a conductor's \"hat\" ‚low'".replace('‚', "'"));
        assert_eq!(clean("ﬁne ﬂoor ﬆone"), "fine floor stone");
        assert_eq!(clean("ＬＯＵＤ　ｱ"), "LOUD ア");
        assert_eq!(clean("red\x1b[1;31m car\u{feff}\u{7}"), "red car");
        assert_eq!(clean("cats &amp; dogs &#65;&#x42;&bogus; &#xFFFFFFFF;"), "cats & dogs AB&bogus; &#xFFFFFFFF;");
    }
}
