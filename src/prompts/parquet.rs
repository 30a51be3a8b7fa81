//! Prompts from a column of a parquet file: DiffusionDB's `metadata.parquet` with its 1.5 million different prompts.
//!
//! Rows whose score in one of the NSFW columns is above the limit, or missing, are left out; a prompt that comes again
//! (DiffusionDB has a row per picture) counts once.

use std::path::Path;

use anyhow::{anyhow, bail, Result};

use super::reading::{Counts, Reading};
use crate::{
    config::ParquetPrompts,
    parquet_file::{self, Cell},
    text_file::as_text,
    word_list::WordList,
};

/// # Errors
/// A file that is no parquet file, lacks a column (those it has are listed), or has a prompt that is not UTF-8 (the row
/// is named).
pub fn load(settings: &ParquetPrompts) -> Result<Reading> {
    let drop = WordList::load(&settings.drop_words)?;
    let path = Path::new(&settings.path);
    let mut columns = vec![settings.column.as_str()];
    columns.extend(settings.nsfw_columns.iter().map(String::as_str));
    let mut reading = Reading::new(path, "row", &settings.drop_words);
    parquet_file::read(path, &columns, &mut |row, cells| {
        let prompt = match cells[0] {
            Cell::Null => {
                reading.leave_out(|counts| &mut counts.null);
                return Ok(());
            }
            Cell::Number(_) => bail!("column {:?} holds numbers, not text", settings.column),
            Cell::Text(bytes) => as_text(bytes).map_err(|what| anyhow!("the prompt of row {row} {what}"))?,
        };
        for cell in &cells[1..] {
            if let Some(count) = why_not(cell, settings.nsfw_max)? {
                reading.leave_out(count);
                return Ok(());
            }
        }
        reading.add_text(prompt, &drop);
        Ok(())
    })?;
    Ok(reading)
}

/// Counts what a score forbids.
type Count = fn(&mut Counts) -> &mut u64;

/// Under which count a row with this score is left out, if it is.
fn why_not(score: &Cell, most: f64) -> Result<Option<Count>> {
    Ok(match score {
        Cell::Number(score) if *score <= most => None,
        Cell::Number(score) if *score > most => Some(|counts| &mut counts.above_limit),
        // NaN is no score
        Cell::Number(_) | Cell::Null => Some(|counts| &mut counts.unscored),
        Cell::Text(_) => bail!("an NSFW column holds text, a number is wanted"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        parquet_file::tests::write,
        prompts::{listed::Listed, shared_texts::Store, PromptSource, Split},
    };

    fn settings(path: &Path) -> ParquetPrompts {
        ParquetPrompts {
            path: path.display().to_string(),
            column: "prompt".into(),
            nsfw_columns: vec!["prompt_nsfw".into()],
            nsfw_max: 0.5,
            held_out: 10,
            split_seed: 1,
            drop_words: String::new(),
        }
    }

    fn source(settings: &ParquetPrompts) -> Result<Listed> {
        Listed::new(Store::Own(load(settings)?.end().0), settings.held_out, settings.split_seed)
    }

    #[test]
    fn unique_clean_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.parquet");
        // 300 rows of 100 prompts; the last ten are unsafe, without a score, or missing
        let row = |i: u64| match i % 100 {
            90..=93 => (Some(format!("prompt {}", i % 100)), Some(2.0)),
            94..=96 => (Some(format!("prompt {}", i % 100)), None),
            97..=99 => (None, Some(0.0)),
            n => (Some(format!(" prompt {n}")), Some(0.5)),
        };
        write(&path, ["prompt", "prompt_nsfw"], (0..300).map(row));
        let found = source(&settings(&path)).unwrap();
        assert_eq!((found.len(Split::Train), found.len(Split::HeldOut)), (80, 10));
        assert!(found.prompt(Split::Train, 0).text.starts_with("prompt "));
        let said = load(&settings(&path)).unwrap().end().1.to_string();
        let wanted = "300 rows: 90 prompts, 9 null, 180 repeated, 9 without a score, 12 above nsfw_max";
        assert!(said.ends_with(wanted), "{said}");
        let all = ParquetPrompts { nsfw_columns: vec![], ..settings(&path) };
        assert_eq!(source(&all).unwrap().len(Split::Train), 87);
        let wrong = ParquetPrompts { column: "prompt_nsfw".into(), nsfw_columns: vec![], ..settings(&path) };
        assert!(format!("{:#}", load(&wrong).err().unwrap()).contains("holds numbers, not text"));
    }

    /// DiffusionDB's schema: 13 columns, of which two are read.
    #[test]
    fn the_diffusiondb_schema() {
        let file = "constructed/diffusiondb_schema_sample.parquet";
        let Some(path) = std::env::var_os("RLDIFF_TEST_DATA").map(|d| Path::new(&d).join(file)) else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with {file}");
            return;
        };
        let count = |settings: ParquetPrompts| source(&settings).map(|s| s.len(Split::Train));
        let all = count(ParquetPrompts { nsfw_columns: vec![], ..settings(&path) }).unwrap();
        assert_eq!(all, 1951, "2,400 rows of 1,961 different prompts, ten of them held out");
        let columns = ["image_nsfw", "prompt_nsfw"].map(String::from).to_vec();
        let at_most = |nsfw_max| {
            count(ParquetPrompts { nsfw_columns: columns.clone(), nsfw_max, ..settings(&path) }).unwrap_or(0)
        };
        let counts = [2.0, 0.5, 0.1, 0.01, -1.0].map(at_most);
        println!("{counts:?} prompts at falling limits");
        assert!(counts[0] == all && counts.is_sorted_by(|a, b| a >= b) && counts[3] < all && counts[4] == 0);
    }

    /// Start-up with as many prompts as DiffusionDB has: 2 M rows, 1.5 M different prompts, of about 120 bytes each.
    #[test]
    #[ignore = "writes and reads a file of about 100 MB"]
    fn a_million_and_a_half_prompts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.parquet");
        let row = |i: u64| {
            let n = i % 1_500_000;
            let words: String =
                (0..14u64).map(|k| format!(" {:x}", (n + 1) * (k * 7919 + 104_729) % 999_983)).collect();
            (Some(format!("prompt {n}{words}")), Some((n % 7) as f32 / 20.0))
        };
        write(&path, ["prompt", "prompt_nsfw"], (0..2_000_000).map(row));
        let before = peak_megabytes();
        let started = std::time::Instant::now();
        let source = source(&ParquetPrompts { held_out: 2000, ..settings(&path) }).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        let bytes: usize = source.prompt(Split::Train, 1_000_000).text.len();
        let peak = peak_megabytes();
        println!("{seconds:.2} s, peak {peak} MB ({before} MB before), prompts of about {bytes} bytes");
        assert_eq!((source.len(Split::Train), source.len(Split::HeldOut)), (1_498_000, 2000));
        assert!(seconds < 5.0 && peak < 1000, "{seconds} s, {peak} MB");
    }

    /// Largest resident size of this process so far.
    fn peak_megabytes() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }
}
