//! Webdataset shards as img2dataset writes them: an index of the pairs in a folder of tar files, made once by reading
//! their headers, and the bytes of a pair by number.
//!
//! `<key>.jpg|jpeg|png|webp` with `<key>.txt` makes a pair; `.json` and other members are passed over, in any order.
//! Beside `00000.tar` a `00000.parquet` may give a score and a status per key. Nothing is ever unpacked to disk.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::{Component, Path, PathBuf},
};

use anyhow::{bail, ensure, Context, Result};
use bytemuck::{Pod, Zeroable};
use tar::{Archive, EntryType};

use crate::{
    comm::{all_made, Communicator},
    config::WebdatasetPairs,
    parquet_file::{self, Cell},
};

const IMAGE_ENDINGS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];
/// Larger image members are passed over.
const MAX_IMAGE_BYTES: u64 = 64 << 20;
/// Longer captions are passed over; the text encoder sees 77 tokens.
const MAX_CAPTION_BYTES: u64 = 1 << 16;
/// Bytes of a tar member's header, which stand before its content.
const HEADER: u64 = 512;

/// Where a pair's bytes are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct PairPlace {
    image_offset: u64,
    caption_offset: u64,
    image_bytes: u32,
    caption_bytes: u32,
    shard: u32,
    /// Makes the size a multiple of eight; always 0.
    padding: u32,
}

/// All pairs of a folder, in the order of the shards' names and of the keys' first members.
pub struct Shards {
    paths: Vec<PathBuf>,
    pairs: Vec<PairPlace>,
}

impl Shards {
    /// Indexes the shards: each rank reads the headers of its share, and all ranks get the whole index.
    ///
    /// # Errors
    /// The same on all ranks: no shard, one that is broken or dangerous (file and member are named), or no pair.
    pub fn open(settings: &WebdatasetPairs, comm: &dyn Communicator) -> Result<Shards> {
        let folder = Path::new(&settings.folder);
        let read = || -> Result<_> {
            let paths = list(folder)?;
            let (mut mine, mut left_out) = (Vec::new(), 0u64);
            for (number, path) in paths.iter().enumerate().skip(comm.rank()).step_by(comm.size()) {
                let (pairs, without_score) = index_shard(path, settings)?;
                left_out += without_score;
                mine.push((number as u32, pairs));
            }
            Ok((paths, mine, left_out))
        };
        let (paths, mine, left_out) = all_made(comm, read())?;
        let of_ranks = comm.all_gather_bytes(&left_out.to_le_bytes())?;
        let left_out: u64 = of_ranks.iter().filter_map(|bytes| Some(u64::from_le_bytes(*bytes.first_chunk()?))).sum();
        let left_out = match left_out {
            0 => String::new(),
            n => {
                format!(", {n} more without status \"success\" and {} ≥ {}", settings.score_column, settings.score_min)
            }
        };
        let mut by_shard: Vec<Vec<PairPlace>> = vec![Vec::new(); paths.len()];
        let own: Vec<PairPlace> = mine
            .into_iter()
            .flat_map(|(shard, pairs)| pairs.into_iter().map(move |pair| PairPlace { shard, ..pair }))
            .collect();
        for bytes in comm.all_gather_bytes(bytemuck::cast_slice(&own))? {
            for pair in bytemuck::pod_collect_to_vec::<u8, PairPlace>(&bytes) {
                by_shard[pair.shard as usize].push(pair);
            }
        }
        let pairs: Vec<PairPlace> = by_shard.into_iter().flatten().collect();
        ensure!(!pairs.is_empty(), "{}: the shards hold no pair that can be used{left_out}", folder.display());
        if comm.rank() == 0 {
            log::info!("{}: {} pairs in {} shards{left_out}", folder.display(), pairs.len(), paths.len());
        }
        Ok(Shards { paths, pairs })
    }

    pub fn len(&self) -> u64 {
        self.pairs.len() as u64
    }

