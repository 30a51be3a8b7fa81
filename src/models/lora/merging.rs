//! An adapter into the weights of a model that is being loaded: W + scale·alpha/rank·B·A for every layer, in f64, rounded
//! once to f32. With DoRA's magnitudes m (Liu et al., arXiv 2402.09353) the rows of that sum are brought to the lengths m.

use std::collections::BTreeMap;

use anyhow::{bail, ensure, Context, Result};
use tch::{Kind, Tensor};

use super::{
    adapter::{Adapter, LayerAdapter},
    layouts::{Network, Part},
    ldm_names,
};
use crate::models::folder::ModelFiles;

/// What became of an adapter.
#[derive(Debug, Default, PartialEq)]
pub struct Merged {
    pub unet_layers: usize,
    pub text_layers: usize,
    /// Names of tensors of layers that the model does not have.
    pub without_layer: Vec<String>,
    /// Whether any weight has another value than before.
    pub changed: bool,
}

impl Merged {
    /// One line for each thing that has no effect.
    pub fn warn(&self, origin: &str) {
        if let Some(first) = self.without_layer.first() {
            log::warn!(
                "{origin}: {} layers of the adapter are none of the model's and have no effect, the first is {first}",
                self.without_layer.len()
            );
        }
        if !self.changed {
            log::warn!("{origin}: the adapter changes no weight (its products are zero, or the scale is)");
        }
    }
}

/// Layers of a network by their paths with underscores.
fn layers(network: Network, weights: &BTreeMap<String, Tensor>) -> BTreeMap<String, String> {
    let paths = weights.keys().filter_map(|name| name.strip_suffix(".weight"));
    let mut layers: BTreeMap<String, String> = BTreeMap::new();
    for path in paths {
        let plain = match network {
            Network::TextEncoder => path.strip_prefix("text_model.").unwrap_or(path),
            Network::UNet => path,
        };
        layers.insert(plain.replace('.', "_"), path.to_string());
    }
    if network == Network::UNet {
        for (ldm, path) in ldm_names::layers(layers.values()) {
            layers.entry(ldm.replace('.', "_")).or_insert(path);
        }
    }
    layers
}

impl Adapter {
    /// Adds the adapter, multiplied by `scale`, to the weights in `files`; those that change become f32.
    ///
    /// # Errors
    /// The adapter is of another model: the message says by which layer that shows, and how.
    pub fn merge_into(&self, files: &mut ModelFiles, scale: f64) -> Result<Merged> {
        let merged = self.merge(files, scale).with_context(|| self.origin.clone())?;
        let (unet, text) = (merged.unet_layers, merged.text_layers);
        log::debug!("{}: adapts {unet} layers of the U-Net and {text} of the text encoder", self.origin);
        Ok(merged)
    }

    fn merge(&self, files: &mut ModelFiles, scale: f64) -> Result<Merged> {
        let _no_grad = tch::no_grad_guard();
        ensure!(scale.is_finite(), "the adapter's scale is {scale}, which is no finite number");
        let empty = BTreeMap::new();
        let weights_of = |network: Network| files.weights.get(network.component()).unwrap_or(&empty);
        let tables = [Network::UNet, Network::TextEncoder].map(|network| layers(network, weights_of(network)));
        let table = |network: Network| &tables[usize::from(network == Network::TextEncoder)];
        let mut merged = Merged::default();
        let mut matched = Vec::new();
        for ((network, layer), adapter) in &self.layers {
            match table(*network).get(layer) {
                Some(path) => matched.push((*network, path, adapter)),
                None => merged.without_layer.push(adapter.name.clone()),
            }
        }
        for (network, path, adapter) in &matched {
            let weight = &weights_of(*network)[&format!("{path}.weight")];
            ensure_text_width(path, weight, adapter)?;
        }
        ensure!(
            !matched.is_empty(),
            "none of the adapter's {} layers is one of the model's: it is of another kind of model (the first is {})",
            self.layers.len(),
            merged.without_layer.first().map_or("", String::as_str)
        );
        let mut seen = BTreeMap::new();
        for (network, path, adapter) in &matched {
            if let Some(other) = seen.insert((*network, *path), &adapter.name) {
                bail!("{other} and {} are for the same layer {path}", adapter.name);
            }
        }
        for (network, path, adapter) in matched {
            let weights = files.weights.get_mut(network.component()).context("a network without weights")?;
            let changed = merge_layer(weights, path, adapter, scale).with_context(|| adapter.name.clone())?;
            merged.changed |= changed;
            match network {
                Network::UNet => merged.unet_layers += 1,
                Network::TextEncoder => merged.text_layers += 1,
            }
        }
        Ok(merged)
    }
}

