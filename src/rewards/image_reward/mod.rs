//! ImageReward (Xu et al., arXiv 2304.05977), the preference reward of Eq. 11: how well people would like the picture for
//! its prompt.
//!
//! r = (MLP(h) − μ)/σ with μ = 0.16717362830052426 and σ = 1.0333394966054072, where h is the hidden state of \[CLS\] after
//! BERT's last layer, whose cross-attention sees the picture's ViT tokens (BLIP). No unit; about −2.3 to 2, the standard
//! normal's scale over the authors' comparisons; higher is better.
//!
//! Weights are `ImageReward.pt` as published, or the same tensors as safetensors; the vocabulary is bert-base-uncased's.
//! All sizes come from the shapes in the file; heads have 64 channels. Scoring prepares pictures as the authors' package
//! does, to the bit; the differentiable path (ReFL, DRaFT) resizes in floating-point numbers, as their training script.

mod text;
mod tokenizer;

use anyhow::{ensure, Result};
use tch::{Device, Tensor};

use self::{
    text::{TextEncoder, TextSizes},
    tokenizer::{WordPiece, LENGTH},
};
use super::{
    clip_input::ClipInput,
    score_head::{HeadSizes, ScoreHead},
    vision_transformer::{self, Sizes, VisionTransformer},
    weights::{Checkpoint, Loaded},
    DifferentiableReward, Reward, Scores,
};
use crate::{config::ImageRewardSettings, models::parameters::Builder, prompts::Prompt};

/// Mean and standard deviation of the MLP's output over the authors' data.
const MEAN: f64 = 0.16717362830052426;
const STD: f64 = 1.0333394966054072;

/// In every checkpoint, and of no use for scores.
fn ignored(name: &str) -> bool {
    name == "blip.text_encoder.embeddings.position_ids"
        || ["blip.vision_proj.", "blip.text_proj."].iter().any(|part| name.starts_with(part))
}

struct Network {
    vision: VisionTransformer,
    text: TextEncoder,
    head: ScoreHead,
}

impl Network {
    fn new(b: &Builder, vision: Sizes, text: TextSizes, head: &HeadSizes) -> Result<Network> {
        Ok(Network {
            vision: VisionTransformer::new(&b.sub("blip.visual_encoder"), vision, vision_transformer::BLIP)?,
            text: TextEncoder::new(&b.sub("blip.text_encoder"), text)?,
            head: ScoreHead::new(&b.sub("mlp"), head)?,
        })
    }
}

/// See the module.
pub struct ImageReward {
    network: Loaded<Network>,
    tokenizer: WordPiece,
    input: ClipInput,
    device: Device,
}

impl ImageReward {
    /// # Errors
    /// Files that cannot be read; a checkpoint that is not ImageReward's (the first tensors that are missing or have
    /// another shape are named); a vocabulary of another size.
    pub fn load(settings: &ImageRewardSettings, device: Device) -> Result<Self> {
        let tokenizer = WordPiece::load(&settings.vocabulary)?;
        let checkpoint = Checkpoint::read(&settings.weights)?;
        let vision = Sizes::of(&checkpoint, "blip.visual_encoder.")?;
        let text = TextSizes::of(&checkpoint, "blip.text_encoder.")?;
        let head = HeadSizes::of(&checkpoint, "mlp.")?;
        let at = &settings.weights;
        ensure!(
            text.context == vision.width,
            "{at}: the text encoder looks at tokens of width {}, the pictures' have {}",
            text.context,
            vision.width
        );
        ensure!(
            head.input() == text.width,
            "{at}: the head takes {} numbers, the text has {}",
            head.input(),
            text.width
        );
        ensure!(text.positions >= LENGTH as i64, "{at}: {} positions, prompts have {LENGTH} tokens", text.positions);
        ensure!(
            tokenizer.size == text.vocabulary,
            "{}: {} tokens with the two that BLIP adds, {at} has embeddings of {}",
            settings.vocabulary,
            tokenizer.size,
            text.vocabulary
        );
        let network = checkpoint.build(device, ignored, |b| Network::new(b, vision, text, &head))?;
        Ok(ImageReward { network, tokenizer, input: ClipInput::of_torchvision(vision.side as usize), device })
    }

    /// Rewards of prepared pictures, f32 `[n]`.
    fn judge(&self, input: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        let vision = &self.network.vision;
        let pictures = vision.norm(&vision.forward(input));
        let hidden = self.network.text.forward(&self.tokenizer.encode(&texts)?, &pictures);
        Ok((self.network.head.forward(&hidden) - MEAN) / STD)
    }
}

impl Reward for ImageReward {
    fn name(&self) -> &str {
        "image_reward"
    }

    fn weight_bytes(&self) -> u64 {
        self.network.bytes
    }

    fn score(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Scores> {
        self.input.score(images, prompts, self.device, |input| self.judge(input, prompts))
    }

    fn differentiable(&mut self) -> Option<&mut dyn DifferentiableReward> {
        Some(self)
    }
}

impl DifferentiableReward for ImageReward {
    fn rewards(&mut self, images: &Tensor, prompts: &[Prompt]) -> Result<Tensor> {
        self.input.rewards(images, prompts, self.device, |input| self.judge(input, prompts))
    }
}
