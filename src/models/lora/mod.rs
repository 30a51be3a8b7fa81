//! Low-rank adapters: y = x·Wᵀ + b + (alpha/rank)·(x·Aᵀ)·Bᵀ with W frozen, A `[rank, inputs]`, B `[outputs, rank]`
//! (Hu et al., arXiv 2106.09685). A starts as in PEFT (uniform, bound 1/√inputs), B at zero, so training starts at the
//! base model.
//!
//! Trained adapters are layers of the U-Net of their own (this file). Written files have the layout that diffusers'
//! `load_lora_weights` reads: `unet.<module>.lora_A.weight` and `lora_B.weight`. That reader takes alpha = rank where no
//! alpha is given, so alpha/rank is multiplied into B when a file is written.
//!
//! Adapters that are only used come in every layout, for any layer, and are added to the weights:
//!
//! ```text
//! layouts.rs   names of tensors -> layers        ldm_names.rs   the same by the original code's names
//! config.rs    alpha by PEFT's configuration     adapter.rs     files and folders
//! merging.rs   W + alpha/rank·B·A
//! ```

pub mod adapter;
mod config;
mod layouts;
pub mod ldm_names;
mod merging;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

use super::parameters::Parameters;

/// Which layers get an adapter, and how large it is.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSettings {
    pub rank: i64,
    pub alpha: f64,
    /// Last part of the layers' names inside the U-Net's attention: `to_q`, `to_k`, `to_v`, `to_out.0`.
    pub targets: Vec<String>,
}

impl LoraSettings {
    /// alpha / rank.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Does the layer of this name get an adapter?
    pub fn covers(&self, layer: &str) -> bool {
        let in_attention = layer.contains(".attn1.") || layer.contains(".attn2.");
        in_attention && self.targets.iter().any(|target| layer.ends_with(&format!(".{target}")))
    }
}

/// Both factors of one layer.
pub struct LoraPair {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl LoraPair {
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let low = x.linear(&self.a.to_kind(x.kind()), None::<&Tensor>);
        low.linear(&self.b.to_kind(x.kind()), None::<&Tensor>) * self.scale
    }
}

/// The U-Net's weights as its source gave them, on the host, with the adapters' products added: what a model without adapters
/// needs to be the same. Where a product is zero a weight keeps its bits.
///
/// # Errors
/// An adapter without its other factor or its layer.
pub fn merge(unet: &Parameters, adapters: &BTreeMap<String, Tensor>, scale: f64) -> Result<BTreeMap<String, Tensor>> {
    let _no_grad = tch::no_grad_guard();
    let mut merged = unet.exact();
    merged.values_mut().for_each(|weight| *weight = weight.to_device(Device::Cpu));
    for (name, a) in adapters {
        let Some(layer) = name.strip_suffix(".lora_A.weight") else { continue };
        let b = adapters.get(&format!("{layer}.lora_B.weight")).with_context(|| format!("{layer} lacks lora_B"))?;
        let weight = merged.get_mut(&format!("{layer}.weight")).with_context(|| format!("no layer {layer}"))?;
        let (wide, product) = (weight.to_kind(Kind::Float), b.matmul(a).to_kind(Kind::Float) * scale);
        *weight = wide.where_self(&product.eq(0.0), &(&wide + &product));
    }
    Ok(merged)
}

