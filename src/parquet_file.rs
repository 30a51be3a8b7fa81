//! Columns of a parquet file, row after row, with little memory: a few thousand rows at a time.
//!
//! Some broken files make the `parquet` crate panic; that is an error here as any other.

use std::{fs::File, path::Path};

use anyhow::{anyhow, bail, ensure, Context, Result};
use parquet::{
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{BoolType, ByteArrayType, DataType, DoubleType, FloatType, Int32Type, Int64Type},
    file::reader::{FileReader, RowGroupReader, SerializedFileReader},
};

use crate::caught_panics;

/// One field of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cell<'a> {
    Null,
    Text(&'a [u8]),
    Number(f64),
}

/// Rows read at a time.
const CHUNK: usize = 8192;

/// Calls `each` with the row's number (from 0) and its cells in the order of `columns`, whose names are compared in any
/// case.
///
/// # Errors
/// A file that is no parquet file or a broken one, lacks a column (those it has are listed), or has lists or other types in one.
pub fn read(path: &Path, columns: &[&str], each: &mut dyn FnMut(u64, &[Cell]) -> Result<()>) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let read = caught_panics::catch(|| read_rows(file, columns, each));
    // names in a damaged file may hold ends of lines
    let one_line = |e: anyhow::Error| anyhow!("{}", format!("{e:#}").split_whitespace().collect::<Vec<_>>().join(" "));
    read.map_err(one_line).with_context(|| path.display().to_string())
}

fn read_rows(file: File, columns: &[&str], each: &mut dyn FnMut(u64, &[Cell]) -> Result<()>) -> Result<()> {
    let reader = SerializedFileReader::new(file).context("this is no parquet file, or a broken one")?;
    let schema = reader.metadata().file_metadata().schema_descr_ptr();
    let known: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
    let mut indices = Vec::new();
    for name in columns {
        let Some(index) = known.iter().position(|k| k.eq_ignore_ascii_case(name)) else {
            bail!("there is no column {name:?}; columns are {}", known.join(", "));
        };
        let repeated = schema.column(index).max_rep_level() > 0;
        ensure!(!repeated, "column {name:?} holds lists, one value per row is wanted");
        indices.push(index);
    }
    let mut row = 0;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        let rows = usize::try_from(group.metadata().num_rows()).context("a negative number of rows")?;
        let mut columns = indices
            .iter()
            .zip(columns)
            .map(|(&i, name)| Column::open(group.as_ref(), i, schema.column(i).max_def_level(), name))
            .collect::<Result<Vec<_>>>()?;
        let mut left = rows;
        while left > 0 {
            let count = left.min(CHUNK);
            for column in &mut columns {
                column.read(count)?;
            }
            for i in 0..count {
                let cells: Vec<Cell> = columns.iter_mut().map(|c| c.cell(i)).collect();
                each(row, &cells)?;
                row += 1;
            }
            left -= count;
        }
    }
    Ok(())
}

/// Values of a chunk that are not null, by type.
enum Values {
    Text(Vec<parquet::data_type::ByteArray>),
    Number(Vec<f64>),
}

struct Column {
    reader: ColumnReader,
    /// The level of a value that is there; 0 where none can be missing.
    present: i16,
    name: String,
    levels: Vec<i16>,
    values: Values,
    /// Values of this chunk given out so far.
    used: usize,
}

impl Column {
    fn open(group: &dyn RowGroupReader, index: usize, present: i16, name: &str) -> Result<Column> {
        let reader = group.get_column_reader(index).with_context(|| format!("column {name:?}"))?;
        Ok(Column {
            reader,
            present,
            name: name.into(),
            levels: Vec::new(),
            values: Values::Number(Vec::new()),
            used: 0,
        })
    }

    fn read(&mut self, rows: usize) -> Result<()> {
        self.used = 0;
        let levels = &mut self.levels;
        self.values = match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(r) => Values::Text(fill::<ByteArrayType>(r, rows, levels)?),
            ColumnReader::BoolColumnReader(r) => number::<BoolType>(r, rows, levels, f64::from)?,
            ColumnReader::Int32ColumnReader(r) => number::<Int32Type>(r, rows, levels, f64::from)?,
            ColumnReader::Int64ColumnReader(r) => number::<Int64Type>(r, rows, levels, |v| v as f64)?,
            ColumnReader::FloatColumnReader(r) => number::<FloatType>(r, rows, levels, f64::from)?,
            ColumnReader::DoubleColumnReader(r) => number::<DoubleType>(r, rows, levels, |v| v)?,
            _ => bail!("column {:?} is neither text nor a number", self.name),
        };
        let present = match self.present {
            0 => rows,
            level => self.levels.iter().filter(|&&l| l == level).count(),
        };
        let values = match &self.values {
            Values::Text(values) => values.len(),
            Values::Number(values) => values.len(),
        };
        ensure!(values == present, "column {:?} has {values} values where {present} are announced", self.name);
        Ok(())
    }

    /// The cell of row `i` of the chunk; rows are asked for in order.
    fn cell(&mut self, i: usize) -> Cell<'_> {
        if self.present > 0 && self.levels[i] != self.present {
            return Cell::Null;
        }
        self.used += 1;
        match &self.values {
            Values::Text(values) => Cell::Text(values[self.used - 1].data()),
            Values::Number(values) => Cell::Number(values[self.used - 1]),
        }
    }
}

