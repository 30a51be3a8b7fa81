//! The files of a model in the diffusers layout: on disk, embedded in the binary, or received from rank 0.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail, Context, Result};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::{
    judge, tokenizer_files,
    weight_files::{read_weights, warn_of_bad_values},
    weights::{ensure_no_pointer, modernise_text_names, modernise_vae_names, tensor_bytes},
};
use crate::{
    comm::{broadcast_items, Communicator},
    python_json,
    signals::{self, Interrupted},
};

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelLocation {
    Disk(PathBuf),
    /// (path inside the folder, contents)
    Embedded(&'static [(&'static str, &'static [u8])]),
}

/// Small files that are kept as they are, so that a saved model has the tokenizer and configs it was loaded with, and
/// whether a model needs them. The tokenizer's are judged together.
const TEXT_FILES: &[(&str, bool)] = &[
    ("model_index.json", true),
    ("scheduler/scheduler_config.json", true),
    ("text_encoder/config.json", true),
    ("unet/config.json", true),
    ("vae/config.json", true),
    (tokenizer_files::VOCABULARY, false),
    (tokenizer_files::MERGES, false),
    (tokenizer_files::WHOLE, false),
    (tokenizer_files::SETTINGS, false),
    (tokenizer_files::SPECIAL, false),
    (tokenizer_files::ADDED, false),
    ("feature_extractor/preprocessor_config.json", false),
];

/// The three networks and the base names of their weight files.
pub const COMPONENTS: [(&str, &str); 3] =
    [("text_encoder", "model"), ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")];

/// Everything a model folder holds, in memory.
#[derive(Default)]
pub struct ModelFiles {
    pub texts: BTreeMap<String, Vec<u8>>,
    /// Per component: tensors by name, in the type they are stored in.
    pub weights: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// For errors.
    pub origin: String,
}

impl ModelFiles {
    /// Reads the whole folder, after everything in it that is not weights has been judged.
    ///
    /// # Errors
    /// Says what the folder holds instead of a model that is trained here, or names the missing or damaged file;
    /// [`Interrupted`] between two networks, where a signal may end the loading.
    pub fn read(location: &ModelLocation) -> Result<Self> {
        let (mut files, notes) = judge::judge(location)?;
        for (component, stem) in COMPONENTS {
            signals::check()?;
            let mut tensors = read_weights(location, &files.origin, component, stem)?;
            warn_of_bad_values(&tensors, &format!("{}: {component}", files.origin));
            tensors = match component {
                "vae" => modernise_vae_names(tensors),
                "text_encoder" => modernise_text_names(tensors),
                _ => Ok(tensors),
            }
            .with_context(|| format!("{}: {component}", files.origin))?;
            files.weights.insert(component.to_string(), tensors);
        }
        judge::warn_once(notes);
        Ok(files)
    }

    /// Reads the configs and the tokenizer alone.
    ///
    /// # Errors
    /// Names the first file that is missing.
    pub(super) fn read_texts(location: &ModelLocation) -> Result<Self> {
        let mut files = ModelFiles { origin: location.origin()?, ..Default::default() };
        for &(path, required) in TEXT_FILES {
            match location.bytes(path)? {
                Some(bytes) => files.keep_text(path, &bytes)?,
                None if required => bail!("{}: {path} is missing", files.origin),
                None => {}
            }
        }
        Ok(files)
    }

    fn keep_text(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        ensure_no_pointer(bytes, &format!("{}: {path}", self.origin))?;
        self.texts.insert(path.to_string(), bytes.to_vec());
        Ok(())
    }

    /// Reads only what the tokenizer needs: `tokenizer/`, and `text_encoder/config.json` where it is there. A folder
    /// that itself holds `vocab.json` or `tokenizer.json` is taken for the `tokenizer/` of a model.
    pub fn read_tokenizer(location: &ModelLocation) -> Result<Self> {
        let mut files = ModelFiles { origin: location.origin()?, ..Default::default() };
        let bare = location.bytes("vocab.json")?.is_some() || location.bytes("tokenizer.json")?.is_some();
        for &(path, _) in TEXT_FILES {
            let inside = path.strip_prefix("tokenizer/");
            if inside.is_none() && path != "text_encoder/config.json" {
                continue;
            }
            if let Some(bytes) = location.bytes(inside.filter(|_| bare).unwrap_or(path))? {
                files.keep_text(path, &bytes)?;
            }
        }
        Ok(files)
    }

    /// Rank 0 reads, every other rank receives. An error on rank 0 is the same error everywhere.
    pub fn read_and_broadcast(location: &ModelLocation, comm: &dyn Communicator) -> Result<Self> {
        if comm.size() == 1 {
            return ModelFiles::read(location);
        }
        let read = if comm.rank() == 0 { Some(ModelFiles::read(location)) } else { None };
        let interrupted = matches!(&read, Some(Err(e)) if signals::is_interruption(e));
        signals::meet(comm, if interrupted { Err(Interrupted.into()) } else { Ok(()) })?;
        let mut header = match &read {
            Some(Ok(files)) => serde_json::to_vec(&Header::of(files))?,
            Some(Err(e)) => serde_json::to_vec(&Header { error: Some(format!("{e:#}")), ..Header::default() })?,
            None => Vec::new(),
        };
        comm.broadcast_bytes(&mut header, 0)?;
        let header: Header = serde_json::from_slice(&header).context("model header from rank 0")?;
        if let Some(error) = header.error {
            return Err(anyhow!(error));
        }

        let mut files = match read {
            Some(files) => files?,
            None => ModelFiles { origin: header.origin.clone(), ..Default::default() },
        };
        let Header { texts, tensors, .. } = header;
        let lengths: Vec<usize> = texts.iter().map(|(_, length)| *length).collect();
        let mut received = Vec::new();
        broadcast_items(
            comm,
            &lengths,
            |item| Ok(files.texts[&texts[item].0].clone()),
            |item, bytes| {
                received.push((texts[item].0.clone(), bytes.to_vec()));
                Ok(())
            },
        )?;
        files.texts.extend(received);
        let lengths: Vec<usize> = tensors.iter().map(TensorHeader::bytes).collect::<Result<_>>()?;
        let mut received = Vec::new();
        broadcast_items(
            comm,
            &lengths,
            |item| tensor_bytes(&files.weights[&tensors[item].component][&tensors[item].name]),
            |item, bytes| {
                let entry = &tensors[item];
                received.push(Tensor::f_from_data_size(bytes, &entry.shape, kind_from_code(entry.kind)?)?);
                Ok(())
            },
        )?;
        for (entry, tensor) in tensors.into_iter().zip(received) {
            files.weights.entry(entry.component).or_default().insert(entry.name, tensor);
        }
        Ok(files)
    }

    /// SHA-256 of names and contents of everything that was read.
    pub fn digest(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for (path, bytes) in &self.texts {
            hash.update(format!("{path} {}\n", bytes.len()));
            hash.update(bytes);
        }
        for (component, tensors) in &self.weights {
            for (name, tensor) in tensors {
                hash.update(format!("{component} {name} {:?} {:?}\n", tensor.kind(), tensor.size()));
                hash.update(tensor_bytes(tensor)?);
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    pub fn text(&self, path: &str) -> Result<&str> {
        let bytes = self.texts.get(path).with_context(|| format!("{}: {path} is missing", self.origin))?;
        std::str::from_utf8(bytes).with_context(|| format!("{}: {path} is not UTF-8", self.origin))
    }

    pub fn json(&self, path: &str) -> Result<Value> {
        let bytes = self.texts.get(path).with_context(|| format!("{}: {path} is missing", self.origin))?;
        python_json::parse(bytes).map_err(|e| anyhow!("{}: {path} {e}", self.origin))
    }

    pub fn optional_json(&self, path: &str) -> Result<Option<Value>> {
        if self.texts.contains_key(path) {
            self.json(path).map(Some)
        } else {
            Ok(None)
        }
    }
}

impl ModelLocation {
    /// The folder's name for errors, if there is a folder.
    pub fn origin(&self) -> Result<String> {
        match self {
            ModelLocation::Disk(dir) if !dir.is_dir() => bail!(judge::no_folder(dir)),
            ModelLocation::Disk(dir) => Ok(dir.display().to_string()),
            ModelLocation::Embedded(_) => Ok("embedded miniature".to_string()),
        }
    }

    /// A file's contents; None if there is no such file.
    pub(super) fn bytes(&self, path: &str) -> Result<Option<Bytes>> {
        match self {
            ModelLocation::Embedded(files) => {
                Ok(files.iter().find(|(p, _)| *p == path).map(|(_, b)| Bytes::Embedded(b)))
            }
            ModelLocation::Disk(dir) => map_file(&dir.join(path)),
        }
    }
}

/// A file's contents without a copy.
pub(crate) enum Bytes {
    Embedded(&'static [u8]),
    Mapped(memmap2::Mmap),
    Empty,
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Embedded(b) => b,
            Bytes::Mapped(m) => m,
            Bytes::Empty => &[],
        }
    }
}

pub(crate) fn map_file(path: &Path) -> Result<Option<Bytes>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("cannot open {}", path.display())),
    };
    if file.metadata()?.len() == 0 {
        return Ok(Some(Bytes::Empty));
    }
    // SAFETY: the map is read once while loading; a file that another program cuts short meanwhile ends the process
    // with SIGBUS, the accepted risk of every memory-mapped loader.
    let map = unsafe { memmap2::Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
    Ok(Some(Bytes::Mapped(map)))
}

/// What rank 0 tells the others before the contents.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Header {
    error: Option<String>,
    origin: String,
    /// Names and bytes.
    texts: Vec<(String, usize)>,
    tensors: Vec<TensorHeader>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct TensorHeader {
    component: String,
    name: String,
    shape: Vec<i64>,
    kind: u8,
}

impl TensorHeader {
    fn bytes(&self) -> Result<usize> {
        let count: i64 = self.shape.iter().product();
        Ok(usize::try_from(count)? * kind_from_code(self.kind)?.elt_size_in_bytes())
    }
}

const KINDS: [Kind; 8] =
    [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double, Kind::Int64, Kind::Int, Kind::Uint8, Kind::Bool];

fn kind_from_code(code: u8) -> Result<Kind> {
    KINDS.get(usize::from(code)).copied().with_context(|| format!("tensor kind {code} from rank 0"))
}

impl Header {
    fn of(files: &ModelFiles) -> Self {
        let mut tensors = Vec::new();
        for (component, weights) in &files.weights {
            for (name, tensor) in weights {
                let kind =
                    KINDS.iter().position(|k| *k == tensor.kind()).expect("read_safetensors gives these kinds only");
                tensors.push(TensorHeader {
                    component: component.clone(),
                    name: name.clone(),
                    shape: tensor.size(),
                    kind: kind as u8,
                });
            }
        }
        let texts = files.texts.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect();
        Header { error: None, origin: files.origin.clone(), texts, tensors }
    }
}