    /// Image and caption of pair number `index`. Errors: the shard cannot be read any more.
    pub fn read(&self, index: u64) -> Result<(Vec<u8>, Vec<u8>)> {
        let pair = &self.pairs[index as usize];
        let path = &self.paths[pair.shard as usize];
        let read = || -> std::io::Result<_> {
            // opened for each pair: a data set has more shards than a process may keep open
            let file = File::open(path)?;
            let (mut image, mut caption) = (vec![0; pair.image_bytes as usize], vec![0; pair.caption_bytes as usize]);
            file.read_exact_at(&mut image, pair.image_offset)?;
            file.read_exact_at(&mut caption, pair.caption_offset)?;
            Ok((image, caption))
        };
        read().with_context(|| format!("cannot read {}", path.display()))
    }

    /// "shard: member" of pair number `index`, for messages.
    pub fn describe(&self, index: u64) -> String {
        let pair = &self.pairs[index as usize];
        let path = &self.paths[pair.shard as usize];
        let mut header = tar::Header::new_old();
        let place = pair.image_offset.saturating_sub(HEADER);
        let read = File::open(path).and_then(|file| file.read_exact_at(header.as_mut_bytes(), place));
        let name = match read {
            Ok(()) => String::from_utf8_lossy(&header.path_bytes()).into_owned(),
            Err(_) => format!("pair {index}"),
        };
        format!("{}: {name}", path.display())
    }
}

/// The `.tar` files of a folder, by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read folder {}", folder.display()))?;
    let mut paths = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    paths.retain(|path| path.extension().is_some_and(|e| e == "tar"));
    paths.sort();
    ensure!(!paths.is_empty(), "there is no .tar file in {}", folder.display());
    Ok(paths)
}

/// The pairs of one shard that its table, if one is asked for, lets through, and how many it does not.
fn index_shard(path: &Path, settings: &WebdatasetPairs) -> Result<(Vec<PairPlace>, u64)> {
    let wanted = match settings.score_column.as_str() {
        "" => None,
        column => Some(good_keys(&path.with_extension("parquet"), column, settings.score_min)?),
    };
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = index(file).with_context(|| path.display().to_string())?;
    if let Some(summary) = found.summary() {
        log::warn!("{}: {summary}", path.display());
    }
    let keep = |key: &String| wanted.as_ref().is_none_or(|keys| keys.contains(key));
    let all = found.pairs.len();
    let pairs: Vec<PairPlace> = found.pairs.into_iter().filter(|(key, _)| keep(key)).map(|(_, pair)| pair).collect();
    let left_out = (all - pairs.len()) as u64;
    Ok((pairs, left_out))
}

/// Keys whose status is "success" and whose score is at least `min`.
fn good_keys(path: &Path, score: &str, min: f64) -> Result<HashSet<String>> {
    let mut keys = HashSet::new();
    parquet_file::read(path, &["key", "status", score], &mut |row, cells| {
        let (Cell::Text(key), Cell::Text(status)) = (cells[0], cells[1]) else { return Ok(()) };
        match cells[2] {
            Cell::Number(score) if status == b"success" && score >= min => {
                let key = std::str::from_utf8(key).with_context(|| format!("the key of row {row} is not UTF-8"))?;
                keys.insert(key.to_string());
            }
            Cell::Text(_) => bail!("column {score:?} holds text, a number is wanted"),
            _ => {}
        }
        Ok(())
    })?;
    Ok(keys)
}

/// What the headers of a shard say.
#[derive(Debug, Default)]
struct Found {
    /// By key, in the order of the first member.
    pairs: Vec<(String, PairPlace)>,
    /// Members passed over: how many and the first one, by reason.
    passed_over: Vec<(&'static str, usize, String)>,
}

impl Found {
    fn pass_over(&mut self, reason: &'static str, member: &str) {
        match self.passed_over.iter_mut().find(|(known, ..)| *known == reason) {
            Some((_, count, _)) => *count += 1,
            None => self.passed_over.push((reason, 1, member.to_string())),
        }
    }

