//! Weights of reward networks: from a checkpoint file to a network, with every disagreement named.

use std::{collections::BTreeMap, ops::Deref, path::Path};

use anyhow::{bail, ensure, Context, Result};
use tch::{CModule, Device, Kind, Tensor};

use crate::models::{
    folder::map_file,
    parameters::{Builder, Source},
    torch_file::is_zip,
    weight_files::{read_tensors, warn_of_bad_values},
    zip_entries::ZipEntries,
};

/// How many names a message shows.
const SHOWN: usize = 4;

/// A network with the size of its weights.
pub struct Loaded<T> {
    network: T,
    pub bytes: u64,
}

impl<T> Deref for Loaded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.network
    }
}

/// Tensors of a checkpoint and where they came from.
pub struct Checkpoint {
    /// The file, for messages.
    pub path: String,
    pub tensors: BTreeMap<String, Tensor>,
    /// It was an archive of TorchScript.
    pub archive: bool,
}

impl Checkpoint {
    /// Reads safetensors, files of torch.save (by a reader that executes nothing) and the parameters of TorchScript
    /// archives; what a file is, its contents decide.
    ///
    /// # Errors
    /// One line that names the file: missing, damaged, refused.
    pub fn read(path: &str) -> Result<Checkpoint> {
        let bytes = map_file(Path::new(path))?.with_context(|| format!("cannot read {path}: there is no such file"))?;
        let archive = is_torchscript(&bytes);
        let tensors = match archive {
            true => torchscript_parameters(path)?,
            false => read_tensors(&bytes, path)?,
        };
        warn_of_bad_values(&tensors, path);
        Ok(Checkpoint { path: path.to_string(), tensors, archive })
    }

    /// The shape of `name`.
    ///
    /// # Errors
    /// It is missing, or has another number of dimensions.
    pub fn shape<const N: usize>(&self, name: &str) -> Result<[i64; N]> {
        let tensor = self.tensors.get(name).with_context(|| format!("{}: tensor {name} is missing", self.path))?;
        let size = tensor.size();
        size.as_slice()
            .try_into()
            .map_err(|_| anyhow::anyhow!("{}: tensor {name} has shape {size:?}, {N} dimensions are wanted", self.path))
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// # Errors
    /// Names the first few that are missing.
    pub fn ensure_all<'a>(&self, names: impl Iterator<Item = &'a String>) -> Result<()> {
        let missing: Vec<&str> = names.filter(|name| !self.has(name)).map(String::as_str).collect();
        ensure!(missing.is_empty(), "{}: {} tensors are missing: {}", self.path, missing.len(), first_few(&missing));
        Ok(())
    }

    /// One more than the largest N among the names `prefix.N.…`; not more than there are tensors, so that a strange
    /// name cannot ask for a network without end.
    pub fn blocks(&self, prefix: &str) -> i64 {
        let number = |name: &String| name.strip_prefix(prefix)?.strip_prefix('.')?.split('.').next()?.parse().ok();
        let last: Option<i64> = self.tensors.keys().filter_map(number).max();
        last.map_or(0, |last| last.clamp(0, self.tensors.len() as i64) + 1)
    }

    /// The network that `make` builds, in f32 and frozen, with the checkpoint's weights. `ignored` names are known and
    /// not used; further ones are logged.
    ///
    /// # Errors
    /// Tensors that are missing or have another shape than the network asks for; the first few are named.
    pub fn build<T>(
        self,
        device: Device,
        ignored: impl Fn(&str) -> bool,
        make: impl Fn(&Builder) -> Result<T>,
    ) -> Result<Loaded<T>> {
        let at = || self.path.clone();
        let outline = Builder::new(Source::ShapesOnly, Kind::Float, Device::Cpu);
        make(&outline).with_context(at)?;
        let wanted: BTreeMap<String, Vec<i64>> =
            outline.finish().0.entries.into_iter().map(|p| (p.name, p.shape)).collect();
        let missing: Vec<&str> = wanted.keys().filter(|name| !self.has(name)).map(String::as_str).collect();
        let extra: Vec<&str> =
            self.tensors.keys().filter(|n| !wanted.contains_key(*n) && !ignored(n)).map(String::as_str).collect();
        if !missing.is_empty() {
            let more = match extra.is_empty() {
                true => String::new(),
                false => format!("; {} are not known: {}", extra.len(), first_few(&extra)),
            };
            bail!("{}: {} of {} tensors are missing: {}{more}", at(), missing.len(), wanted.len(), first_few(&missing));
        }
        if let Some((name, shape)) = wanted.iter().find(|(_, shape)| shape.iter().any(|&side| side < 1)) {
            bail!("{}: tensor {name} would have the shape {shape:?}", at());
        }
        if !extra.is_empty() {
            log::warn!("{}: {} tensors are not used: {}", at(), extra.len(), first_few(&extra));
        }
        let builder = Builder::new(Source::Tensors(self.tensors), Kind::Float, device);
        let network = make(&builder).with_context(|| self.path.clone())?;
        let parameters = builder.finish().0;
        parameters.freeze();
        Ok(Loaded { network, bytes: parameters.count() * size_of::<f32>() as u64 })
    }
}

