//! Named tensors ↔ safetensors files.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fs::File,
    path::Path,
};

use anyhow::{bail, ensure, Context, Error, Result};
use safetensors::{Dtype, SafeTensors, View};
use tch::{Device, Kind, Tensor};

use crate::cannot_write::CannotWrite;

/// Fails if `bytes` are what Git leaves in place of a large file that was not fetched.
pub fn ensure_no_pointer(bytes: &[u8], origin: &str) -> Result<()> {
    if bytes.starts_with(b"version https://git-lfs") {
        bail!("{origin} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`");
    }
    Ok(())
}

/// The tensors of a safetensors file held in `bytes`, in the type they are stored in. `origin` names it in errors.
pub fn read_safetensors(bytes: &[u8], origin: &str) -> Result<BTreeMap<String, Tensor>> {
    ensure_no_pointer(bytes, origin)?;
    let file = SafeTensors::deserialize(bytes).with_context(|| format!("{origin} is not a sound safetensors file"))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let kind = match view.dtype() {
            Dtype::F32 => Kind::Float,
            Dtype::F16 => Kind::Half,
            Dtype::BF16 => Kind::BFloat16,
            Dtype::F64 => Kind::Double,
            Dtype::I64 => Kind::Int64,
            Dtype::I32 => Kind::Int,
            Dtype::U8 => Kind::Uint8,
            Dtype::BOOL => Kind::Bool,
            other => bail!("{origin}: tensor {name} has type {other:?}, which is not supported"),
        };
        let shape: Vec<i64> = view.shape().iter().map(|&d| d as i64).collect();
        let tensor =
            Tensor::f_from_data_size(view.data(), &shape, kind).with_context(|| format!("{origin}: tensor {name}"))?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok(tensors)
}

/// Bytes of a tensor in row-major order, little-endian.
pub fn tensor_bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let tensor = tensor.to_device(Device::Cpu).contiguous();
    let count = tensor.numel();
    let mut bytes = vec![0u8; count * tensor.kind().elt_size_in_bytes()];
    tensor.f_copy_data_u8(&mut bytes, count)?;
    Ok(bytes)
}

/// A tensor on its way into a file: converted when its turn comes, so that a large model is not held twice.
struct Outgoing<'a> {
    tensor: &'a Tensor,
    kind: Kind,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<'a> Outgoing<'a> {
    fn new(name: &str, tensor: &'a Tensor, float: Kind) -> Result<Self> {
        let kind = if tensor.is_floating_point() { float } else { tensor.kind() };
        let dtype = match kind {
            Kind::Float => Dtype::F32,
            Kind::Half => Dtype::F16,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Double => Dtype::F64,
            Kind::Int64 => Dtype::I64,
            other => bail!("tensor {name} of type {other:?} cannot be written"),
        };
        Ok(Outgoing { tensor, kind, dtype, shape: tensor.size().iter().map(|&d| d as usize).collect() })
    }
}

impl View for Outgoing<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(tensor_bytes(&self.tensor.to_kind(self.kind)).expect("its kind was checked"))
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.kind.elt_size_in_bytes()
    }
}

fn outgoing(tensors: &BTreeMap<String, Tensor>, kind: Kind) -> Result<Vec<(&str, Outgoing<'_>)>> {
    tensors.iter().map(|(name, tensor)| Ok((name.as_str(), Outgoing::new(name, tensor, kind)?))).collect()
}

/// What PyTorch's readers expect in a file's header.
fn metadata() -> Option<HashMap<String, String>> {
    Some(HashMap::from([("format".to_string(), "pt".to_string())]))
}

/// A safetensors file of `tensors`, floating-point ones converted to `kind` (f32, f16 or bf16).
pub fn write_safetensors(tensors: &BTreeMap<String, Tensor>, kind: Kind) -> Result<Vec<u8>> {
    Ok(safetensors::serialize(outgoing(tensors, kind)?, metadata())?)
}

/// As [`write_safetensors`], straight into the file at `path`.
pub fn save_safetensors(path: &Path, tensors: &BTreeMap<String, Tensor>, kind: Kind) -> Result<()> {
    let outgoing = outgoing(tensors, kind)?;
    let written = safetensors::serialize_to_file(outgoing, metadata(), path).map_err(Error::new);
    // some file systems say only now that the disk is full
    written.and_then(|()| Ok(File::open(path)?.sync_all()?)).context(CannotWrite::file(path))
}