    fn summary(&self) -> Option<String> {
        let parts = self.passed_over.iter().map(|(reason, count, first)| format!("{count} {reason} (first: {first})"));
        let parts: Vec<String> = parts.collect();
        (!parts.is_empty()).then(|| format!("passed over {}", parts.join(", ")))
    }
}

/// A key's members so far: offset and size.
#[derive(Default)]
struct Members {
    image: Option<(u64, u32)>,
    caption: Option<(u64, u32)>,
}

/// Reads the headers of a tar file.
///
/// # Errors
/// A broken file, and members that no honest shard has: links, special files, absolute paths, `..`.
fn index(mut file: impl Read + Seek) -> Result<Found> {
    let length = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut archive = Archive::new(file);
    let mut found = Found::default();
    let mut keys: Vec<(String, Members)> = Vec::new();
    let mut by_key: HashMap<String, usize> = HashMap::new();
    for entry in archive.entries_with_seek().context("this is no tar file")? {
        let entry = entry.context("broken tar file")?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = Path::new(&name);
        let up = path.components().any(|c| matches!(c, Component::ParentDir | Component::RootDir));
        ensure!(!up, "member {name:?} has a path that leads out of the shard: such a file is not used");
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous => {}
            EntryType::Directory | EntryType::XGlobalHeader => continue,
            other => bail!("member {name:?} is a link or special file ({other:?}): such a file is not used"),
        }
        let (stem, ending) = split_name(&name);
        let ending = ending.to_ascii_lowercase();
        let is_image = IMAGE_ENDINGS.contains(&ending.as_str());
        if !is_image && ending != "txt" {
            continue;
        }
        let (size, limit) = (entry.size(), if is_image { MAX_IMAGE_BYTES } else { MAX_CAPTION_BYTES });
        let end = entry.raw_file_position().checked_add(size);
        ensure!(end.is_some_and(|end| end <= length), "broken tar file: member {name:?} is cut off");
        if size > limit {
            found.pass_over("too large", &name);
            continue;
        }
        let number = *by_key.entry(stem.to_string()).or_insert_with(|| {
            keys.push((stem.to_string(), Members::default()));
            keys.len() - 1
        });
        let members = &mut keys[number].1;
        let slot = if is_image { &mut members.image } else { &mut members.caption };
        if slot.is_some() {
            found.pass_over("duplicate", &name);
            continue;
        }
        *slot = Some((entry.raw_file_position(), size as u32));
    }
    for (key, members) in keys {
        match (members.image, members.caption) {
            (Some((image_offset, image_bytes)), Some((caption_offset, caption_bytes))) => {
                let place =
                    PairPlace { image_offset, image_bytes, caption_offset, caption_bytes, ..Default::default() };
                found.pairs.push((key, place));
            }
            (Some(_), None) => found.pass_over("image without caption", &key),
            _ => found.pass_over("caption without image", &key),
        }
    }
    Ok(found)
}

/// A member's key and ending: the last part of its path is cut at the first dot, as webdataset does.
fn split_name(name: &str) -> (&str, &str) {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    match name[base..].find('.') {
        Some(dot) => (&name[..base + dot], &name[base + dot + 1..]),
        None => (name, ""),
    }
}

