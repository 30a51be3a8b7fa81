//! Prompts from a column of a table: TSV as PartiPrompts has it (no quoting: one of its prompts begins with a quote),
//! or CSV as RFC 4180 has it (HRS-Bench).

use std::path::Path;

use anyhow::{anyhow, bail, ensure, Context, Result};

pub use super::rows::Format;
use super::{
    reading::Reading,
    rows::{Row, Rows},
};
use crate::{
    config::TablePrompts,
    excerpt::{one_line, IN_MESSAGES},
    text_file::{self, as_text},
    word_list::WordList,
};

/// # Errors
/// A file that cannot be read, lacks the column (those it has are listed) or has it twice, has torn quotes, a row with
/// more or fewer fields than the header, or one that cannot be a prompt (its line is named).
pub fn load(settings: &TablePrompts, format: Format) -> Result<Reading> {
    let drop = WordList::load(&settings.drop_words)?;
    let path = Path::new(&settings.path);
    let bytes = text_file::bytes(path)?;
    let mut reading = Reading::new(path, "row", &settings.drop_words);
    column(&bytes, format, &settings.column, &drop, &mut reading).with_context(|| path.display().to_string())?;
    Ok(reading)
}

/// Adds the field of every row under the header `name`.
fn column(bytes: &[u8], format: Format, name: &str, drop: &WordList, reading: &mut Reading) -> Result<()> {
    let mut rows = Rows::new(bytes, format);
    let Some(header) = rows.next()? else { bail!("the file is empty") };
    let headers = header.fields.iter().map(|field| trimmed(field, 1)).collect::<Result<Vec<_>>>()?;
    let Some(index) = headers.iter().position(|header| header == name) else {
        let known = one_line(&headers.join(", "), 2 * IN_MESSAGES);
        bail!("there is no column {name:?}; columns are {known} (the first row){}", hint(&headers, format, name));
    };
    ensure!(!headers[index + 1..].contains(&headers[index]), "two columns are called {name:?}");
    let (mut quoted, mut all) = (0, 0);
    while let Some(row) = rows.next()? {
        if row.is_blank() && (headers.len() > 1 || row.lines == 1) {
            reading.leave_out(|counts| &mut counts.blank);
            continue;
        }
        same_width(&row, headers.len(), format)?;
        let is_header = |(field, header): (&std::borrow::Cow<[u8]>, &String)| field.trim_ascii() == header.as_bytes();
        if row.fields.iter().zip(&headers).all(is_header) {
            reading.leave_out(|counts| &mut counts.headers);
            continue;
        }
        let prompt = trimmed(&row.fields[index], row.line)?;
        reading.add_text(&prompt, drop);
        reading.note(|counts| &mut counts.several_lines, u64::from(prompt.contains(['\n', '\r'])));
        quoted += usize::from(prompt.len() > 1 && prompt.starts_with('"') && prompt.ends_with('"'));
        all += 1;
    }
    // one of PartiPrompts' is in quotes
    if format == Format::Tsv && quoted > 2 && 10 * quoted > all {
        log::warn!("{quoted} of {all} prompts are in quotes: in TSV these are part of the prompts");
    }
    Ok(())
}

fn trimmed(field: &[u8], line: u64) -> Result<String> {
    Ok(as_text(field).map_err(|what| anyhow!("line {line} {what}"))?.trim().to_string())
}

fn same_width(row: &Row, width: usize, format: Format) -> Result<()> {
    let found = row.fields.len();
    let why = match format {
        Format::Csv if found > width => ": a field with a comma must be in quotes",
        _ => "",
    };
    let of = |count: usize| format!("{count} field{}", if count == 1 { "" } else { "s" });
    ensure!(found == width, "line {} has {} where the header has {}{why}", row.line, of(found), of(width));
    Ok(())
}