/// Names and shapes of VAE attention changed in diffusers 0.18: old `query`/`proj_attn` and 4-D weights are accepted.
pub fn modernise_vae_names(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    const RENAMES: [(&str, &str); 4] =
        [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    let mut out = BTreeMap::new();
    for (name, tensor) in tensors {
        let mut new_name = name.clone();
        let mut tensor = tensor;
        if name.contains("mid_block.attentions.") {
            for (old, new) in RENAMES {
                new_name = new_name.replace(old, new);
            }
            let size = tensor.size();
            if size.len() == 4 && !new_name.contains("group_norm") {
                ensure!(size[2..] == [1, 1], "tensor {name} has shape {size:?}, expected [C, C, 1, 1]");
                tensor = tensor.view([size[0], size[1]]);
            }
        }
        ensure!(
            out.insert(new_name.clone(), tensor).is_none(),
            "the file holds tensor {new_name} twice (old and new name)"
        );
    }
    Ok(out)
}

/// Names of the text encoder's tensors as transformers 4 has them, `text_model.…`. Transformers 5 writes them without that,
/// and files of whole CLIP models or of wrapped ones have more in front (`transformer.text_model.`, `module.`).
pub fn modernise_text_names(tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
    const NAME: &str = "text_model.";
    let mut prefixes = tensors.keys().filter_map(|name| name.strip_suffix("embeddings.token_embedding.weight"));
    let Some(prefix) = prefixes.next().map(str::to_string) else { return Ok(tensors) };
    if let Some(other) = prefixes.next() {
        bail!("the file holds two text encoders, {prefix}… and {other}…");
    }
    let parts = ["embeddings.", "encoder.", "final_layer_norm."];
    let renamed = |name: String| match name.strip_prefix(&prefix) {
        Some(rest) if parts.iter().any(|part| rest.starts_with(part)) => format!("{NAME}{rest}"),
        _ => name,
    };
    Ok(tensors.into_iter().map(|(name, tensor)| (renamed(name), tensor)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_in_f32_and_f16() {
        let values = Tensor::from_slice(&[1.0f32, -2.5, 0.125, 3.0]).view([2, 2]);
        let tensors = BTreeMap::from([("w".to_string(), values.copy())]);
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let bytes = write_safetensors(&tensors, kind).unwrap();
            let back = read_safetensors(&bytes, "test").unwrap();
            assert_eq!(back["w"].kind(), kind);
            assert_eq!(back["w"].to_kind(Kind::Float), values);
        }
    }

    #[test]
    fn a_text_encoders_names_have_one_form() {
        let zero = || Tensor::from_slice(&[0f32]);
        for prefix in ["", "text_model.", "transformer.text_model.", "module.text_model.", "cond_stage_model."] {
            let names = ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.bias", "final_layer_norm.bias"];
            let mut tensors: BTreeMap<_, _> = names.iter().map(|name| (format!("{prefix}{name}"), zero())).collect();
            tensors.insert("text_projection.weight".into(), zero());
            let back = modernise_text_names(tensors).unwrap();
            assert!(names.iter().all(|name| back.contains_key(&format!("text_model.{name}"))), "{prefix:?}");
            assert!(back.contains_key("text_projection.weight") && back.len() == 4);
        }
        let two = ["a.", "b."].map(|p| (format!("{p}embeddings.token_embedding.weight"), zero()));
        assert!(modernise_text_names(BTreeMap::from(two)).unwrap_err().to_string().contains("two text encoders"));
    }

    #[test]
    fn damaged_files_are_named() {
        let tensors = BTreeMap::from([("w".to_string(), Tensor::from_slice(&[1.0f32, 2.0]))]);
        let bytes = write_safetensors(&tensors, Kind::Float).unwrap();
        for bad in [&bytes[..bytes.len() - 1], &bytes[..4], b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"] {
            let e = read_safetensors(bad, "unet/x.safetensors").unwrap_err().to_string();
            assert!(e.contains("unet/x.safetensors"), "{e}");
        }
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
        let e = read_safetensors(pointer, "x").unwrap_err().to_string();
        assert!(e.contains("Git LFS pointer"), "{e}");
    }
}
