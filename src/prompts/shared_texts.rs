//! A list of texts once per host, whatever the number of its ranks: the first rank of a host reads it and writes it, as
//! it lies in memory, into a file that the host's ranks map. The file has no name any more once all have it.
//!
//! ```text
//! u64 number of texts n      n × u64 where each text ends      the texts, one after the other, UTF-8
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::{bail, ensure, Context, Result};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::listed::Texts;
use crate::{
    cannot_write::{CannotWrite, OfRanks},
    comm::{agree, Communicator},
    host,
    watch::hosts,
};

/// Texts in this process's own memory, or in memory that it shares.
#[derive(Debug)]
pub enum Store {
    Own(Texts),
    Shared(Shared),
}

impl Store {
    pub fn len(&self) -> usize {
        match self {
            Store::Own(texts) => texts.len(),
            Store::Shared(shared) => shared.count,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Panics when `index` is not below `len()`.
    pub fn get(&self, index: usize) -> &str {
        match self {
            Store::Own(texts) => texts.get(index),
            Store::Shared(shared) => shared.get(index),
        }
    }
}

/// What a rank says of the list: where its host's ranks find it, or why there is none.
#[derive(Serialize, Deserialize)]
enum Announcement {
    /// Another rank of the host reads.
    Nothing,
    At(PathBuf),
    Failed {
        text: String,
        of_writing: bool,
    },
}

/// The texts that `read` gives, once per host. A collective call; an error is the same on all ranks.
pub fn read_once_per_host(comm: &dyn Communicator, read: impl FnOnce() -> Result<Texts>) -> Result<Store> {
    if comm.size() == 1 {
        return read().map(Store::Own);
    }
    let hosts = hosts(comm)?;
    let leader = hosts.iter().position(|host| *host == hosts[comm.rank()]).expect("this rank's is among them");
    let mut file = None;
    let announcement = if leader == comm.rank() {
        match read().and_then(|texts| SharedFile::write(&std::env::temp_dir(), &texts)) {
            Ok(written) => Announcement::At(file.insert(written).path.clone()),
            Err(e) => Announcement::Failed { text: format!("{e:#}"), of_writing: CannotWrite::caused(&e) },
        }
    } else {
        Announcement::Nothing
    };
    let mut all = Vec::new();
    for bytes in comm.all_gather_bytes(&serde_json::to_vec(&announcement)?)? {
        all.push(serde_json::from_slice::<Announcement>(&bytes).context("list of another rank")?);
    }
    let failures: Vec<(usize, &str)> =
        all.iter().enumerate().filter_map(|(rank, a)| Some((rank, a.failed()?))).collect();
    if let Some(&(_, first)) = failures.first() {
        let of_writing = all.iter().any(|a| matches!(a, Announcement::Failed { of_writing: true, .. }));
        let readers = all.iter().filter(|a| !matches!(a, Announcement::Nothing)).count();
        if failures.len() == readers && failures.iter().all(|(_, e)| *e == first) {
            return Err(OfRanks { text: first.to_string(), of_writing }.into());
        }
        let by_rank: Vec<String> = failures.iter().map(|(rank, e)| format!("rank {rank}: {e}")).collect();
        return Err(OfRanks { text: by_rank.join("; "), of_writing }.into());
    }
    let Announcement::At(path) = &all[leader] else { bail!("rank {leader} has not read the list of prompts") };
    let mapped = Shared::map(path).with_context(|| format!("the list that rank {leader} left in {}", path.display()));
    // nobody removes the file before all have mapped it
    agree(comm, mapped.as_ref().map(drop).map_err(|e| anyhow::anyhow!("{e:#}")))?;
    Ok(Store::Shared(mapped?))
}

impl Announcement {
    fn failed(&self) -> Option<&str> {
        match self {
            Announcement::Failed { text, .. } => Some(text),
            _ => None,
        }
    }
}

/// A file of texts that is removed when this is dropped.
struct SharedFile {
    path: PathBuf,
}

impl SharedFile {
    fn write(folder: &Path, texts: &Texts) -> Result<SharedFile> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("rldiff-{}-{number}.prompts", host::process_mark()));
        let write = || -> Result<SharedFile> {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            let guard = SharedFile { path: path.clone() };
            let mut out = BufWriter::new(file);
            out.write_all(&(texts.len() as u64).to_le_bytes())?;
            for end in texts.ends() {
                out.write_all(&(*end as u64).to_le_bytes())?;
            }
            out.write_all(texts.bytes())?;
            out.flush()?;
            Ok(guard)
        };
        write().context(CannotWrite::new(format!("the list of prompts to {} (TMPDIR)", path.display())))
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // it is in the temporary folder: whoever clears that removes it where this fails
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A mapped file of texts.
#[derive(Debug)]
pub struct Shared {
    map: Mmap,
    count: usize,
}

const WORD: usize = 8;

impl Shared {
    fn map(path: &Path) -> Result<Shared> {
        let file = File::open(path)?;
        // SAFETY: the file is this run's own (it was created, not opened, with mode 0600), and nobody writes to it after
        // its name was announced.
        let map = unsafe { Mmap::map(&file) }?;
        let count = word(&map, 0).context("it is empty")?;
        let texts = count.checked_add(1).and_then(|words| words.checked_mul(WORD)).filter(|&start| start <= map.len());
        let length = map.len() - texts.context("it is cut off")?;
        let end = if count == 0 { Some(0) } else { word(&map, count) };
        ensure!(end == Some(length), "it is cut off");
        Ok(Shared { map, count })
    }

    fn end(&self, index: usize) -> usize {
        word(&self.map, index + 1).expect("the length was checked")
    }

    fn get(&self, index: usize) -> &str {
        assert!(index < self.count, "text {index} of {}", self.count);
        let texts = &self.map[WORD * (self.count + 1)..];
        let start = if index == 0 { 0 } else { self.end(index - 1) };
        std::str::from_utf8(&texts[start..self.end(index)]).expect("written from texts")
    }
}

fn word(map: &[u8], number: usize) -> Option<usize> {
    let bytes = map.get(number * WORD..)?.first_chunk::<WORD>()?;
    usize::try_from(u64::from_le_bytes(*bytes)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_list_is_the_list() {
        let folder = tempfile::tempdir().unwrap();
        let mut texts = Texts::default();
        let all: Vec<String> = (0..500).map(|i| format!("prompt {i} {}", "ä".repeat(i % 7))).collect();
        all.iter().for_each(|text| assert!(texts.insert(text)));
        let written = SharedFile::write(folder.path(), &texts).unwrap();
        let shared = Store::Shared(Shared::map(&written.path).unwrap());
        drop(written);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name any more");
        assert_eq!(shared.len(), 500);
        assert!((0..500).all(|i| shared.get(i) == all[i]));
        let none = SharedFile::write(folder.path(), &Texts::default()).unwrap();
        assert!(Store::Shared(Shared::map(&none.path).unwrap()).is_empty());
        assert!(SharedFile::write(Path::new("/no/such/folder"), &texts).err().unwrap().to_string().contains("TMPDIR"));
        std::fs::write(&none.path, 9u64.to_le_bytes()).unwrap();
        assert!(Shared::map(&none.path).unwrap_err().to_string().contains("cut off"));
    }
}
