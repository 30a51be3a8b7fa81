//! What open_clip's tokenizer does to a text before it cuts it into words: ftfy's repairs, HTML's entities resolved
//! twice, lower case. (White space and Unicode's composed form are the tokenizer's.)
//!
//! Of ftfy's repair of text that was read in the wrong encoding ("donâ€™t") this knows the common kind: UTF-8 read as
//! Windows-1252. Of HTML 5's 2,231 named entities it knows HTML 4's 252 and `&apos;`, those of Latin-1 without `;` too.

use super::prompt_cleaning::clean;

/// The text as open_clip's tokenizer sees it.
pub fn clean_for_open_clip(text: &str) -> String {
    let resolved = if text.contains('<') { text.to_string() } else { unescape(text) };
    let repaired = clean(&repair_encoding(&resolved));
    unescape(&unescape(&repaired)).trim().to_lowercase()
}

/// Windows-1252's characters of the bytes 0x80 to 0x9F; the five bytes without one stand for themselves.
const WINDOWS: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’',
    '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// The byte that Windows-1252 reads as `c`.
fn windows_byte(c: char) -> Option<u8> {
    match WINDOWS.iter().position(|&own| own == c) {
        Some(place) => Some(0x80 + place as u8),
        None => u8::try_from(u32::from(c)).ok(),
    }
}

/// Sequences that are UTF-8 read as Windows-1252 become the characters that were meant.
fn repair_encoding(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        match misread(rest) {
            Some((meant, length)) => {
                out.push(meant);
                rest = &rest[length..];
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

/// The character whose UTF-8 bytes `text` begins with in Windows-1252's reading, and the bytes of that reading. Only after
/// letters that such readings begin with nearly always.
fn misread(text: &str) -> Option<(char, usize)> {
    let first = text.chars().next()?;
    let count = match first {
        'Â' | 'Ã' | 'Ð' | 'Ñ' => 2,
        'â' | 'ï' => 3,
        'ð' => 4,
        _ => return None,
    };
    let read: Vec<char> = text.chars().take(count).collect();
    let bytes: Vec<u8> = read.iter().map(|&c| windows_byte(c)).collect::<Option<_>>()?;
    let meant = std::str::from_utf8(&bytes).ok()?.chars().next()?;
    Some((meant, read.iter().map(|c| c.len_utf8()).sum()))
}

/// As Python's `html.unescape`, for the entities that the module names.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        match reference(after) {
            Some((meant, length)) => {
                out.push_str(&meant);
                rest = &after[length..];
            }
            None => {
                out.push('&');
                rest = after;
            }
        }
    }
    out + rest
}

/// What the reference that `text` begins with, behind its `&`, stands for, and its bytes.
fn reference(text: &str) -> Option<(String, usize)> {
    if let Some(number) = text.strip_prefix('#') {
        let (digits, radix) = match number.strip_prefix(['x', 'X']) {
            Some(hex) => (hex, 16),
            None => (number, 10),
        };
        let length = digits.bytes().take_while(|b| char::from(*b).is_digit(radix)).count();
        let semicolon = usize::from(digits[length..].starts_with(';'));
        let before = text.len() - digits.len();
        (length > 0).then_some(())?;
        // a number beyond u64 is none of Unicode's either
        let code = u64::from_str_radix(&digits[..length], radix).unwrap_or(u64::MAX);
        return Some((numbered(code), before + length + semicolon));
    }
    let ends = |c: char| matches!(c, '\t' | '\n' | '\u{c}' | ' ' | '<' | '&' | '#' | ';');
    let name: String = text.chars().take_while(|&c| !ends(c)).take(32).collect();
    if text[name.len()..].starts_with(';') {
        if let Some(meant) = named(&name) {
            return Some((meant.to_string(), name.len() + 1));
        }
    }
    // without a semicolon the longest beginning that is a name of Latin-1's
    let ends = name.char_indices().map(|(at, c)| at + c.len_utf8()).rev();
    ends.filter(|&end| end > 1).find_map(|end| {
        let meant = named(&name[..end]).filter(|&c| u32::from(c) < 0x100 && &name[..end] != "apos")?;
        Some((meant.to_string(), end))
    })
}

fn numbered(code: u64) -> String {
    match code {
        0 | 0xd800..=0xdfff | 0x11_0000.. => '\u{fffd}'.to_string(),
        0x80..=0x9f => WINDOWS[code as usize - 0x80].to_string(),
        1..=8 | 0xb | 0xe..=0x1f | 0x7f | 0xfdd0..=0xfdef => String::new(),
        _ if code & 0xfffe == 0xfffe => String::new(),
        _ => char::from_u32(code as u32).map(String::from).unwrap_or_default(),
    }
}

fn named(name: &str) -> Option<char> {
    let in_capitals = matches!(name, "AMP" | "COPY" | "GT" | "LT" | "QUOT" | "REG");
    let name = if in_capitals { name.to_lowercase() } else { name.to_string() };
    if name == "apos" {
        return Some('\'');
    }
    let row = ENTITIES.split(' ').find_map(|row| row.strip_prefix(name.as_str())?.strip_prefix(':'))?;
    u32::from_str_radix(row, 16).ok().and_then(char::from_u32)
}

