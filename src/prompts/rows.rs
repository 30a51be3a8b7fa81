//! Rows of TSV and CSV files with the lines where they begin.
//!
//! CSV is RFC 4180's, read strictly where a tolerant reader would swallow rows: a quote that never closes, text behind a
//! closing quote and a quoted field of more than [`MOST_LINES`] lines are errors. (The csv crate takes all three without
//! a word, which is why it is not used here.) A quote within an unquoted field is a character as any other. In TSV all
//! quotes are. Lines end with LF, CR LF or CR.

use std::borrow::Cow;

use anyhow::{bail, ensure, Result};

use crate::excerpt::{quoted, IN_MESSAGES};

/// Lines of a quoted field; one of more has taken the rows below it for its own.
const MOST_LINES: u64 = 100;

/// How the fields of a row are parted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Tabs; quotes are characters as any other.
    Tsv,
    /// Commas; a field in double quotes may hold commas, line ends and doubled quotes.
    Csv,
}

impl Format {
    fn delimiter(self) -> u8 {
        match self {
            Format::Tsv => b'\t',
            Format::Csv => b',',
        }
    }
}

/// A row of a table.
pub struct Row<'b> {
    /// Number, from 1, of the line in which it begins.
    pub line: u64,
    /// Lines that it takes.
    pub lines: u64,
    pub fields: Vec<Cow<'b, [u8]>>,
}

impl Row<'_> {
    /// Nothing stands in its line.
    pub fn is_blank(&self) -> bool {
        self.fields.len() == 1 && self.fields[0].trim_ascii().is_empty()
    }
}

/// Reads rows one after the other.
pub struct Rows<'b> {
    rest: &'b [u8],
    format: Format,
    /// Number of the line that comes next.
    line: u64,
}

impl<'b> Rows<'b> {
    pub fn new(bytes: &'b [u8], format: Format) -> Self {
        Rows { rest: bytes, format, line: 1 }
    }

    /// The next row; none at the end.
    ///
    /// # Errors
    /// Quotes that do not close, or not where a field ends; their line is named.
    pub fn next(&mut self) -> Result<Option<Row<'b>>> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (line, mut fields) = (self.line, Vec::new());
        loop {
            fields.push(match (self.format, self.rest.first()) {
                (Format::Csv, Some(b'"')) => Cow::Owned(self.quoted_field()?),
                _ => Cow::Borrowed(self.plain_field()),
            });
            match self.rest.first() {
                Some(&byte) if byte == self.format.delimiter() => self.rest = &self.rest[1..],
                _ => break,
            }
        }
        self.end_line();
        Ok(Some(Row { line, lines: self.line - line, fields }))
    }

    fn plain_field(&mut self) -> &'b [u8] {
        let delimiter = self.format.delimiter();
        let ends = |&byte: &u8| byte == delimiter || byte == b'\n' || byte == b'\r';
        let (field, rest) = self.rest.split_at(self.rest.iter().position(ends).unwrap_or(self.rest.len()));
        self.rest = rest;
        field
    }

    /// A field in quotes, without them.
    fn quoted_field(&mut self) -> Result<Vec<u8>> {
        let (opened, inside) = (self.line, &self.rest[1..]);
        let start = || quoted(&String::from_utf8_lossy(&inside[..inside.len().min(400)]), 60);
        self.rest = inside;
        let mut field = Vec::new();
        loop {
            let Some(quote) = self.rest.iter().position(|&byte| byte == b'"') else {
                bail!("line {opened}: a quote opens here, before {}, and never closes", start());
            };
            let (part, after) = self.rest.split_at(quote);
            field.extend(part);
            self.line += line_ends(part);
            self.rest = &after[1..];
            ensure!(
                self.line - opened < MOST_LINES,
                "line {opened}: the quote that opens here, before {}, closes only in line {}: is one missing?",
                start(),
                self.line
            );
            match self.rest.strip_prefix(b"\"") {
                Some(rest) => {
                    field.push(b'"');
                    self.rest = rest;
                }
                None => break,
            }
        }
        // spaces between a closing quote and the comma are nobody's
        let spaces = self.rest.iter().take_while(|&&byte| byte == b' ' || byte == b'\t').count();
        let after = &self.rest[spaces..];
        if after.first().is_some_and(|byte| ![self.format.delimiter(), b'\n', b'\r'].contains(byte)) {
            let behind = String::from_utf8_lossy(&self.rest[..self.rest.len().min(IN_MESSAGES)]).into_owned();
            let behind = behind.split(['\n', '\r']).next().unwrap_or_default();
            let closes = if self.line == opened { String::new() } else { format!(", which opens in line {opened},") };
            bail!(
                "line {}: behind the closing quote of a field{closes} stands {}: is a quote not closed, or one within the \
                 field not doubled?",
                self.line,
                quoted(behind, 60)
            );
        }
        self.rest = after;
        Ok(field)
    }

    /// Takes the end of a line, if there is one.
    fn end_line(&mut self) {
        let rest = self.rest.strip_prefix(b"\r\n").or(self.rest.get(1..));
        self.rest = rest.unwrap_or_default();
        self.line += 1;
    }
}

