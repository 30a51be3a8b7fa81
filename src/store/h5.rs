//! Small helpers over hdf5: strings, arrays, and files that appear whole or not at all.

use std::{fs, path::Path, str::FromStr};

use anyhow::{ensure, Context, Result};
use hdf5::{types::VarLenUnicode, Group, H5Type};

use crate::telemetry::write_atomic_with;

/// Bytes by which a file in memory grows at least.
const GROWTH: usize = 1 << 16;

/// Writes an HDF5 file that appears whole or not at all, and its folder where there is none. Errors name `path`.
pub fn write_file(path: &Path, fill: impl FnOnce(&hdf5::File) -> Result<()>) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot write {}", path.display()))?;
    }
    write_atomic_with(path, |temporary| {
        // In memory until it is closed: where a full disk makes HDF5 fail on the way, datasets are closed with an error
        // that nobody sees, and closing the file then crashes the process (HDF5 2.2). Costs the file's size in memory.
        let file =
            hdf5::File::with_options().with_fapl(|access| access.core_options(GROWTH, true)).create(temporary)?;
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