/// HTML 4's entities: name and code point.
const ENTITIES: &str = "\
    quot:22 amp:26 lt:3c gt:3e nbsp:a0 iexcl:a1 cent:a2 pound:a3 curren:a4 yen:a5 brvbar:a6 sect:a7 uml:a8 \
    copy:a9 ordf:aa laquo:ab not:ac shy:ad reg:ae macr:af deg:b0 plusmn:b1 sup2:b2 sup3:b3 acute:b4 micro:b5 \
    para:b6 middot:b7 cedil:b8 sup1:b9 ordm:ba raquo:bb frac14:bc frac12:bd frac34:be iquest:bf Agrave:c0 \
    Aacute:c1 Acirc:c2 Atilde:c3 Auml:c4 Aring:c5 AElig:c6 Ccedil:c7 Egrave:c8 Eacute:c9 Ecirc:ca Euml:cb \
    Igrave:cc Iacute:cd Icirc:ce Iuml:cf ETH:d0 Ntilde:d1 Ograve:d2 Oacute:d3 Ocirc:d4 Otilde:d5 Ouml:d6 \
    times:d7 Oslash:d8 Ugrave:d9 Uacute:da Ucirc:db Uuml:dc Yacute:dd THORN:de szlig:df agrave:e0 aacute:e1 \
    acirc:e2 atilde:e3 auml:e4 aring:e5 aelig:e6 ccedil:e7 egrave:e8 eacute:e9 ecirc:ea euml:eb igrave:ec \
    iacute:ed icirc:ee iuml:ef eth:f0 ntilde:f1 ograve:f2 oacute:f3 ocirc:f4 otilde:f5 ouml:f6 divide:f7 \
    oslash:f8 ugrave:f9 uacute:fa ucirc:fb uuml:fc yacute:fd thorn:fe yuml:ff OElig:152 oelig:153 Scaron:160 \
    scaron:161 Yuml:178 fnof:192 circ:2c6 tilde:2dc Alpha:391 Beta:392 Gamma:393 Delta:394 Epsilon:395 Zeta:396 \
    Eta:397 Theta:398 Iota:399 Kappa:39a Lambda:39b Mu:39c Nu:39d Xi:39e Omicron:39f Pi:3a0 Rho:3a1 Sigma:3a3 \
    Tau:3a4 Upsilon:3a5 Phi:3a6 Chi:3a7 Psi:3a8 Omega:3a9 alpha:3b1 beta:3b2 gamma:3b3 delta:3b4 epsilon:3b5 \
    zeta:3b6 eta:3b7 theta:3b8 iota:3b9 kappa:3ba lambda:3bb mu:3bc nu:3bd xi:3be omicron:3bf pi:3c0 rho:3c1 \
    sigmaf:3c2 sigma:3c3 tau:3c4 upsilon:3c5 phi:3c6 chi:3c7 psi:3c8 omega:3c9 thetasym:3d1 upsih:3d2 piv:3d6 \
    ensp:2002 emsp:2003 thinsp:2009 zwnj:200c zwj:200d lrm:200e rlm:200f ndash:2013 mdash:2014 lsquo:2018 \
    rsquo:2019 sbquo:201a ldquo:201c rdquo:201d bdquo:201e dagger:2020 Dagger:2021 bull:2022 hellip:2026 \
    permil:2030 prime:2032 Prime:2033 lsaquo:2039 rsaquo:203a oline:203e frasl:2044 euro:20ac image:2111 \
    weierp:2118 real:211c trade:2122 alefsym:2135 larr:2190 uarr:2191 rarr:2192 darr:2193 harr:2194 crarr:21b5 \
    lArr:21d0 uArr:21d1 rArr:21d2 dArr:21d3 hArr:21d4 forall:2200 part:2202 exist:2203 empty:2205 nabla:2207 \
    isin:2208 notin:2209 ni:220b prod:220f sum:2211 minus:2212 lowast:2217 radic:221a prop:221d infin:221e \
    ang:2220 and:2227 or:2228 cap:2229 cup:222a int:222b there4:2234 sim:223c cong:2245 asymp:2248 ne:2260 \
    equiv:2261 le:2264 ge:2265 sub:2282 sup:2283 nsub:2284 sube:2286 supe:2287 oplus:2295 otimes:2297 perp:22a5 \
    sdot:22c5 lceil:2308 rceil:2309 lfloor:230a rfloor:230b lang:2329 rang:232a loz:25ca spades:2660 clubs:2663 \
    hearts:2665 diams:2666";

#[cfg(test)]
mod tests {
    use super::*;

    /// Python's html.unescape, ftfy.fix_text and open_clip's basic_clean say the same of these.
    #[test]
    fn texts_as_open_clip_sees_them() {
        for (text, wanted) in [
            ("AT&amp;T &lt;b&gt; &quot;x&quot; &amp;amp; &#39;", "at&t <b> \"x\" & '"),
            ("don’t “quote”", "don't \"quote\""),
            ("â€™mojibakeâ€œ", "'mojibake\""),
            ("cafÃ© Â£5 Ð¿", "café £5 п"),
            ("É… naïve über ñandú â la carte", "é… naïve über ñandú â la carte"),
            (
                " Curly&rsquo;s &eacute;t&eacute &notit; &bogus; &#x80; &#0; A & B ",
                "curly's été ¬it; &bogus; € \u{fffd} a & b",
            ),
            ("x < y &amp;amp;lt; z", "x < y &lt; z"),
        ] {
            assert_eq!(clean_for_open_clip(text), wanted, "{text}");
        }
        assert_eq!(ENTITIES.split_whitespace().count(), 252);
    }
}