fn first_few(names: &[&str]) -> String {
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

/// A TorchScript archive holds code beside its data.
fn is_torchscript(bytes: &[u8]) -> bool {
    let holds_code = |zip: ZipEntries| zip.names().any(|name| name.ends_with("/constants.pkl"));
    is_zip(bytes) && ZipEntries::open(bytes).is_ok_and(holds_code)
}

fn torchscript_parameters(path: &str) -> Result<BTreeMap<String, Tensor>> {
    let one_line = |e: tch::TchError| {
        let text = e.to_string();
        anyhow::anyhow!("{path} is no sound TorchScript archive: {}", text.lines().next().unwrap_or_default())
    };
    let module = CModule::load(path).map_err(one_line)?;
    let parameters = module.named_parameters().map_err(one_line)?;
    ensure!(!parameters.is_empty(), "{path} is a TorchScript archive without parameters");
    Ok(parameters.into_iter().map(|(name, tensor)| (name, tensor.detach())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::layers::Linear;

    fn checkpoint(names: &[(&str, &[i64])]) -> Checkpoint {
        let tensor = |shape: &[i64]| Tensor::ones(shape, (Kind::Half, Device::Cpu));
        Checkpoint {
            path: "x.pt".into(),
            tensors: names.iter().map(|(name, shape)| (name.to_string(), tensor(shape))).collect(),
            archive: false,
        }
    }

    fn build(names: &[(&str, &[i64])]) -> Result<Loaded<Linear>> {
        checkpoint(names).build(Device::Cpu, |_| false, |b| Linear::new(&b.sub("a"), 3, 2))
    }

    #[test]
    fn a_network_of_nothing_is_refused() {
        let empty = checkpoint(&[("a.weight", &[2, 0]), ("a.bias", &[2])]);
        let e = empty.build(Device::Cpu, |_| false, |b| Linear::new(&b.sub("a"), 0, 2)).err().unwrap();
        assert!(format!("{e:#}").contains("tensor a.weight would have the shape [2, 0]"), "{e:#}");
    }

    #[test]
    fn what_is_missing_or_misshapen_is_named() {
        let layer = build(&[("a.weight", &[2, 3]), ("a.bias", &[2]), ("b", &[1])]).unwrap();
        assert_eq!(layer.bytes, 4 * (2 * 3 + 2));
        let out = layer.forward(&Tensor::ones([1, 3], (Kind::Float, Device::Cpu)));
        assert_eq!(Vec::<f32>::try_from(out.view([-1])).unwrap(), [4.0, 4.0]);
        for (names, wanted) in [
            (
                &[("a.weight", &[2, 3][..]), ("z", &[1])][..],
                "x.pt: 1 of 2 tensors are missing: a.bias; 1 are not known: z",
            ),
            (
                &[("a.weight", &[3, 2]), ("a.bias", &[2])],
                "tensor a.weight has shape [3, 2], the config asks for [2, 3]",
            ),
        ] {
            let e = format!("{:#}", build(names).err().unwrap());
            assert!(e.contains(wanted) && e.starts_with("x.pt"), "{e}");
        }
        let many = checkpoint(&[("l.2.w", &[1]), ("l.1.w", &[1, 2]), ("l.x", &[1]), ("m.99999999999.w", &[1])]);
        assert_eq!((many.blocks("l"), many.blocks("k"), many.blocks("m")), (3, 0, 5));
        assert!(many.shape::<1>("l.1.w").unwrap_err().to_string().contains("[1, 2]"));
        assert!(Checkpoint::read("none.pt").err().unwrap().to_string().contains("cannot read none.pt"));
    }
}
