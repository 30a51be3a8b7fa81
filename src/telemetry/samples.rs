//! What a model draws for the same few prompts and noise as training goes on: one file per task and evaluation.

use std::{
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};

use super::grid::GridRow;
use super::picture::{png_text, read_png, save_png, Picture};
use crate::excerpt::bounded;

/// Keyword of the text chunk with the prompts.
const PROMPTS: &str = "prompts";
/// Bytes of a prompt in it.
const LONGEST: usize = 4 << 10;

/// A PNG of equally large pictures without gaps, a row for each prompt, whose text chunk `prompts` holds the prompts as a
/// JSON array: the number of rows is theirs, and that of columns follows from `columns`.
#[derive(Clone, Debug)]
pub struct SampleSheet {
    /// Every row has as many pictures, all of the same size.
    pub rows: Vec<GridRow>,
}

impl SampleSheet {
    /// Writes the file, atomically.
    pub fn save(&self, path: &Path) -> Result<()> {
        let first = self.rows.first().and_then(|row| row.pictures.first());
        let first = first.with_context(|| format!("{}: no pictures", path.display()))?;
        let (width, height) = (first.width(), first.height());
        let columns = self.rows[0].pictures.len();
        let fits = |row: &GridRow| {
            row.pictures.len() == columns && row.pictures.iter().all(|p| (p.width(), p.height()) == (width, height))
        };
        ensure!(self.rows.iter().all(fits), "{}: pictures of different sizes", path.display());
        let mut sheet = Picture::from_fn(columns * width, self.rows.len() * height, |_, _| [0; 3]);
        for (y, row) in self.rows.iter().enumerate() {
            for (x, picture) in row.pictures.iter().enumerate() {
                sheet.paste(picture, x * width, y * height);
            }
        }
        let prompts: Vec<_> = self.rows.iter().map(|row| bounded(&row.caption, LONGEST)).collect();
        let text =
            [(PROMPTS.to_owned(), serde_json::to_string(&prompts)?), ("columns".to_owned(), columns.to_string())];
        save_png(path, &sheet, &text)
    }

    /// The inverse of [`SampleSheet::save`].
    pub fn read(path: &Path) -> Result<Self> {
        let (sheet, text) = read_png(path)?;
        let of = |wanted: &str| text.iter().find(|(keyword, _)| keyword == wanted).map(|(_, text)| text.as_str());
        let prompts = of(PROMPTS).and_then(|text| serde_json::from_str::<Vec<String>>(text).ok());
        let columns = of("columns").and_then(|text| text.parse::<usize>().ok()).filter(|columns| *columns > 0);
        let (Some(prompts), Some(columns)) = (prompts, columns) else {
            anyhow::bail!("{} is no sheet of samples", path.display())
        };
        let rows = prompts.len();
        let whole = rows > 0 && sheet.width() % columns == 0 && sheet.height() % rows == 0;
        ensure!(
            whole,
            "{}: {}×{} pixels are not {rows} rows of {columns}",
            path.display(),
            sheet.width(),
            sheet.height()
        );
        let (width, height) = (sheet.width() / columns, sheet.height() / rows);
        let cut =
            |x: usize, y: usize| Picture::from_fn(width, height, |i, j| sheet.pixel(x * width + i, y * height + j));
        let rows = prompts
            .into_iter()
            .enumerate()
            .map(|(y, caption)| GridRow { caption, pictures: (0..columns).map(|x| cut(x, y)).collect() });
        Ok(SampleSheet { rows: rows.collect() })
    }

    /// Whether there is a sheet at `path`, by its text alone.
    pub fn is_at(path: &Path) -> bool {
        let text = File::open(path).map_err(anyhow::Error::from).and_then(|file| png_text(BufReader::new(file)));
        text.is_ok_and(|text| {
            [PROMPTS, "columns"].iter().all(|wanted| text.iter().any(|(keyword, _)| keyword == wanted))
        })
    }

    /// Name of the sheet after `done` iterations.
    pub fn name(done: u64) -> String {
        format!("iteration-{done:06}.png")
    }

    /// The sheets in `folder` with their iterations, in their order; none where there is no folder.
    pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        if folder.is_dir() {
            for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let path = entry.with_context(|| format!("cannot read {}", folder.display()))?.path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let number = name.strip_prefix("iteration-").and_then(|rest| rest.strip_suffix(".png"));
                if let Some(done) = number.and_then(|number| number.parse().ok()) {
                    found.push((done, path));
                }
            }
        }
        found.sort();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sheet_comes_back_in_its_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let picture = |seed: usize| Picture::from_fn(5, 4, |x, y| [(x * 9 + seed) as u8, y as u8, seed as u8]);
        let row = |caption: &str, first: usize| GridRow {
            caption: caption.to_owned(),
            pictures: (first..first + 3).map(picture).collect(),
        };
        let sheet = SampleSheet { rows: vec![row("a \"kite\" — 人", 1), row("a carrot", 4)] };
        for done in [12, 0] {
            sheet.save(&folder.path().join(SampleSheet::name(done))).unwrap();
        }
        std::fs::write(folder.path().join("iteration-x.png"), b"").unwrap();
        let listed = SampleSheet::list(folder.path()).unwrap();
        assert_eq!(listed.iter().map(|(done, _)| *done).collect::<Vec<_>>(), [0, 12]);
        let read = SampleSheet::read(&listed[1].1).unwrap();
        assert_eq!(read.rows.len(), 2);
        for (read, row) in read.rows.iter().zip(&sheet.rows) {
            assert_eq!((&read.caption, &read.pictures), (&row.caption, &row.pictures));
        }
        assert!(SampleSheet::list(&folder.path().join("absent")).unwrap().is_empty());
        assert!(SampleSheet::is_at(&listed[1].1));
        // any other picture
        let other = folder.path().join("other.png");
        save_png(&other, &picture(1), &[]).unwrap();
        assert!(!SampleSheet::is_at(&other) && !SampleSheet::is_at(folder.path()));
        assert!(SampleSheet::read(&other).unwrap_err().to_string().contains("other.png is no sheet of samples"));
        let mut uneven = sheet.clone();
        uneven.rows[1].pictures.pop();
        assert!(uneven.save(&other).is_err());
    }
}
