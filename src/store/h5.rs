//! Small helpers over hdf5: strings, arrays, and files that appear whole or not at all.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{ensure, Context, Result};
use hdf5::{types::VarLenUnicode, Group, H5Type};

/// Writes an HDF5 file under a temporary name, syncs it and renames it to `path`. Errors name `path`.
pub fn write_file(path: &Path, fill: impl FnOnce(&hdf5::File) -> Result<()>) -> Result<()> {
    let temporary = temporary_name(path);
    let written = fill_and_rename(&temporary, path, fill);
    if written.is_err() {
        // best effort: the first error is the one worth reporting
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Bytes by which a file in memory grows at least.
const GROWTH: usize = 1 << 16;

fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

fn fill_and_rename(temporary: &Path, path: &Path, fill: impl FnOnce(&hdf5::File) -> Result<()>) -> Result<()> {
    let folder = path.parent().context("a file without a folder")?;
    fs::create_dir_all(folder)?;
    // In memory until it is closed: where a full disk makes HDF5 fail on the way, datasets are closed with an error
    // that nobody sees, and closing the file then crashes the process (HDF5 2.2). Costs the file's size in memory.
    let file = hdf5::File::with_options().with_fapl(|access| access.core_options(GROWTH, true)).create(temporary)?;
    fill(&file)?;
    file.close()?;
    File::open(temporary)?.sync_all()?;
    fs::rename(temporary, path)?;
    File::open(folder)?.sync_all()?;
    Ok(())
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

pub fn read_vector<T: H5Type>(group: &Group, name: &str) -> Result<Vec<T>> {
    group.dataset(name).and_then(|d| d.read_raw()).with_context(|| format!("dataset {name}"))
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