/// Adapters as the tensors of a LoRA file.
pub fn to_file(adapters: &BTreeMap<String, Tensor>, scale: f64) -> BTreeMap<String, Tensor> {
    let scaled = |name: &str, t: &Tensor| if name.ends_with(".lora_B.weight") { t * scale } else { t.shallow_clone() };
    adapters.iter().map(|(name, t)| (format!("unet.{name}"), scaled(name, t))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        miniature::EMBEDDED_MODEL,
        models::{
            folder::{ModelFiles, ModelLocation},
            parameters::Source,
            pipeline::{Build, Pipeline},
        },
    };

    fn with_adapters() -> (Pipeline, BTreeMap<String, Tensor>) {
        let files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let settings = LoraSettings { rank: 4, alpha: 6.0, targets: vec!["to_q".into(), "to_out.0".into()] };
        let pipeline =
            Pipeline::with(files, Device::Cpu, Build { lora: Some((settings, Source::Seeded(3))), ..Build::default() })
                .unwrap();
        let named = |p: &Parameters| p.entries.iter().map(|e| (e.name.clone(), e.tensor.shallow_clone())).collect();
        let adapters = named(pipeline.trainable());
        (pipeline, adapters)
    }

    fn predict(pipeline: &Pipeline) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let [c, h, w] = pipeline.latent_shape();
        let x = (Tensor::arange(2 * c * h * w, (Kind::Float, Device::Cpu)) * 0.37).sin().view([2, c, h, w]);
        let text = pipeline.embed(&["a kite on a book", "a portrait of a nurse"]).unwrap();
        pipeline.unet.forward(&x, &Tensor::from_slice(&[501i64, 1]), &text)
    }

    fn base() -> Pipeline {
        Pipeline::from_files(ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap(), Device::Cpu).unwrap()
    }

    #[test]
    fn training_starts_at_the_base_model_and_merging_changes_nothing() {
        let (pipeline, adapters) = with_adapters();
        // two targets in two attentions of every block
        assert!(adapters.keys().all(|n| n.contains("to_q.lora_") || n.contains("to_out.0.lora_")));
        assert_eq!(predict(&pipeline), predict(&base()));

        tch::no_grad(|| {
            for (name, t) in &adapters {
                if name.ends_with("lora_B.weight") {
                    t.shallow_clone().copy_(&((t.ones_like().cumsum(0, Kind::Float) * 0.7).cos() * 0.3));
                }
            }
        });
        let tuned = predict(&pipeline);
        assert!((&tuned - predict(&base())).abs().max().double_value(&[]) > 1e-3);
        let folder = tempfile::tempdir().unwrap();
        let merged = folder.path().join("merged");
        pipeline.save(&merged, Kind::Float, Some(&pipeline.unet_with(&adapters).unwrap())).unwrap();
        let files = ModelFiles::read(&ModelLocation::Disk(merged)).unwrap();
        let again = predict(&Pipeline::from_files(files, Device::Cpu).unwrap());
        // observed 1e-6: W·x + s·B·(A·x) against (W + s·B·A)·x in f32
        let gap = (again - &tuned).abs().max().double_value(&[]);
        assert!(gap < 2e-5, "{gap:e}");
    }

    #[test]
    fn a_written_file_added_to_the_weights_gives_the_trained_model() {
        let (pipeline, mut adapters) = with_adapters();
        tch::no_grad(|| {
            for (name, t) in adapters.iter_mut().filter(|(name, _)| name.ends_with("lora_B.weight")) {
                t.copy_(&((t.ones_like().cumsum(0, Kind::Float) * name.len() as f64).cos() * 0.2));
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("adapters.safetensors");
        pipeline.save_lora(&path, &adapters, Kind::Float).unwrap();
        let mut files = ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
        let adapter = adapter::Adapter::read(&path, &crate::comm::Local).unwrap();
        let merged = adapter.merge_into(&mut files, 1.0).unwrap();
        assert_eq!((2 * merged.unet_layers, merged.text_layers), (adapters.len(), 0));
        let again = Pipeline::from_files(files, Device::Cpu).unwrap();
        let gap = (predict(&again) - predict(&pipeline)).abs().max().double_value(&[]);
        // as above: (W + B·A)·x against W·x + B·(A·x) in f32
        assert!(gap < 2e-5, "{gap:e}");
        let effect = (predict(&again) - predict(&base())).abs().max().double_value(&[]);
        assert!(effect > 1e-2, "{effect:e}");
    }
}
