//! Small helpers over hdf5: strings, arrays, and files that appear whole or not at all.

use std::{ops::Range, path::Path, str::FromStr};

use anyhow::{ensure, Context, Result};
use hdf5::{plist::file_access::FileAccessBuilder, types::VarLenUnicode, FileBuilder, Group, H5Type};

use crate::{cannot_write::make_folder, telemetry::write_atomic_with};

/// Bytes by which a file in memory grows at least.
const GROWTH: usize = 1 << 16;

/// Without HDF5's file locks. A file here is written once, under a name of its own, so nobody needs them; and a program that is
/// started meanwhile (a reward) inherits them and holds them as long as it lives, and some file systems of clusters have none.
fn options(more: impl Fn(&mut FileAccessBuilder)) -> FileBuilder {
    let mut options = hdf5::File::with_options();
    options.with_fapl(|access| {
        access.file_locking(false);
        more(access);
        access
    });
    options
}

/// Opens a file to read.
pub fn open(path: &Path) -> hdf5::Result<hdf5::File> {
    options(|_| ()).open(path)
}

/// Writes an HDF5 file that appears whole or not at all, and its folder where there is none. Errors name `path`.
pub fn write_file(path: &Path, fill: impl FnOnce(&hdf5::File) -> Result<()>) -> Result<()> {
    if let Some(folder) = path.parent() {
        make_folder(folder)?;
    }
    write_atomic_with(path, |temporary| {
        // In memory until it is closed: where a full disk makes HDF5 fail on the way, datasets are closed with an error
        // that nobody sees, and closing the file then crashes the process (HDF5 2.2). Costs the file's size in memory.
        let in_memory = |access: &mut FileAccessBuilder| {
            access.core_options(GROWTH, true);
        };
        let file = options(in_memory).create(temporary)?;
        fill(&file)?;
        Ok(file.close()?)
    })
}

pub fn write_text(group: &Group, name: &str, text: &str) -> Result<()> {
    let value = VarLenUnicode::from_str(text).with_context(|| format!("{name} holds a zero byte"))?;
    group.new_dataset::<VarLenUnicode>().create(name)?.write_scalar(&value)?;
    Ok(())
}

pub fn read_text(group: &Group, name: &str) -> Result<String> {
    let value: VarLenUnicode =
        group.dataset(name).and_then(|d| d.read_scalar()).with_context(|| format!("dataset {name}"))?;
    Ok(value.as_str().to_string())
}

pub fn write_texts(group: &Group, name: &str, texts: &[String]) -> Result<()> {
    let values = texts
        .iter()
        .map(|text| VarLenUnicode::from_str(text).with_context(|| format!("a text of {name} holds a zero byte")))
        .collect::<Result<Vec<_>>>()?;
    group.new_dataset_builder().with_data(&values).create(name)?;
    Ok(())
}

/// Writes `values` as an array of `shape`.
pub fn write_array<T: H5Type>(group: &Group, name: &str, values: &[T], shape: &[usize]) -> Result<()> {
    let elements: usize = shape.iter().product();
    ensure!(elements == values.len(), "dataset {name}: {} values for the shape {shape:?}", values.len());
    group.new_dataset::<T>().shape(shape).create(name)?.write_raw(values)?;
    Ok(())
}

/// As [`write_array`], each row (of the first dimension) with a checksum of its own (Fletcher-32), which reading it verifies.
pub fn write_checked_rows<T: H5Type>(group: &Group, name: &str, values: &[T], shape: &[usize]) -> Result<()> {
    if values.is_empty() {
        return write_array(group, name, values, shape);
    }
    let elements: usize = shape.iter().product();
    ensure!(elements == values.len(), "dataset {name}: {} values for the shape {shape:?}", values.len());
    let row: Vec<usize> = std::iter::once(1).chain(shape[1..].iter().copied()).collect();
    group.new_dataset::<T>().shape(shape).chunk(row).fletcher32().create(name)?.write_raw(values)?;
    Ok(())
}

pub fn read_vector<T: H5Type>(group: &Group, name: &str) -> Result<Vec<T>> {
    group.dataset(name).and_then(|d| d.read_raw()).with_context(|| format!("dataset {name}"))
}

/// Some of a vector.
pub fn read_range<T: H5Type>(group: &Group, name: &str, range: Range<usize>) -> Result<Vec<T>> {
    let read = group.dataset(name).and_then(|d| d.read_slice_1d::<T, _>(range));
    Ok(read.with_context(|| format!("dataset {name}"))?.into_raw_vec_and_offset().0)
}

/// Elements of a vector.
pub fn length(group: &Group, name: &str) -> Result<usize> {
    let dataset = group.dataset(name).with_context(|| format!("dataset {name}"))?;
    ensure!(dataset.ndim() == 1, "dataset {name} has {} dimensions", dataset.ndim());
    Ok(dataset.size())
}

pub fn write_attribute<T: H5Type>(group: &Group, name: &str, value: T) -> Result<()> {
    group.new_attr::<T>().create(name)?.write_scalar(&value)?;
    Ok(())
}

pub fn write_text_attribute(group: &Group, name: &str, text: &str) -> Result<()> {
    write_attribute(group, name, VarLenUnicode::from_str(text)?)
}

pub fn read_attribute<T: H5Type>(group: &Group, name: &str) -> Result<T> {
    group.attr(name).and_then(|a| a.read_scalar()).with_context(|| format!("attribute {name}"))
}

pub fn read_text_attribute(group: &Group, name: &str) -> Result<String> {
    Ok(read_attribute::<VarLenUnicode>(group, name)?.as_str().to_string())
}

/// Version of the HDF5 library in use.
pub fn version() -> String {
    let (major, minor, release) = hdf5::library_version();
    format!("{major}.{minor}.{release}")
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::fd::AsRawFd,
    };

    use super::*;

    /// What a program inherits that is started while a file is being written.
    #[test]
    fn a_lock_that_somebody_holds_does_not_matter() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.h5");
        write_file(&path, |file| write_array(file, "values", &[1f32, 2.0], &[2])).unwrap();
        let other = File::open(&path).unwrap();
        // SAFETY: an open file.
        assert_eq!(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
        if std::env::var_os("HDF5_USE_FILE_LOCKING").is_none() {
            assert!(hdf5::File::open(&path).is_err(), "HDF5 does not look at locks, so this test shows nothing");
        }
        let file = open(&path).unwrap();
        assert_eq!(read_vector::<f32>(&file, "values").unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn no_lock_is_held_while_a_file_is_written() {
        let folder = tempfile::tempdir().unwrap();
        write_file(&folder.path().join("file.h5"), |file| {
            write_array(file, "values", &[1f32], &[1])?;
            for entry in fs::read_dir(folder.path())? {
                let other = File::open(entry?.path())?;
                // SAFETY: an open file.
                assert_eq!(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
            }
            Ok(())
        })
        .unwrap();
    }
}
