//! The entries of a ZIP archive, stored without compression, ZIP64 included: what torch.save writes.
//!
//! Every size and offset is checked against the file; an entry's CRC-32 is verified when it is read
//! (if it has one).

use std::collections::BTreeMap;

use anyhow::{bail, ensure, Context, Result};

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const CENTRAL: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";

/// An archive in memory.
pub struct ZipEntries<'a> {
    bytes: &'a [u8],
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    local_header: usize,
    size: usize,
    crc32: u32,
    stored: bool,
}

fn slice(bytes: &[u8], at: usize, count: usize) -> Result<&[u8]> {
    let end = at.checked_add(count).filter(|&end| end <= bytes.len());
    Ok(&bytes[at..end.with_context(|| format!("the archive is cut off: it ends at byte {}", bytes.len()))?])
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_le_bytes(slice(bytes, at, 2)?.try_into()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(slice(bytes, at, 4)?.try_into()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<usize> {
    usize::try_from(u64::from_le_bytes(slice(bytes, at, 8)?.try_into()?)).context("a 64-bit size")
}

impl<'a> ZipEntries<'a> {
    /// Reads the central directory.
    pub fn open(bytes: &'a [u8]) -> Result<Self> {
        let (count, mut at) = directory(bytes)?;
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            ensure!(slice(bytes, at, 4)? == CENTRAL, "the archive's directory is damaged at byte {at}");
            let method = u16_at(bytes, at + 10)?;
            let encrypted = u16_at(bytes, at + 8)? & 1 != 0;
            let name_length = usize::from(u16_at(bytes, at + 28)?);
            let extra_length = usize::from(u16_at(bytes, at + 30)?);
            let comment_length = usize::from(u16_at(bytes, at + 32)?);
            let name = std::str::from_utf8(slice(bytes, at + 46, name_length)?).context("an entry's name")?;
            let extra = slice(bytes, at + 46 + name_length, extra_length)?;
            let [packed, size, local_header] =
                widen([u32_at(bytes, at + 20)?, u32_at(bytes, at + 24)?, u32_at(bytes, at + 42)?], extra)
                    .with_context(|| format!("entry {name}"))?;
            let stored = method == 0 && !encrypted && packed == size;
            let entry = Entry { local_header, size, crc32: u32_at(bytes, at + 16)?, stored };
            ensure!(entries.insert(name.to_string(), entry).is_none(), "the archive holds entry {name} twice");
            at += 46 + name_length + extra_length + comment_length;
        }
        Ok(ZipEntries { bytes, entries })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The contents of an entry; None if there is no such entry.
    ///
    /// # Errors
    /// It is compressed or encrypted, lies outside the file, or does not have its CRC-32.
    pub fn read(&self, name: &str) -> Result<Option<&'a [u8]>> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        self.contents(name, entry).with_context(|| format!("entry {name}")).map(Some)
    }

    fn contents(&self, name: &str, entry: &Entry) -> Result<&'a [u8]> {
        if !entry.stored {
            bail!("it is compressed or encrypted; torch.save stores entries as they are");
        }
        let at = entry.local_header;
        ensure!(slice(self.bytes, at, 30)?.starts_with(LOCAL), "no entry begins at byte {at}");
        let name_length = usize::from(u16_at(self.bytes, at + 26)?);
        let extra_length = usize::from(u16_at(self.bytes, at + 28)?);
        ensure!(slice(self.bytes, at + 30, name_length)? == name.as_bytes(), "another entry lies at byte {at}");
        let contents = slice(self.bytes, at + 30 + name_length + extra_length, entry.size)?;
        let crc32 = crc32fast::hash(contents);
        // torch.serialization.set_crc32_options(False) leaves a zero where the checksum stands
        ensure!(
            entry.crc32 == 0 || crc32 == entry.crc32,
            "damaged: its CRC-32 is {crc32:08x}, the archive says {:08x}",
            entry.crc32
        );
        Ok(contents)
    }
}

/// Number of entries and start of the central directory.
fn directory(bytes: &[u8]) -> Result<(usize, usize)> {
    // the end record is 22 bytes and a comment of at most 65,535
    let earliest = bytes.len().saturating_sub(22 + 65_535);
    let end = (earliest..bytes.len().saturating_sub(21)).rev().find(|&at| bytes[at..].starts_with(END));
    let end = end.context("the archive is cut off: it has no directory at its end")?;
    let (count, at) = (u16_at(bytes, end + 10)?, u32_at(bytes, end + 16)?);
    if count != u16::MAX && at != u32::MAX {
        return Ok((usize::from(count), at as usize));
    }
    let locator = end.checked_sub(20).filter(|&at| bytes[at..].starts_with(LOCATOR_64));
    let at = u64_at(bytes, locator.context("the archive lacks its 64-bit directory")? + 8)?;
    ensure!(slice(bytes, at, 4)? == END_64, "the archive's 64-bit directory is damaged");
    Ok((u64_at(bytes, at.saturating_add(32))?, u64_at(bytes, at.saturating_add(48))?))
}

/// Fields that say 0xffffffff stand in the ZIP64 extra field (id 1), in this order.
fn widen(fields: [u32; 3], extra: &[u8]) -> Result<[usize; 3]> {
    // packed and full size are stored the other way round there
    let [packed, size, offset] = fields;
    let mut wide = [size, packed, offset].map(|field| field as usize);
    if fields.contains(&u32::MAX) {
        let mut at = 0;
        while u16_at(extra, at).context("its 64-bit sizes are missing")? != 1 {
            at += 4 + usize::from(u16_at(extra, at + 2)?);
        }
        at += 4;
        for (field, narrow) in wide.iter_mut().zip([size, packed, offset]) {
            if narrow == u32::MAX {
                *field = u64_at(extra, at)?;
                at += 8;
            }
        }
    }
    let [size, packed, offset] = wide;
    Ok([packed, size, offset])
}
