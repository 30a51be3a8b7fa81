//! What a task's pictures are judged by. Paths are relative to the folder that rldiff is started in.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Rewards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum RewardConfig {
    /// Eq. 13 with the miniature's shape-and-colour detector.
    MiniatureComposition {},
    /// Eq. 13 with UniDet.
    Composition(UniDetSettings),
    /// Eq. 12 over the pictures of a prompt.
    Parity { classifier: ClassifierConfig },
    /// Eq. 11: ImageReward.
    ImageReward(ImageRewardSettings),
    /// The aesthetic predictor on CLIP's picture embedding.
    Aesthetic(AestheticSettings),
    /// PickScore: CLIP trained on people's choices.
    PickScore(PickScoreSettings),
    /// Human Preference Score v2 or v2.1.
    Hps(HpsSettings),
    /// CLIPScore: the cosine of CLIP's features.
    ClipScore(ClipScoreSettings),
    /// Colourfulness and contrast, the miniature's stand-in for human preference.
    Colorfulness {},
    /// Nearness to clean renderings of the caption, the miniature's judge that nobody trains on.
    MiniatureLikeness {},
    /// Minus the size of the picture as a JPEG file, kB.
    JpegCompressibility {},
    /// The size of the picture as a JPEG file, kB.
    JpegIncompressibility {},
    /// A TorchScript file: f32 `[B, 3, H, W]` in [0, 1] in, `[B]` or `[B, 1]` out.
    Torchscript { path: String },
    /// A program that is sent pictures and prompts.
    Command(CommandReward),
    /// As `command`, a program that runs already and may serve several ranks.
    Server(ServerReward),
    /// A weighted sum.
    Sum {
        /// Each part is normalised over the task's batch before it is weighted and added.
        normalise: bool,
        parts: Vec<RewardPart>,
    },
    /// The control: N(0, 1), whatever the picture.
    Random {},
}

impl RewardConfig {
    /// The reward's name in configs.
    pub fn name(&self) -> Result<String> {
        let value = serde_json::to_value(self)?;
        Ok(value["name"].as_str().context("a reward without a name")?.to_owned())
    }
}

/// A part of a weighted sum.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardPart {
    pub weight: f64,
    pub reward: RewardConfig,
}

/// Files of [`crate::rewards::image_reward`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRewardSettings {
    /// `ImageReward.pt`, or its tensors as safetensors.
    pub weights: String,
    /// `vocab.txt` of bert-base-uncased.
    pub vocabulary: String,
}

/// Files and choices of [`crate::rewards::unidet`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UniDetSettings {
    /// `Unified_learned_OCIM_R50_6x+2x.pth` or its RS200 sister.
    pub weights: String,
    /// `learned_mAP+M.json` of UniDet's label spaces.
    pub labels: String,
    /// Confidences up to this one count as 0.
    pub threshold: f64,
    /// Only so many of a picture's boxes count, all classes together; 0 for all of them.
    pub top: usize,
    pub channel_order: ChannelOrder,
    /// Pictures are resized so that their short side has this many pixels (800 is usual) …
    pub short_side: usize,
    /// … and their long side not more than this many (1333 is usual).
    pub long_side: usize,
}

/// In which order a network sees red, green and blue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChannelOrder {
    AsTrained,
    Bgr,
    Rgb,
}

/// Files of [`crate::rewards::aesthetic`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AestheticSettings {
    /// CLIP ViT-L/14: OpenAI's `ViT-L-14.pt`, or the weights of Hugging Face's `clip-vit-large-patch14`.
    pub clip: String,
    /// The predictor's head, `sac+logos+ava1-l14-linearMSE.pth`; "" where it is in the same file as CLIP.
    pub head: String,
}

/// How a picture's size is changed where a CLIP scores it; methods that differentiate do the same in floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resizing {
    /// Bytes, by Pillow: transformers' and OpenAI's preprocessing.
    PillowBicubic,
    /// Floating-point numbers, as torchvision resizes a tensor.
    FloatBicubic,
    /// The same by torchvision's default filter.
    FloatBilinear,
}

/// Where the middle of an odd rest begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Middle {
    /// Rounded down.
    Transformers,
    /// Halves to the even number.
    Torchvision,
}

