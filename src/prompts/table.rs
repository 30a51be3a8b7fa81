//! Prompts from a column of a table: TSV as PartiPrompts has it (no quoting: one of its prompts begins with a quote),
//! or CSV as RFC 4180 has it (HRS-Bench).

use std::path::Path;

use anyhow::{anyhow, bail, Context, Result};

use super::listed::Texts;
use crate::{config::TablePrompts, user_file, word_list::WordList};

/// How the fields of a row are parted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Tabs; quotes are characters as any other.
    Tsv,
    /// Commas; a field in double quotes may hold commas, line ends and doubled quotes.
    Csv,
}

/// # Errors
/// A file that cannot be read, lacks the column (those it has are listed), has a row with more or fewer fields than
/// the header or that is not UTF-8 (its line is named).
pub fn load(settings: &TablePrompts, format: Format) -> Result<Texts> {
    let drop = WordList::load(&settings.drop_words)?;
    let path = Path::new(&settings.path);
    let bytes = user_file::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut texts = Texts::default();
    let read = column(&bytes, format, &settings.column, |prompt| {
        let prompt = prompt.trim();
        if !prompt.is_empty() && !drop.matches(prompt) {
            texts.insert(prompt);
        }
    });
    read.with_context(|| path.display().to_string())?;
    Ok(texts)
}

/// Calls `each` with the field of every row under the header `name`.
pub fn column(bytes: &[u8], format: Format, name: &str, mut each: impl FnMut(&str)) -> Result<()> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut builder = csv::ReaderBuilder::new();
    let mut rows = match format {
        Format::Tsv => builder.delimiter(b'\t').quoting(false),
        Format::Csv => &mut builder,
    }
    .from_reader(bytes);
    let text = |field: &[u8], line: u64| match std::str::from_utf8(field) {
        Ok(text) => Ok(text.to_string()),
        Err(_) => Err(anyhow!("line {line} is not UTF-8")),
    };
    let headers = rows.byte_headers()?.iter().map(|h| text(h, 1)).collect::<Result<Vec<_>>>()?;
    let Some(index) = headers.iter().position(|h| h.trim() == name) else {
        bail!("there is no column {name:?}; columns are {}", headers.join(", "));
    };
    let mut row = csv::ByteRecord::new();
    while rows.read_byte_record(&mut row)? {
        let line = row.position().map_or(0, |p| p.line());
        each(&text(&row[index], line)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutations::mutate;
    use crate::prompts::{listed::Listed, shared_texts::Store, PromptSource, Split};

    fn prompts(bytes: &[u8], format: Format, name: &str) -> Result<Vec<String>> {
        let mut found = Vec::new();
        column(bytes, format, name, |prompt| found.push(prompt.to_string()))?;
        Ok(found)
    }

    #[test]
    fn quotes_count_in_csv_only() {
        let csv = b"id,prompt\r\n1,\"a \"\"red\"\" cat, sitting\"\r\n2,\"two\nlines\"\r\n3,plain\r\n";
        assert_eq!(prompts(csv, Format::Csv, "prompt").unwrap(), ["a \"red\" cat, sitting", "two\nlines", "plain"]);
        let tsv = b"Prompt\tNote\n\"quoted\tx\n7\" of rain, half\t\n";
        assert_eq!(prompts(tsv, Format::Tsv, "Prompt").unwrap(), ["\"quoted", "7\" of rain, half"]);
    }

    #[test]
    fn mistakes_are_named() {
        for (bytes, wanted) in [
            (&b"id,text\n1,x\n"[..], "there is no column \"prompt\"; columns are id, text"),
            (b"id,prompt\n1,x\n2\n", "line: 3"),
            (b"id,prompt\n1,x\n2,\xff\n", "line 3 is not UTF-8"),
            (b"", "there is no column"),
        ] {
            let e = format!("{:#}", prompts(bytes, Format::Csv, "prompt").unwrap_err());
            assert!(e.contains(wanted) && !e.contains('\n'), "{e}");
        }
    }

    /// The published file: 1,632 rows, all different.
    #[test]
    fn the_real_parti_prompts() {
        let Some(path) = std::env::var_os("RLDIFF_TEST_DATA").map(|d| Path::new(&d).join("parti/PartiPrompts.tsv"))
        else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with parti/PartiPrompts.tsv");
            return;
        };
        let settings = TablePrompts {
            path: path.display().to_string(),
            column: "Prompt".into(),
            held_out: 32,
            split_seed: 1,
            drop_words: String::new(),
        };
        let source = Listed::new(Store::Own(load(&settings, Format::Tsv).unwrap()), 32, 1).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (1600, 32));
    }

    fn mutate_tables(rounds: usize) {
        let good = [&b"id,prompt\r\n1,\"a \"\"red\"\" cat\"\r\n2,plain\r\n"[..], b"prompt\tnote\n\"quoted\t\nx\ty\n"];
        mutate(&good.map(<[u8]>::to_vec), rounds, |bytes| {
            for format in [Format::Csv, Format::Tsv] {
                let _ = column(bytes, format, "prompt", |prompt| assert!(prompt.len() <= bytes.len()));
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
