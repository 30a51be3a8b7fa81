//! Named tensors from files of `torch.save` (`.bin`, `.pt`, `.pth`, `.ckpt`), today's ZIP form and the old one.
//!
//! ```text
//! ZIP    NAME/data.pkl   one pickle; its tensors are views of storages      NAME/byteorder   "little" (may be absent)
//!        NAME/data/KEY   the elements of a storage
//! old    pickles of a magic number, 1001, a dict about the machine, the object, the list of storage keys;
//!        then per key its number of elements (i64) and the elements
//! ```

use std::{collections::BTreeMap, rc::Rc};

use anyhow::{bail, ensure, Context, Result};
use tch::Tensor;

use super::{
    pickle::{self, StorageRef, TensorRef, Unpickled, Value},
    zip_entries::ZipEntries,
};

/// Whether `bytes` begin as a ZIP archive does.
pub fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"PK\x05\x06")
}

/// Whether `bytes` begin as a binary pickle does.
pub fn is_pickle(bytes: &[u8]) -> bool {
    matches!(bytes, [0x80, 1..=5, ..])
}

/// The tensors of a state dict; the dict may lie under the key `state_dict` or `model`, and other values beside the
/// tensors are skipped. Tensors that are views keep their values, but are laid out row by row.
///
/// # Errors
/// Says what is damaged or refused; nothing is built from a pickle that names a foreign object.
pub fn read_torch_file(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    if is_zip(bytes) {
        read_zip(bytes)
    } else {
        read_legacy(bytes)
    }
}

fn read_zip(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let archive = ZipEntries::open(bytes)?;
    let suffix = "/data.pkl";
    let top = archive.names().find_map(|name| name.strip_suffix(suffix).filter(|top| !top.contains('/')));
    let top = top.context("the archive has no data.pkl, so torch.save did not write it")?.to_string();
    let read = |name: &str| archive.read(&format!("{top}/{name}"));
    if let Some(order) = read("byteorder")? {
        ensure!(order == b"little", "entry {top}/byteorder: numbers are {:?}-endian", String::from_utf8_lossy(order));
    }
    let unpickled = pickle::load(read("data.pkl")?.context("the archive has no data.pkl")?)
        .with_context(|| format!("entry {top}/data.pkl"))?;
    let mut storages = Vec::new();
    let mut left = bytes.len();
    for storage in &unpickled.storages {
        let name = format!("data/{}", storage.key);
        let contents = read(&name)?.with_context(|| format!("entry {top}/{name} is missing"))?;
        // entries that share bytes could ask for more memory than the file is long
        left = left.checked_sub(contents.len()).with_context(|| format!("entry {top}/{name} overlaps others"))?;
        storages.push(storage_tensor(storage, contents).with_context(|| format!("entry {top}/{name}"))?);
    }
    state_dict(&unpickled, &storages, bytes.len())
}

const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

fn read_legacy(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let mut rest = bytes;
    let mut next = |what: &str| -> Result<Unpickled> {
        let length = pickle::scan(rest).with_context(|| format!("its {what}"))?;
        let (this, after) = rest.split_at(length);
        rest = after;
        pickle::load(this).with_context(|| format!("its {what}"))
    };
    let magic = next("first pickle (not a file of torch.save?)")?;
    ensure!(
        matches!(&magic.root, Value::LargeInt(digits) if **digits == LEGACY_MAGIC),
        "it is a pickle, but torch.save did not write it"
    );
    ensure!(matches!(next("version")?.root, Value::Int(1001)), "its version is not 1001");
    let machine = next("description of the machine")?;
    let Value::Dict(facts) = machine.root else { bail!("its description of the machine is no dict") };
    ensure!(!matches!(machine.get(facts, "little_endian"), Some(Value::Bool(false))), "its numbers are big-endian");
    let unpickled = next("object")?;
    let keys = next("list of storages")?;
    let Value::Sequence(list) = keys.root else { bail!("its list of storages is no list") };

    let mut found: BTreeMap<Rc<str>, Tensor> = BTreeMap::new();
    for key in &keys.sequences[list] {
        let Value::Text(key) = key else { bail!("its list of storages holds {key:?}") };
        let storage = unpickled.storages.iter().find(|storage| storage.key == *key);
        let storage = storage.with_context(|| format!("storage {key} belongs to no tensor"))?;
        let (count, after) = rest.split_first_chunk::<8>().with_context(|| format!("it ends before storage {key}"))?;
        let count = usize::try_from(i64::from_le_bytes(*count)).unwrap_or(usize::MAX);
        ensure!(count == storage.count, "storage {key} has {count} elements, its tensors say {}", storage.count);
        let length = byte_length(storage)?;
        let contents = after.get(..length).with_context(|| format!("it ends inside storage {key}"))?;
        rest = &after[length..];
        found.insert(key.clone(), storage_tensor(storage, contents)?);
    }
    let storage_of = |storage: &StorageRef| {
        found.remove(&storage.key).with_context(|| format!("storage {} is missing", storage.key))
    };
    let storages = unpickled.storages.iter().map(storage_of).collect::<Result<Vec<_>>>()?;
    state_dict(&unpickled, &storages, bytes.len())
}