/// Files and choices of [`crate::rewards::pick_score`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PickScoreSettings {
    /// `model.safetensors` or `pytorch_model.bin` of `yuvalkirstain/PickScore_v1`.
    pub weights: String,
    /// `config.json` (or `open_clip_config.json`); "" for one beside the weights, or the published ViT-H/14.
    #[serde(default)]
    pub config: String,
    /// A folder with CLIP's `vocab.json` and `merges.txt` or `tokenizer.json`, or `bpe_simple_vocab_16e6.txt.gz`; "" for the
    /// weights' folder.
    #[serde(default)]
    pub tokenizer: String,
    /// The reward is scale · exp(logit_scale) · cos + offset.
    #[serde(default = "one")]
    pub scale: f64,
    #[serde(default)]
    pub offset: f64,
    #[serde(default = "pillow")]
    pub resizing: Resizing,
    #[serde(default = "transformers")]
    pub middle: Middle,
    /// Of the two resizings in floating-point numbers; Pillow antialiases always.
    #[serde(default = "yes")]
    pub antialias: bool,
}

/// Files and choices of [`crate::rewards::hps`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HpsSettings {
    /// `HPS_v2_compressed.pt` or `HPS_v2.1_compressed.pt` of `xswu/HPSv2`.
    pub weights: String,
    /// As [`PickScoreSettings::config`].
    #[serde(default)]
    pub config: String,
    /// As [`PickScoreSettings::tokenizer`].
    #[serde(default)]
    pub tokenizer: String,
    /// The reward is scale · cos + offset.
    #[serde(default = "one")]
    pub scale: f64,
    #[serde(default)]
    pub offset: f64,
    /// As torchvision since 0.17; false as before.
    #[serde(default = "yes")]
    pub antialias: bool,
}

/// Files and choices of [`crate::rewards::clip_score`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClipScoreSettings {
    /// OpenAI's `ViT-L-14.pt`, the weights of `openai/clip-vit-large-patch14`, or another CLIP's.
    pub weights: String,
    /// As [`PickScoreSettings::config`].
    #[serde(default)]
    pub config: String,
    /// As [`PickScoreSettings::tokenizer`].
    #[serde(default)]
    pub tokenizer: String,
    /// Put before every prompt.
    #[serde(default = "a_photo_depicts")]
    pub prefix: String,
    /// The reward is scale · max(cos, 0) + offset …
    #[serde(default = "two_and_a_half")]
    pub scale: f64,
    #[serde(default)]
    pub offset: f64,
    /// … without the maximum where this is false …
    #[serde(default = "yes")]
    pub clamp: bool,
    /// … and times exp(logit_scale) where this is true.
    #[serde(default)]
    pub logit_scale: bool,
    #[serde(default = "pillow")]
    pub resizing: Resizing,
    #[serde(default = "transformers")]
    pub middle: Middle,
    /// As [`PickScoreSettings::antialias`].
    #[serde(default = "yes")]
    pub antialias: bool,
}

fn one() -> f64 {
    1.0
}

fn two_and_a_half() -> f64 {
    2.5
}

fn yes() -> bool {
    true
}

fn pillow() -> Resizing {
    Resizing::PillowBicubic
}

fn transformers() -> Middle {
    Middle::Transformers
}

fn a_photo_depicts() -> String {
    "A photo depicts ".to_string()
}

/// A program as a reward; its protocol is in [`crate::rewards::protocol`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandReward {
    /// Program and arguments; no shell.
    pub command: Vec<String>,
    /// How long a batch may take.
    pub timeout_seconds: f64,
    /// How long the program may take to get ready.
    pub start_timeout_seconds: f64,
    /// How often, in a run, a rank's process is started again after a failure.
    pub restarts: usize,
}

/// A server of the same protocol on a socket or by HTTP.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerReward {
    /// `HOST:PORT`, `unix:` and the path of a local socket, or `http://HOST:PORT/PATH`.
    pub address: String,
    /// How long a batch may take.
    pub timeout_seconds: f64,
    /// How long the server may take to listen and get ready.
    pub start_timeout_seconds: f64,
    /// How often, in a run, a rank connects again after a failure.
    pub restarts: usize,
}

/// Attribute classifiers for `parity`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum ClassifierConfig {
    /// For the miniature's portraits.
    MiniatureSkinTone {},
    /// For photographs: the skin colour of the largest face.
    SkinTone(SkinToneSettings),
    /// A TorchScript file: pictures in, logits `[B, classes]` out.
    Torchscript { path: String, classes: Vec<String> },
}

/// Face detection and buckets of [`crate::rewards::skin_tone`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkinToneSettings {
    /// SeetaFace's `seeta_fd_frontal_v1.0.bin`.
    pub face_model: String,
    /// Smaller faces are not looked for; at least 20.
    pub min_face_pixels: u32,
    /// Detections below this score do not count (2.0 is usual; more is stricter).
    pub face_score: f64,
    /// Angles in degrees between dark, brown, intermediate and light, ascending.
    pub cuts: [f64; 3],
}