/// Fails where the adapter's layer takes text embeddings of another width than the model's: the commonest mistake.
fn ensure_text_width(path: &str, weight: &Tensor, adapter: &LayerAdapter) -> Result<()> {
    let takes_text = path.ends_with("attn2.to_k") || path.ends_with("attn2.to_v");
    let Some(down) = adapter.get(Part::Down).filter(|_| takes_text) else { return Ok(()) };
    let (Some(&theirs), Some(&ours)) = (down.size().get(1), weight.size().get(1)) else { return Ok(()) };
    let known = |width: i64| match width {
        768 => " (as in Stable Diffusion 1)",
        1024 => " (as in Stable Diffusion 2)",
        2048 => " (as in SDXL)",
        _ => "",
    };
    ensure!(
        theirs == ours,
        "the adapter is of a model whose text embeddings are {theirs} wide{}, this model's are {ours} wide{} ({})",
        known(theirs),
        known(ours),
        adapter.name
    );
    Ok(())
}

/// Adapts one layer; whether a value changed.
fn merge_layer(weights: &mut BTreeMap<String, Tensor>, path: &str, adapter: &LayerAdapter, scale: f64) -> Result<bool> {
    let (weight_name, bias_name) = (format!("{path}.weight"), format!("{path}.bias"));
    let before = weights.get(&weight_name).with_context(|| format!("tensor {weight_name} is missing"))?;
    let wide = before.to_kind(Kind::Double);
    let mut weight = wide.shallow_clone();
    let factor = adapter.scale * scale;
    if let (Some(down), Some(up)) = (adapter.get(Part::Down), adapter.get(Part::Up)) {
        weight += product(down, up, adapter.get(Part::Mid), &wide.size())? * factor;
    }
    if let Some(difference) = adapter.get(Part::WeightDifference) {
        ensure_shape(difference, &wide.size())?;
        weight += difference.view_as(&wide) * scale;
    }
    if let Some(magnitude) = adapter.get(Part::Magnitude) {
        let size = wide.size();
        ensure!(
            magnitude.numel() as i64 == size[0],
            "its magnitudes have shape {:?}, the model's layer has {} outputs",
            magnitude.size(),
            size[0]
        );
        let lengths = weight.flatten(1, -1).square().sum_dim_intlist(1, false, Kind::Double).sqrt();
        let mut rows = vec![1; size.len()];
        rows[0] = size[0];
        weight = (magnitude.view([-1]) / lengths).view(rows.as_slice()) * weight;
    }
    let weight = weight.to_kind(Kind::Float);
    ensure!(weight.isfinite().all().int64_value(&[]) != 0, "the adapted weight is not finite");
    let mut changed = weight != before.to_kind(Kind::Float);
    weights.insert(weight_name, weight);

    let factors = [(Part::UpBias, factor), (Part::BiasDifference, scale)];
    for (part, factor) in factors {
        let Some(difference) = adapter.get(part) else { continue };
        let bias = weights.get(&bias_name).context("the adapter has a bias for this layer, the model's has none")?;
        ensure_shape(difference, &bias.size())?;
        let sum = (bias.to_kind(Kind::Double) + difference.view_as(bias) * factor).to_kind(Kind::Float);
        changed |= sum != bias.to_kind(Kind::Float);
        weights.insert(bias_name.clone(), sum);
    }
    Ok(changed)
}

fn ensure_shape(difference: &Tensor, size: &[i64]) -> Result<()> {
    let theirs = difference.size();
    ensure!(theirs == size, "its shape is {theirs:?}, the model's layer has {size:?}: the adapter is of another model");
    Ok(())
}

