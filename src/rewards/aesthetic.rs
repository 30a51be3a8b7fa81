//! The aesthetic predictor (improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`): how good a picture looks,
//! whatever its prompt. LAION-Aesthetics v2 is scored by it, the paper's pretraining pairs have 6 or more.
//!
//! r = MLP(e/‖e‖), e the 768 numbers of CLIP ViT-L/14's picture tower (class token after the last LayerNorm, projected).
//! About 1 to 10, as people rated; higher is better. The published head has no activations, a variant with ReLUs is
//! told by its names.
//!
//! CLIP comes from OpenAI's archive, whose numbers are f16, or in Hugging Face's layout; both compute in f32 here, which
//! differs from the f16 of their own code on a GPU by up to 0.01.

use anyhow::{ensure, Result};
use tch::{Device, Tensor};

use super::{
    clip::{
        layouts,
        towers::{unit, PictureTower},
    },
    clip_input::ClipInput,
    score_head::{HeadSizes, ScoreHead},
    vision_transformer::{Sizes, CLIP},
    weights::{Checkpoint, Loaded},
    DifferentiableReward, Reward, Scores,
};
use crate::{config::AestheticSettings, prompts::Prompt};

/// See the module.
pub struct Aesthetic {
    tower: Loaded<PictureTower>,
    head: Loaded<ScoreHead>,
    input: ClipInput,
    device: Device,
}

impl Aesthetic {
    /// # Errors
    /// Files that cannot be read; checkpoints without a tensor, or with one of another shape (the first few are named).
    pub fn load(settings: &AestheticSettings, device: Device) -> Result<Self> {
        let mut tower = layouts::canonical(Checkpoint::read(&settings.clip)?)?;
        let head = match settings.head.as_str() {
            "" => {
                let (head, rest) =
                    std::mem::take(&mut tower.tensors).into_iter().partition(|(n, _)| n.starts_with("layers."));
                tower.tensors = rest;
                Checkpoint { path: settings.clip.clone(), tensors: head, archive: tower.archive }
            }
            path => Checkpoint::read(path)?,
        };
        let sizes = Sizes::of(&tower, "")?;
        let [outputs, _] = tower.shape("projection")?;
        let head_sizes = HeadSizes::of(&head, "")?;
        ensure!(
            head_sizes.input() == outputs,
            "{}: the head takes {} numbers, {} gives {outputs}",
            head.path,
            head_sizes.input(),
            tower.path
        );
        let tower = tower.build(device, layouts::ignored, |b| PictureTower::new(b, sizes, CLIP, outputs))?;
        let head = head.build(device, |_| false, |b| ScoreHead::new(b, &head_sizes))?;
        Ok(Aesthetic { tower, head, input: ClipInput::of_torchvision(sizes.side as usize), device })
    }

    /// Rewards of prepared pictures, f32 `[n]`.
    fn judge(&self, input: &Tensor) -> Tensor {
        self.head.forward(&unit(&self.tower.features(input)))
    }
}

impl Reward for Aesthetic {
    fn name(&self) -> &str {
        "aesthetic"
    }

    fn weight_bytes(&self) -> u64 {
        self.tower.bytes + self.head.bytes
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        self.input.score(images, prompts, self.device, |input| Ok(self.judge(input)))
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        Some(self)
    }
}

impl DifferentiableReward for Aesthetic {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        self.input.rewards(images, prompts, self.device, |input| Ok(self.judge(input)))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::Value;
    use tch::Kind;

    use super::*;

    /// The published head on fixed vectors, against f64 (data of the project, not shipped).
    #[test]
    fn the_published_heads_numbers() {
        let Some(data) = std::env::var_os("RLDIFF_TEST_DATA") else {
            eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with aesthetic/ and golden_values.json");
            return;
        };
        let file = "sac+logos+ava1-l14-linearMSE.pth";
        let checkpoint = Checkpoint::read(Path::new(&data).join("aesthetic").join(file).to_str().unwrap()).unwrap();
        let sizes = HeadSizes::of(&checkpoint, "").unwrap();
        assert_eq!(sizes.input(), 768);
        let head = checkpoint.build(Device::Cpu, |_| false, |b| ScoreHead::new(b, &sizes)).unwrap();
        let golden: Value =
            serde_json::from_slice(&std::fs::read(Path::new(&data).join("golden_values.json")).unwrap()).unwrap();
        let vector = |name: &str| -> Vec<f64> {
            (0..768)
                .map(|k| match name {
                    "ones_unit" => 1.0,
                    "e0" => f64::from(u8::from(k == 0)),
                    "e767" => f64::from(u8::from(k == 767)),
                    "sin_k_plus_1_unit" => f64::from(k + 1).sin(),
                    "cos_0.1k_unit" => (0.1 * f64::from(k)).cos(),
                    "alternating_unit" => f64::from(1 - 2 * (k % 2)),
                    other => panic!("unknown vector {other}"),
                })
                .collect()
        };
        let outputs = golden["aesthetic_head"][file]["f64_outputs"].as_object().unwrap();
        assert_eq!(outputs.len(), 6);
        for (name, wanted) in outputs {
            let e = unit(&Tensor::from_slice(&vector(name)).view([1, -1]).to_kind(Kind::Float));
            let got = head.forward(&e).double_value(&[0]);
            // f32 against f64 through five layers, numbers of about 5: observed 2e-6
            assert!((got - wanted.as_f64().unwrap()).abs() < 2e-5, "{name}: {got} {wanted}");
        }
    }
}