fn number<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    levels: &mut Vec<i16>,
    value: impl Fn(T::T) -> f64,
) -> Result<Values> {
    Ok(Values::Number(fill(reader, rows, levels)?.into_iter().map(value).collect()))
}

fn fill<T: DataType>(reader: &mut ColumnReaderImpl<T>, rows: usize, levels: &mut Vec<i16>) -> Result<Vec<T::T>> {
    let mut values = Vec::with_capacity(rows);
    levels.clear();
    let mut read = 0;
    while read < rows {
        let (records, _, _) = reader.read_records(rows - read, Some(levels), None, &mut values)?;
        ensure!(records > 0, "the file ends early: {} rows are missing", rows - read);
        read += records;
    }
    Ok(values)
}

#[cfg(test)]
pub mod tests {
    use std::sync::Arc;

    use parquet::{
        basic::Compression,
        data_type::ByteArray,
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    use super::*;
    use crate::mutations::mutate;

    /// Writes (text, number) rows in groups of 100,000; a None is a null.
    pub fn write(path: &Path, names: [&str; 2], rows: impl Iterator<Item = (Option<String>, Option<f32>)>) {
        let schema = format!("message m {{ optional binary {} (UTF8); optional float {}; }}", names[0], names[1]);
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
        let mut rows = rows.peekable();
        while rows.peek().is_some() {
            let part: Vec<_> = rows.by_ref().take(100_000).collect();
            let mut group = writer.next_row_group().unwrap();
            let texts: Vec<ByteArray> = part.iter().filter_map(|(t, _)| t.as_deref().map(ByteArray::from)).collect();
            let levels: Vec<i16> = part.iter().map(|(t, _)| i16::from(t.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
            column.close().unwrap();
            let numbers: Vec<f32> = part.iter().filter_map(|(_, n)| *n).collect();
            let levels: Vec<i16> = part.iter().map(|(_, n)| i16::from(n.is_some())).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<FloatType>().write_batch(&numbers, Some(&levels), None).unwrap();
            column.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }

    /// Writes an img2dataset table: (key, status, AESTHETIC_SCORE).
    pub fn write_scored(path: &Path, rows: &[(&str, &str, f32)]) {
        let schema =
            "message m { required binary key (UTF8); required binary status (UTF8); required float AESTHETIC_SCORE; }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for texts in [rows.iter().map(|r| r.0).collect::<Vec<_>>(), rows.iter().map(|r| r.1).collect()] {
            let texts: Vec<ByteArray> = texts.into_iter().map(ByteArray::from).collect();
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            column.close().unwrap();
        }
        let mut column = group.next_column().unwrap().unwrap();
        let scores: Vec<f32> = rows.iter().map(|r| r.2).collect();
        column.typed::<FloatType>().write_batch(&scores, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn rows_come_back_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.parquet");
        let row = |i: u64| ((i % 7 != 3).then(|| format!("text {}", i / 2)), (i % 5 != 1).then_some(i as f32 / 4.0));
        write(&path, ["prompt", "nsfw"], (0..120_000).map(row));
        let mut count = 0;
        read(&path, &["NSFW", "prompt"], &mut |i, cells| {
            let (text, number) = row(i);
            assert_eq!(cells[0], number.map_or(Cell::Null, |n| Cell::Number(f64::from(n))));
            assert_eq!(cells[1], text.as_ref().map_or(Cell::Null, |t| Cell::Text(t.as_bytes())));
            count += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(count, 120_000);

        let mut nothing = |_: u64, _: &[Cell]| Ok(());
        let e = format!("{:#}", read(&path, &["caption"], &mut nothing).unwrap_err());
        assert!(e.contains("x.parquet") && e.contains("columns are prompt, nsfw"), "{e}");
        std::fs::write(&path, b"PAR1 not really").unwrap();
        let e = format!("{:#}", read(&path, &["prompt"], &mut nothing).unwrap_err());
        assert!(e.contains("no parquet file") && !e.contains('\n'), "{e}");
    }

    fn mutate_files(rounds: usize) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.parquet");
        write(&path, ["prompt", "nsfw"], (0..300).map(|i| (Some(format!("text {i}")), (i % 3 > 0).then_some(0.5))));
        let good = [std::fs::read(&path).unwrap()];
        mutate(&good, rounds, |bytes| {
            std::fs::write(&path, bytes).unwrap();
            let read = read(&path, &["prompt", "nsfw"], &mut |_, cells| {
                ensure!(cells.len() == 2, "a row of {} cells", cells.len());
                Ok(())
            });
            if let Err(e) = read {
                let e = format!("{e:#}");
                assert!(!e.contains('\n') && !e.contains("a row of") && e.contains("x.parquet"), "{e}");
            }
        });
    }

    #[test]
    fn files_broken_at_random_are_errors() {
        mutate_files(2_000);
    }

    #[test]
    #[ignore = "100,000 mutated files, each read from the disk"]
    fn many_files_broken_at_random_are_errors() {
        mutate_files(100_000);
    }
}
