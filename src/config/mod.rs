//! A run's configuration: one complete TOML per experiment, no inheritance, unknown keys are errors.
//!
//! `load.rs` reads a file and applies `--set`; `bounds.rs` holds the bounds of every number, `validate.rs` is the only place
//! that checks the batch arithmetic, and `needs.rs` lists the files that a config names.

use serde::{Deserialize, Serialize};

mod auto;
pub mod bounds;
pub mod eval;
pub mod load;
pub mod method;
pub mod needs;
pub mod prompts;
pub mod rewards;
pub mod stop;
pub mod study;
#[cfg(test)]
mod testing;
pub mod validate;

use crate::{
    comm::{nccl, Wire},
    device::numerics::Precision,
    miniature::Edition,
    policy::{
        advantage::{AdvantageSettings, PerPromptSettings},
        gradient_sum::Transport,
    },
};

pub use auto::{Checkpointing, Graphs};
pub use eval::{EvalConfig, EvalModel, EvalSet, EvalSettings, EvalSplit, Metric, Overlap};
pub use method::{DraftConfig, MethodConfig, OursConfig, RaftConfig, ReflConfig, RewardWeightedConfig};
pub use prompts::{ParquetPrompts, PromptConfig, TablePrompts, TextPrompts};
pub use rewards::{
    AestheticSettings, ChannelOrder, ClassifierConfig, ClipScoreSettings, CommandReward, HpsSettings,
    ImageRewardSettings, Middle, PickScoreSettings, Resizing, RewardConfig, RewardPart, ServerReward, SkinToneSettings,
    UniDetSettings,
};
pub use stop::{RewardSource, StopConfig, StopCriterion};
pub use study::{SaturationConfig, StudyConfig, StudyRun};
pub use validate::Derived;

/// Everything a run is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub run: RunConfig,
    /// What ends the run before `run.iterations`; nothing where it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopConfig>,
    pub method: MethodConfig,
    pub model: ModelConfig,
    pub lora: LoraConfig,
    pub rollout: RolloutConfig,
    /// Of method `ours` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advantage: Option<AdvantageConfig>,
    pub update: UpdateConfig,
    pub comm: CommConfig,
    pub pretrain: PretrainConfig,
    pub ema: EmaConfig,
    pub trajectories: TrajectoryConfig,
    pub evaluation: EvaluationConfig,
    #[serde(rename = "task")]
    pub tasks: Vec<TaskConfig>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Results go to `runs/<name>/` unless `--out` says otherwise.
    pub name: String,
    pub seed: u64,
    /// The run's end, unless `[stop]` ends it before.
    pub iterations: u64,
    /// Fixed pieces of every global batch; the number of ranks must divide it.
    pub lanes: usize,
    /// libtorch's threads per rank; part of what the bits of a result depend on.
    pub threads: usize,
    /// Iterations between checkpoints; 0 for none.
    pub checkpoint_every: u64,
    /// How many of the newest checkpoints stay.
    pub keep_checkpoints: usize,
    /// Checkpoints whose iteration is a multiple of this stay as well; 0 for none.
    pub keep_every: u64,
    /// Iterations between comparisons of the ranks' weights, averages and moments; 0 for none.
    pub compare_every: u64,
    /// The run ends where a rank waits longer than this for the others, in seconds; 0 for never. At the end the others
    /// wait while rank 0 writes the results.
    pub collective_limit: f64,
    /// The run ends where a rank's reward takes longer than this, in seconds; 0 for never.
    pub reward_limit: f64,
    /// libtorch uses kernels alone whose results repeat from run to run; what has none is an error with its name. On a CPU all
    /// of them repeat.
    #[serde(default)]
    pub deterministic: bool,
}

impl RunConfig {
    /// `collective_limit`; None for never.
    pub fn patience(&self) -> Option<std::time::Duration> {
        (self.collective_limit > 0.0).then(|| std::time::Duration::from_secs_f64(self.collective_limit))
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A diffusers folder, `miniature` for the one in the program, or `embedded` for its first edition.
    pub path: String,
    /// What the U-Net computes in.
    pub compute: Compute,
    /// Which activations of the U-Net's blocks are computed again in the backward pass instead of kept.
    pub gradient_checkpointing: Checkpointing,
    /// Pictures that the VAE decodes at once; 0 for all of a lane.
    pub decode_batch: usize,
    /// What VAE, text encoder and the rewards' networks compute in.
    #[serde(default)]
    pub frozen_compute: Precision,
}

/// Number type of the U-Net's weights and activations. Latents, scheduler and log-probabilities are always f32, and so
/// are the weights that the optimizer changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compute {
    F32,
    Bf16,
}

impl Compute {
    pub fn kind(self) -> tch::Kind {
        match self {
            Compute::F32 => tch::Kind::Float,
            Compute::Bf16 => tch::Kind::BFloat16,
        }
    }
}

/// Low-rank adapters of the U-Net's attention, trained in place of its weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// 0 trains the whole U-Net.
    pub rank: i64,
    /// The adapters' product is multiplied by alpha / rank.
    pub alpha: f64,
    /// `to_q`, `to_k`, `to_v`, `to_out.0`.
    pub targets: Vec<String>,
}

/// Roll-out by DDIM (one transition is `diffusion::transition`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// N.
    pub steps: usize,
    /// η; the policy gradient needs σ > 0.
    pub eta: f64,
    /// g of classifier-free guidance.
    pub guidance_scale: f64,
    /// The U-Net's work of a denoising step is recorded once as a CUDA graph and replayed (on a GPU only).
    pub cuda_graph: Graphs,
}