/// How many lines end within `bytes`.
fn line_ends(bytes: &[u8]) -> u64 {
    let ends = |i: &usize| bytes[*i] == b'\n' || bytes[*i] == b'\r' && bytes.get(i + 1) != Some(&b'\n');
    (0..bytes.len()).filter(ends).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutations::mutate;

    fn rows(bytes: &[u8], format: Format) -> Result<Vec<(u64, Vec<String>)>> {
        let mut rows = Rows::new(bytes, format);
        let mut all = Vec::new();
        while let Some(row) = rows.next()? {
            all.push((row.line, row.fields.iter().map(|f| String::from_utf8_lossy(f).into_owned()).collect()));
        }
        Ok(all)
    }

    #[test]
    fn fields_and_lines() {
        let csv = b"id,prompt\r\n1,\"a \"\"red\"\" cat, sitting\"\r\n2,\"two\nlines\" \n\n3,7\" of rain\r4,";
        let expected: [(u64, &[&str]); 6] = [
            (1, &["id", "prompt"]),
            (2, &["1", "a \"red\" cat, sitting"]),
            (3, &["2", "two\nlines"]),
            (5, &[""]),
            (6, &["3", "7\" of rain"]),
            (7, &["4", ""]),
        ];
        let found = rows(csv, Format::Csv).unwrap();
        assert_eq!(found.len(), expected.len());
        for ((line, fields), (wanted_line, wanted)) in found.iter().zip(expected) {
            assert_eq!((*line, fields.iter().map(String::as_str).collect::<Vec<_>>()), (wanted_line, wanted.to_vec()));
        }
        let tsv = rows(b"\"quoted\tx\n7\" of rain, half\t\n", Format::Tsv).unwrap();
        assert_eq!(tsv[0].1, ["\"quoted", "x"]);
        assert_eq!(tsv[1], (2, vec!["7\" of rain, half".to_string(), String::new()]));
    }

    #[test]
    fn quotes_that_would_swallow_rows_are_errors_with_their_lines() {
        let far = format!("p\n\"a{}\"\n", "\nb".repeat(200));
        for (bytes, wanted) in [
            (&b"p\n\"a cat\nb\nc\n"[..], "line 2: a quote opens here, before \"a cat b c\", and never closes"),
            (
                b"p\n\"a\nb\n\"c\" of d\n",
                "line 4: behind the closing quote of a field, which opens in line 2, stands \"c\"",
            ),
            (b"p\n\"a \"red\" cat\"\n", "line 2: behind the closing quote of a field stands \"red"),
            (far.as_bytes(), "line 2: the quote that opens here, before \"a b b"),
        ] {
            let e = rows(bytes, Format::Csv).unwrap_err().to_string();
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
    }

    fn mutate_tables(rounds: usize) {
        let good = [&b"id,prompt\r\n1,\"a \"\"red\"\" cat\"\r\n2,plain\r\n"[..], b"prompt\tnote\n\"quoted\t\nx\ty\n"];
        mutate(&good.map(<[u8]>::to_vec), rounds, |bytes| {
            for format in [Format::Csv, Format::Tsv] {
                for (line, fields) in rows(bytes, format).unwrap_or_default() {
                    assert!(line > 0 && !fields.is_empty() && fields.iter().all(|f| f.len() <= 3 * bytes.len()));
                }
            }
        });
    }

    #[test]
    fn mutated_tables_never_panic() {
        mutate_tables(5000);
    }

    #[test]
    #[ignore = "200,000 mutated tables"]
    fn many_mutated_tables_never_panic() {
        mutate_tables(200_000);
    }
}