/// What a table is that has one column, in whose name the wanted one is.
fn hint(headers: &[String], format: Format, name: &str) -> &'static str {
    let [header] = headers else { return ": is the row that names the columns missing?" };
    let parted = |by: char| header.split(by).any(|part| part.trim().trim_matches('"') == name);
    match format {
        _ if parted(';') => ": semicolons part its fields, commas (source = \"csv\") or tabs (\"tsv\") are wanted",
        _ if parted('|') => ": bars part its fields, commas (source = \"csv\") or tabs (\"tsv\") are wanted",
        Format::Csv if parted('\t') => ": tabs part its fields: source = \"tsv\" reads it",
        Format::Tsv if parted(',') => ": commas part its fields: source = \"csv\" reads it",
        _ => ": is the row that names the columns missing?",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::{
        listed::{Listed, Texts},
        shared_texts::Store,
        PromptSource, Split,
    };

    fn read(bytes: &[u8], format: Format, name: &str) -> Result<(Texts, String)> {
        let mut reading = Reading::new(Path::new("t"), "row", "");
        column(bytes, format, name, &WordList::default(), &mut reading)?;
        let (texts, counts) = reading.end();
        Ok((texts, counts.to_string()))
    }

    fn prompts(bytes: &[u8], format: Format, name: &str) -> Result<Vec<String>> {
        let (texts, _) = read(bytes, format, name)?;
        Ok((0..texts.len()).map(|i| texts.get(i).to_string()).collect())
    }

    #[test]
    fn quotes_count_in_csv_only() {
        let csv = b"id,prompt\r\n1,\"a \"\"red\"\" cat, sitting\"\r\n2,\"two\nlines\"\r\n3,plain\r\n";
        assert_eq!(prompts(csv, Format::Csv, "prompt").unwrap(), ["a \"red\" cat, sitting", "two\nlines", "plain"]);
        let tsv = b"Prompt\tNote\n\"quoted\tx\n7\" of rain, half\t\n";
        assert_eq!(prompts(tsv, Format::Tsv, "Prompt").unwrap(), ["\"quoted", "7\" of rain, half"]);
    }

    #[test]
    fn every_row_is_a_prompt_or_counted() {
        let csv = b"id,prompt\n1,a\n\n2,\"b\nc\"\n3,  \nid,prompt\n4,a\n";
        let said = "t: 6 rows: 2 prompts, 2 blank, 1 repeated, 1 like the header; 1 over several lines, in quotes";
        assert_eq!(read(csv, Format::Csv, "prompt").unwrap().1, said);
        assert_eq!(read(b"p\r\ra\rb\r", Format::Csv, "p").unwrap().1, "t: 3 rows: 2 prompts, 1 blank");
    }

    #[test]
    fn mistakes_are_named() {
        for (bytes, format, wanted) in [
            (
                &b"id,text\n1,x\n"[..],
                Format::Csv,
                "there is no column \"prompt\"; columns are id, text (the first row)",
            ),
            (b"a cat\na dog\n", Format::Csv, "is the row that names the columns missing?"),
            (b"id;prompt\n1;x\n", Format::Csv, "semicolons part its fields"),
            (b"id\tprompt\n1\tx\n", Format::Csv, "source = \"tsv\" reads it"),
            (b"id,\"prompt\"\n1,x\n", Format::Tsv, "source = \"csv\" reads it"),
            (b"prompt,prompt\n1,x\n", Format::Csv, "two columns are called \"prompt\""),
            (b"id,prompt\n1,x\n2\n", Format::Csv, "line 3 has 1 field where the header has 2 fields"),
            (b"prompt\na cat, sitting\n", Format::Csv, "has 1 field: a field with a comma must be in quotes"),
            (b"id,prompt\n1,x\n2,\xff\n", Format::Csv, "line 3 is not UTF-8"),
            (b"id,prompt\n1,x\n2,a\0\n", Format::Csv, "line 3 holds a NUL character"),
            (b"", Format::Csv, "the file is empty"),
        ] {
            let e = format!("{:#}", prompts(bytes, format, "prompt").unwrap_err());
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
        let source = Listed::new(Store::Own(load(&settings, Format::Tsv).unwrap().end().0), 32, 1).unwrap();
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (1600, 32));
    }
}