/// Which rewards a reward is compared with (Eq. 10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// The task's whole batch of the iteration.
    Batch,
    /// Running statistics of the same prompt (DDPO).
    PerPrompt,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdvantageConfig {
    pub normalisation: Normalisation,
    /// ε of Eq. 10.
    pub epsilon: f64,
    /// |Â| is at most this.
    pub clip: f64,
    /// The run stops where more than this share of a batch's rewards is not finite.
    pub max_bad_fraction: f64,
    /// Rewards kept per prompt (`per_prompt` only).
    pub prompt_buffer: usize,
    /// Below this many kept rewards a prompt is compared with the batch (`per_prompt` only).
    pub prompt_min_count: usize,
}

impl AdvantageConfig {
    pub fn settings(&self) -> AdvantageSettings {
        AdvantageSettings { epsilon: self.epsilon, clip: self.clip, max_bad_fraction: self.max_bad_fraction }
    }

    pub fn per_prompt(&self) -> PerPromptSettings {
        PerPromptSettings { buffer_size: self.prompt_buffer, min_count: self.prompt_min_count }
    }
}

/// AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateConfig {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// Global gradient norm above which a gradient is scaled down; 0 for never.
    pub max_grad_norm: f64,
    /// Optimizer steps over which the learning rate rises from 0.
    pub warmup_steps: u64,
}

/// How gradients travel between ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommConfig {
    /// Megabytes (2^20 bytes of f32) of gradients that are summed over the ranks at once, while the backward pass goes on.
    pub bucket_mb: f64,
    pub wire: Wire,
}

impl CommConfig {
    pub fn transport(&self) -> Transport {
        Transport { bucket_bytes: (self.bucket_mb * f64::from(1 << 20)) as usize, wire: self.wire }
    }
}

/// How L_pre takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PretrainMode {
    /// Not at all.
    Off,
    /// Its own optimizer steps at the end of each iteration (Algorithm 1).
    Separate,
    /// β∇L_pre added to every policy gradient (Eq. 8).
    Combined,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    pub mode: PretrainMode,
    /// β.
    pub weight: f64,
    /// Pairs per lane and step.
    pub batch_per_lane: usize,
    /// Optimizer steps per iteration (`separate` only).
    pub steps: usize,
    /// Share of captions replaced by the empty prompt.
    pub caption_dropout: f64,
    /// Where the pairs come from.
    pub data: PairData,
}

/// Sources of (picture, caption) pairs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "snake_case", deny_unknown_fields)]
pub enum PairData {
    /// The pictures that the miniature was pretrained on, those of one edition of its world: 1 for the model `embedded`, 2 for
    /// `miniature`.
    Miniature {
        #[serde(default)]
        edition: Edition,
    },
    /// Shards as img2dataset writes them.
    Webdataset(WebdatasetPairs),
    /// Latents and text embeddings that `rldiff encode` made of such shards with the run's model.
    Encoded { folder: String },
}

/// A folder of `.tar` files with images and captions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebdatasetPairs {
    pub folder: String,
    /// Column of the `.parquet` file beside each shard; pairs below `score_min` and failed ones are left out. "" uses
    /// all pairs and needs no parquet files.
    pub score_column: String,
    pub score_min: f64,
    /// File of words and phrases, one per line; a pair whose caption has one of them is dropped. "" for none.
    pub drop_words: String,
    /// Threads that read and decode, per rank.
    pub threads: usize,
    /// Batches of a lane that are made ahead of time.
    pub prefetch: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// Decay per optimizer step of the average that is evaluated and saved; 0 keeps none.
    pub decay: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrajectoryConfig {
    /// Iterations between trajectory shards; 0 for none.
    pub every: u64,
    pub latents: StoredLatents,
    pub precision: StoredPrecision,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredLatents {
    /// x_t and x_{t−1} of the steps that were trained on.
    Selected,
    /// The whole trajectory.
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredPrecision {
    F16,
    F32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationConfig {
    /// Seed of prompts and noise; the same for all models that are compared.
    pub seed: u64,
    /// Columns of the before/after sheet per task.
    pub pictures: usize,
    /// Iterations between small evaluations in the course of training; 0 for none. There is one before the first
    /// iteration and one after the last, too.
    pub every: u64,
    /// Held-out prompts of each task in these.
    pub prompts: usize,
    /// Pictures per prompt in these; a reward that judges groups gets its groups.
    pub images: usize,
}

/// A reward with its prompt distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    pub name: String,
    /// False: the reward is only evaluated, not trained on.
    pub train: bool,
    /// Samples per iteration over all ranks.
    pub samples: usize,
    /// Consecutive samples that share a prompt.
    pub images_per_prompt: usize,
    /// Factor of the task's loss.
    pub weight: f64,
    /// Samples of an evaluation.
    pub evaluation_samples: usize,
    /// As `images_per_prompt`, in evaluations. A reward that judges groups learns faster from small ones (a picture's
    /// share in the reward is larger), and is reported for large ones.
    pub evaluation_images_per_prompt: usize,
    pub prompts: PromptConfig,
    pub reward: RewardConfig,
}

impl Config {
    /// Tasks that are trained on, with their index in the config (which random numbers depend on).
    pub fn trained_tasks(&self) -> impl Iterator<Item = (usize, &TaskConfig)> {
        self.tasks.iter().enumerate().filter(|(_, task)| task.train)
    }

    /// What NCCL will sum for this run, and for how long a rank waits.
    pub fn nccl_terms(&self) -> nccl::Terms {
        let Transport { bucket_bytes, wire } = self.comm.transport();
        nccl::Terms { patience: self.run.patience(), bucket_bytes, wire }
    }
}