/// B·A in the shape of the layer's weight, `[outputs, inputs]` or `[outputs, inputs, height, width]`. Trailing ones are
/// read as no dimensions, so that adapters of 1×1 convolutions fit linear layers and the other way round.
fn product(down: &Tensor, up: &Tensor, mid: Option<&Tensor>, size: &[i64]) -> Result<Tensor> {
    let spatial = |shape: &[i64]| -> Vec<i64> {
        let rest = shape.get(2..).unwrap_or_default();
        if rest.iter().all(|&n| n == 1) {
            Vec::new()
        } else {
            rest.to_vec()
        }
    };
    let (a, b) = (down.size(), up.size());
    let fits = |shape: &[i64]| matches!(shape.len(), 2 | 4);
    ensure!(fits(&a) && fits(&b) && fits(size), "lora_A has shape {a:?}, lora_B {b:?}, the model's layer {size:?}");
    ensure!(a[0] == b[1], "the rank is {} by lora_A {a:?} and {} by lora_B {b:?}", a[0], b[1]);
    let kernel = match mid {
        Some(mid) => {
            let m = mid.size();
            ensure!(m.len() == 4 && m[..2] == [a[0], a[0]], "lora_mid has shape {m:?}, the rank is {}", a[0]);
            ensure!(spatial(&a).is_empty(), "lora_A has shape {a:?} beside a lora_mid");
            spatial(&m)
        }
        None => spatial(&a),
    };
    ensure!(
        spatial(&b).is_empty() && [b[0], a[1]] == size[..2] && kernel == spatial(size),
        "it is for a layer of shape {:?}, the model's has {size:?}: the adapter is of another model",
        [vec![b[0], a[1]], kernel].concat()
    );
    let (a, b) = (down.flatten(1, -1), up.flatten(1, -1));
    let product = match mid {
        // W[o, i, h, w] = Σ_jk B[o, j] M[j, k, h, w] A[k, i]
        Some(mid) => {
            b.matmul(&mid.flatten(1, -1)).view([size[0], mid.size()[1], -1]).transpose(1, 2).matmul(&a).transpose(1, 2)
        }
        None => b.matmul(&a),
    };
    Ok(product.reshape(size))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use tch::Device;

    use super::*;
    use crate::{
        comm::Local,
        miniature::EMBEDDED_MODEL,
        models::{
            folder::ModelLocation,
            pipeline::Pipeline,
            weights::{read_safetensors, write_safetensors},
        },
    };

    /// Adapters of the embedded miniature and what diffusers, PEFT and transformers compute with them.
    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/adapters").join(name)
    }

    fn reference() -> BTreeMap<String, Tensor> {
        let path = data("reference.safetensors");
        read_safetensors(&std::fs::read(&path).unwrap(), &path.display().to_string()).unwrap()
    }

    fn base() -> ModelFiles {
        ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap()
    }

    /// Prediction and text embedding of the miniature with an adapter, and what became of it.
    fn with(path: &Path, scale: f64, reference: &BTreeMap<String, Tensor>) -> (Tensor, Tensor, Merged) {
        let mut files = base();
        let adapter = Adapter::read(path, &Local).unwrap();
        assert!(adapter.guesses.is_empty(), "{:?}", adapter.guesses);
        let merged = adapter.merge_into(&mut files, scale).unwrap();
        let pipeline = Pipeline::from_files(files, Device::Cpu).unwrap();
        let _no_grad = tch::no_grad_guard();
        let eps = pipeline.unet.forward(&reference["sample"], &Tensor::from_slice(&[501i64]), &reference["text"]);
        let embedding = pipeline.text_encoder.forward(&reference["ids"]).narrow(1, 8, 4);
        (eps, embedding, merged)
    }

    fn gap(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b).abs().max().double_value(&[])
    }

    #[test]
    fn every_layout_gives_what_diffusers_and_peft_compute() {
        let reference = reference();
        for (file, golden, embedding, layers) in [
            ("peft.safetensors", "peft", "base", (8, 0)),
            ("dora.safetensors", "dora", "base", (6, 0)),
            ("biases.safetensors", "biases", "base", (2, 0)),
            ("locon.safetensors", "locon", "base", (3, 0)),
            ("diffusers-folder", "wide", "wide", (17, 3)),
            ("kohya-wide-and-text.safetensors", "wide", "wide", (17, 3)),
            ("text-linear-layers.safetensors", "base", "wide", (0, 3)),
            ("text-old.safetensors", "base", "wide", (0, 3)),
            ("peft-folder", "rslora", "rslora", (2, 3)),
        ] {
            let (eps, words, merged) = with(&data(file), 1.0, &reference);
            assert_eq!((merged.unet_layers, merged.text_layers), layers, "{file}");
            assert_eq!((merged.without_layer.len(), merged.changed), (0, true), "{file}");
            let (golden, embedding) =
                (&reference[&format!("eps.{golden}")], &reference[&format!("embedding.{embedding}")]);
            // f32 against f64, of values up to 4: observed at most 1.2e-6
            assert!(gap(&eps, golden) < 1e-5, "{file}: {:e}", gap(&eps, golden));
            assert!(gap(&words, embedding) < 1e-5, "{file}: {:e}", gap(&words, embedding));
            if layers.0 > 0 {
                let effect = gap(golden, &reference["eps.base"]);
                assert!(effect > 1e-2, "{file}: the reference shows no effect, {effect:e}");
            }
        }
        assert!(gap(&reference["embedding.wide"], &reference["embedding.base"]) > 1e-2);
    }

    #[test]
    fn layouts_of_one_adapter_give_the_same_bits() {
        let reference = reference();
        let (expected, _, _) = with(&data("peft.safetensors"), 1.0, &reference);
        for file in [
            "no-prefix.safetensors",
            "peft-named.safetensors",
            "peft.bin",
            "down-up.safetensors",
            "old-processors.safetensors",
            "oldest-processors.safetensors",
            "kohya.safetensors",
            "kohya-f16.safetensors",
            "kohya-ldm-names.safetensors",
        ] {
            assert_eq!(with(&data(file), 1.0, &reference).0, expected, "{file}");
        }
        let (none, _, merged) = with(&data("peft.safetensors"), 0.0, &reference);
        assert_eq!((none, merged.changed), (with(&data("text-old.safetensors"), 1.0, &reference).0, false));
    }

    /// The tensors of peft.safetensors changed by `change`, in a file.
    fn changed(change: impl Fn(&mut BTreeMap<String, Tensor>)) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("changed.safetensors");
        let mut tensors = read_safetensors(&std::fs::read(data("peft.safetensors")).unwrap(), "peft").unwrap();
        change(&mut tensors);
        std::fs::write(&path, write_safetensors(&tensors, Kind::Float).unwrap()).unwrap();
        (folder, path)
    }

    const TO_K: &str = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight";

    #[test]
    fn what_does_not_fit_is_named() {
        let options = (Kind::Float, Device::Cpu);
        type Change = Box<dyn Fn(&mut BTreeMap<String, Tensor>)>;
        let set = |name: &'static str, shape: &'static [i64]| -> Change {
            Box::new(move |t| drop(t.insert(name.to_string(), Tensor::ones(shape, options))))
        };
        for (change, words) in [
            (set(TO_K, &[2, 768]), ["text embeddings are 768 wide (as in Stable Diffusion 1)", "64 wide"]),
            (set(TO_K, &[3, 64]), ["rank is 3", "and 2"]),
            (set("unet.conv_in.lora_A.weight", &[2, 4, 3, 3]), ["conv_in.lora_A", "no partner"]),
            (set("unet.conv_in.weight", &[32, 4, 3, 3]), ["unet.conv_in.weight", "no part of a LoRA adapter"]),
            (set("unet.conv_in.lora_B.other.weight", &[32, 2]), ["conv_in.lora_B", "no partner"]),
            (set("lora_unet_conv_in.hada_w1_a", &[1]), ["a LoHa adapter (LyCORIS)", "rldiff reads"]),
            (set("lora_unet_conv_in.diff", &[32, 4, 1, 1]), ["[32, 4, 1, 1]", "another model"]),
            (set("lora_te2_text_model_x.alpha", &[1]), ["SDXL", "second text encoder"]),
            (
                Box::new(|t| drop(t.insert(TO_K.to_string(), Tensor::from_slice(&[f32::NAN; 128]).view([2, 64])))),
                ["attn2.to_k", "not finite"],
            ),
            (
                Box::new(|t| {
                    let named: BTreeMap<String, Tensor> = std::mem::take(t)
                        .into_iter()
                        .map(|(name, v)| (name.replace("mid_block", "middle"), v))
                        .collect();
                    *t = named;
                }),
                ["none of the adapter's 8 layers", "unet.middle"],
            ),
        ] {
            let (_folder, path) = changed(change);
            let outcome = Adapter::read(&path, &Local).and_then(|adapter| adapter.merge_into(&mut base(), 1.0));
            let error = format!("{:#}", outcome.unwrap_err());
            assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
            assert!(error.contains("changed.safetensors"), "{error}");
        }
    }

    #[test]
    fn what_has_no_effect_is_counted() {
        let options = (Kind::Float, Device::Cpu);
        let (_folder, path) = changed(|t| {
            t.insert("unet.down_blocks.7.resnets.0.conv1.lora_A.weight".into(), Tensor::ones([2, 4, 3, 3], options));
            t.insert("unet.down_blocks.7.resnets.0.conv1.lora_B.weight".into(), Tensor::ones([4, 2, 1, 1], options));
        });
        let merged = Adapter::read(&path, &Local).unwrap().merge_into(&mut base(), 1.0).unwrap();
        assert_eq!(merged.without_layer, ["unet.down_blocks.7.resnets.0.conv1.lora_A.weight"]);
        let (_folder, path) = changed(|t| drop(t.insert("lora_unet_conv_in.alpha".into(), Tensor::from(2.0))));
        let guesses = Adapter::read(&path, &Local).unwrap().guesses;
        assert!(guesses.len() == 1 && guesses[0].contains("1 alphas without lora_down"), "{guesses:?}");
        let (_folder, path) = changed(|t| {
            t.insert(TO_K.into(), Tensor::ones([1, 64], options));
            t.insert(TO_K.replace("lora_A", "lora_B"), Tensor::ones([64, 1], options));
        });
        let guesses = Adapter::read(&path, &Local).unwrap().guesses;
        assert!(guesses.len() == 1 && guesses[0].contains("different ranks (1, 2)"), "{guesses:?}");
    }
}