fn byte_length(storage: &StorageRef) -> Result<usize> {
    let length = storage.count.checked_mul(storage.kind.elt_size_in_bytes());
    length.with_context(|| format!("storage {} of {} elements", storage.key, storage.count))
}

/// The elements of a storage, one-dimensional.
fn storage_tensor(storage: &StorageRef, contents: &[u8]) -> Result<Tensor> {
    let length = byte_length(storage)?;
    ensure!(
        contents.len() == length,
        "it has {} bytes, {} elements of {:?} take {length}",
        contents.len(),
        storage.count,
        storage.kind
    );
    Ok(Tensor::f_from_data_size(contents, &[storage.count as i64], storage.kind)?)
}

/// The tensors of the top dict by name.
fn state_dict(all: &Unpickled, storages: &[Tensor], file_length: usize) -> Result<BTreeMap<String, Tensor>> {
    let Value::Dict(mut dict) = all.root else { bail!("it holds no dict of tensors but {:?}", all.root) };
    for key in ["state_dict", "model"] {
        if let Some(Value::Dict(inner)) = all.get(dict, key) {
            dict = *inner;
        }
    }
    // copies of views may repeat elements; a small file must not fill the memory
    let mut copied = 4 * file_length + (64 << 20);
    let mut tensors = BTreeMap::new();
    for (key, value) in &all.dicts[dict] {
        if let (Value::Text(name), Value::Tensor(index)) = (key, value) {
            let tensor = &all.tensors[*index];
            let view = view(tensor, &all.storages[tensor.storage], &storages[tensor.storage], &mut copied)
                .with_context(|| format!("tensor {name}"))?;
            tensors.insert(name.to_string(), view);
        }
    }
    ensure!(!tensors.is_empty(), "it holds no tensors");
    Ok(tensors)
}

/// A tensor as its storage has it, copied only if its elements do not lie in order.
fn view(tensor: &TensorRef, storage: &StorageRef, elements: &Tensor, copied: &mut usize) -> Result<Tensor> {
    let outside =
        || format!("size {:?}, stride {:?} at {}: outside its storage", tensor.size, tensor.stride, tensor.offset);
    let mut last = tensor.offset;
    let mut count = 1usize;
    for (&size, &stride) in tensor.size.iter().zip(&tensor.stride) {
        count = count.checked_mul(size).with_context(outside)?;
        let reach = size.saturating_sub(1).checked_mul(stride).with_context(outside)?;
        last = last.checked_add(reach).with_context(outside)?;
    }
    let to_i64 = |values: &[usize]| values.iter().map(|&v| Ok(i64::try_from(v)?)).collect::<Result<Vec<i64>>>();
    let size = to_i64(&tensor.size).with_context(outside)?;
    if count == 0 {
        return Ok(Tensor::f_zeros(&size, (storage.kind, tch::Device::Cpu))?);
    }
    ensure!(last < storage.count, "{} of {} elements", outside(), storage.count);
    let stride = to_i64(&tensor.stride).with_context(outside)?;
    let view = elements.f_as_strided(&size, &stride, i64::try_from(tensor.offset)?)?;
    if view.is_contiguous() {
        return Ok(view);
    }
    let left = count.checked_mul(storage.kind.elt_size_in_bytes()).and_then(|bytes| copied.checked_sub(bytes));
    *copied = left.with_context(|| format!("size {size:?} repeats the elements of a small storage too often"))?;
    Ok(view.f_contiguous()?)
}