#[cfg(test)]
pub mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::{comm::Local, mutations::mutate};

    /// A tar file of regular members.
    pub fn tar_of(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o444);
            // written directly: the builder refuses what the tests need
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    pub fn settings(folder: &Path) -> WebdatasetPairs {
        WebdatasetPairs {
            folder: folder.display().to_string(),
            score_column: String::new(),
            score_min: 0.0,
            drop_words: String::new(),
            threads: 2,
            prefetch: 2,
        }
    }

    #[test]
    fn members_are_grouped_by_key_in_any_order() {
        let bytes = tar_of(&[
            ("000.json", b"{}"),
            ("000.txt", b"zero"),
            ("001.png", b"PNG"),
            ("./000.jpg", b"other folder"),
            ("000.jpg", b"JPEG!"),
            ("001.txt", b"one"),
            ("001.txt", b"again"),
            ("002.webp", b"no caption"),
            ("003.txt", b"no image"),
            ("notes.md", b"x"),
        ]);
        let found = index(Cursor::new(&bytes)).unwrap();
        let keys: Vec<&str> = found.pairs.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["000", "001"]);
        let pair = found.pairs[0].1;
        assert_eq!(&bytes[pair.image_offset as usize..][..pair.image_bytes as usize], b"JPEG!");
        assert_eq!(&bytes[pair.caption_offset as usize..][..pair.caption_bytes as usize], b"zero");
        let summary = found.summary().unwrap();
        for part in ["1 duplicate (first: 001.txt)", "2 image without caption", "1 caption without image (first: 003)"]
        {
            assert!(summary.contains(part), "{summary}");
        }
    }

    #[test]
    fn dangerous_and_broken_shards_are_refused_by_name() {
        let mut link = tar_of(&[("000.jpg", b"")]);
        link[156] = b'2';
        let mut header = tar::Header::from_byte_slice(&link[..512]).clone();
        header.set_cksum();
        link[..512].copy_from_slice(header.as_bytes());
        let good = tar_of(&[("000.jpg", b"JPEG"), ("000.txt", b"caption")]);
        for (bytes, wanted) in [
            (tar_of(&[("a/../../000.jpg", b"x")]), "\"a/../../000.jpg\" has a path that leads out"),
            (tar_of(&[("/etc/000.jpg", b"x")]), "\"/etc/000.jpg\" has a path that leads out"),
            (link, "\"000.jpg\" is a link"),
            (good[..515].to_vec(), "broken tar file: member \"000.jpg\" is cut off"),
            (vec![7; 2000], "broken tar file"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("00007.tar"), bytes).unwrap();
            let e = format!("{:#}", Shards::open(&settings(folder.path()), &Local).err().expect(wanted));
            assert!(e.contains(wanted) && e.contains("00007.tar") && !e.contains('\n'), "{e}");
        }
        let folder = tempfile::tempdir().unwrap();
        let e = format!("{:#}", Shards::open(&settings(folder.path()), &Local).err().unwrap());
        assert!(e.contains("no .tar file"), "{e}");
    }

    #[test]
    fn scores_and_status_choose_the_pairs() {
        use crate::parquet_file::tests::write_scored;
        let folder = tempfile::tempdir().unwrap();
        let members: Vec<(String, Vec<u8>)> = (0..4)
            .flat_map(|i| [(format!("00{i}.jpg"), b"J".to_vec()), (format!("00{i}.txt"), format!("c{i}").into_bytes())])
            .collect();
        let members: Vec<(&str, &[u8])> = members.iter().map(|(n, c)| (n.as_str(), c.as_slice())).collect();
        std::fs::write(folder.path().join("00000.tar"), tar_of(&members)).unwrap();
        let rows = [
            ("000", "success", 6.5),
            ("001", "success", 5.9),
            ("002", "failed_to_resize", 7.0),
            ("003", "success", 6.0),
        ];
        write_scored(&folder.path().join("00000.parquet"), &rows);
        let scored =
            WebdatasetPairs { score_column: "aesthetic_score".into(), score_min: 6.0, ..settings(folder.path()) };
        let shards = Shards::open(&scored, &Local).unwrap();
        assert_eq!(shards.len(), 2);
        assert_eq!(shards.read(1).unwrap().1, b"c3");
        assert!(shards.describe(1).ends_with("00000.tar: 003.jpg"), "{}", shards.describe(1));
        assert_eq!(Shards::open(&settings(folder.path()), &Local).unwrap().len(), 4);
        let none = WebdatasetPairs { score_min: 9.0, ..scored.clone() };
        assert!(format!("{:#}", Shards::open(&none, &Local).err().unwrap()).contains("no pair"));
        let wrong = WebdatasetPairs { score_column: "beauty".into(), ..scored };
        let e = format!("{:#}", Shards::open(&wrong, &Local).err().unwrap());
        assert!(e.contains("00000.parquet") && e.contains("columns are key, status, AESTHETIC_SCORE"), "{e}");
    }

    fn mutate_shards(rounds: usize) {
        let good = [
            tar_of(&[("000.jpg", b"JPEG"), ("000.txt", b"caption"), ("000.json", b"{}")]),
            tar_of(&[("a/1.png", &[1; 600]), ("a/1.txt", b"")]),
        ];
        mutate(&good, rounds, |bytes| {
            if let Ok(found) = index(Cursor::new(bytes)) {
                for (_, pair) in found.pairs {
                    assert!(pair.image_offset + u64::from(pair.image_bytes) <= bytes.len() as u64);
                    assert!(pair.caption_offset + u64::from(pair.caption_bytes) <= bytes.len() as u64);
                }
            }
        });
    }

    #[test]
    fn mutated_shards_never_panic() {
        mutate_shards(5000);
    }

    #[test]
    #[ignore = "100,000 mutated shards"]
    fn many_mutated_shards_never_panic() {
        mutate_shards(100_000);
    }
}
