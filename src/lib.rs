//! rldiff: reinforcement-learning fine-tuning of text-to-image diffusion models under MPI, after "Large-scale
//! Reinforcement Learning for Diffusion Models" (Zhang, Tzeng, Du, Kislyuk; arXiv 2401.12244), called "the paper" here.
//!
//! # The way of the data
//! One iteration of Algorithm 1 ([`train::Trainer::iterate`] with [`methods::ours`]) does this for each task (a reward with its prompts):
//! ```text
//!  prompts ──► models::text_encoder ──┐
//!  random (Philox) ──► x_T, z_t ──────┼─► diffusion::sampler ──► Trajectory: x_T … x_0, log_prob_old
//!                                     │      (diffusion::transition, once per step)      │
//!                                     │                                                  ▼
//!                                     │                                  models::vae ──► rewards ──► r
//!                                     │                                                  │ all ranks
//!                                     │                                                  ▼
//!                                     │                                  policy::advantage ──► Â
//!                                     ▼                                                  │
//!  policy::update: U-Net again on a few stored x_t ──► policy::surrogate (log_prob, w, clipped loss, gradient) ◄─┘
//!        │ gradients of lanes, then of ranks, in one fixed tree (comm)
//!        ▼
//!  policy::optimizer ──► new weights ──► … ──► pairs + policy::pretraining: the same for L_pre
//! ```
//! That is the paper's method; what its rivals do with the same parts is in [`methods`]. [`evaluation`] compares models on
//! prompt sets, [`study`] trains and compares all of them.
//!
//! Around the loop: [`cli`] → [`config`] → [`run`] (model in, [`store`] and [`telemetry`] out, [`evaluate`] now and then and
//! at the end). After it: [`report`] shows runs, [`human_eval`] asks people.
//! What all of them print goes through [`streams`].
//! A folder that is written has one owner, and keeps what is not ours: [`folders`].
//! When a run may end before its last iteration, and what counts as diverged: [`convergence`].
//! Where the time of a start goes: [`start_up`]. The machine's name: [`host`].
//! Beside it: [`watch`] (a rank that hangs), [`stragglers`] (one that is slow), [`replicas`] (one with other weights).
//! A user's own files come in through [`user_file`], [`text_file`], [`image_file`], [`parquet_file`], [`python_json`] and
//! [`word_list`]; [`excerpt`] is what messages, pages and sheets show of them.
//!
//! All of it on the CPU, or on a GPU per rank ([`device`] chooses): tensors lie there, [`kernels::on_device`] and
//! [`policy::gradient_sum`] do the same there with the kernels of `cuda/` and with NCCL.
//!
//! # Notation
//! | here | paper | meaning |
//! |---|---|---|
//! | `x_t`, `x_prev` | x_t, x_{t−1} | scaled latents before and after a denoising step, f32 `[B, C, H, W]` |
//! | `eps_uncond`, `eps_cond` | ε_θ(x_t, ∅), ε_θ(x_t, c) | both halves of the U-Net's output |
//! | `guidance_scale` | g | eps = eps_uncond + g (eps_cond − eps_uncond) |
//! | `alpha_bar` | ᾱ_t | noise schedule |
//! | `sigma`, `eta` | σ_t, η | noise of a transition; η = 1 is DDPM's |
//! | `log_prob`, `log_prob_old` | log p_θ, log p_θold | of x_prev given x_t, mean over latent elements |
//! | ratio w | w_t | exp(log_prob − log_prob_old) |
//! | `advantage` | Â | normalised reward |
//! | `clip_range` | ε of Eq. 7 | clipping of w |
//! | `pretrain.weight` | β | weight of L_pre |
//! | lane | – | fixed piece of the global batch: what it computes does not depend on the number of ranks |
//!
//! # Where the equations are
//! | equation | place |
//! |---|---|
//! | DDIM transition | [`diffusion::transition`], [`kernels::ddim_step`] |
//! | Eq. 7 clipped objective and its gradient | [`policy::surrogate`], [`kernels::clipped_surrogate`] |
//! | Eq. 8 with the pretraining loss | [`policy::pretraining`], [`pairs`] |
//! | Eq. 10 advantage | [`policy::advantage`] |
//! | Eq. 11 preference | [`rewards::image_reward`] |
//! | Eq. 12 statistical parity | [`rewards::parity`] |
//! | Eq. 13 object composition | [`rewards::composition`], [`rewards::unidet`] |
//! | Algorithm 1 | [`methods::ours`] in [`train`] |
//! | ReFL, reward-weighted, RAFT, DRaFT-LV (Table 6) | [`methods`] |
//! | AdamW | [`kernels::adamw`], [`policy::optimizer`] |

#![deny(clippy::print_stdout, clippy::print_stderr)]

// first: its macro is every module's
#[macro_use]
pub mod streams;

pub mod cannot_write;
pub mod caught_panics;
pub mod cli;
pub mod comm;
pub mod config;
pub mod convergence;
pub mod cut_prompts;
pub mod device;
pub mod diffusion;
pub mod draw;
pub mod evaluate;
pub mod evaluation;
pub mod excerpt;
pub mod faults;
pub mod folders;
pub mod host;
pub mod human_eval;
pub mod image_file;
pub mod image_statistics;
pub mod iteration_log;
pub mod kernels;
pub mod learner;
pub mod memory;
pub mod methods;
pub mod miniature;
pub mod model_origin;
pub mod models;
#[cfg(test)]
mod mutations;
pub mod pairs;
pub mod parquet_file;
pub mod percentiles;
pub mod policy;
pub mod prompts;
pub mod python_json;
pub mod random;
pub mod replicas;
pub mod report;
#[cfg(test)]
mod revision;
pub mod rewards;
pub mod run;
pub mod signals;
pub mod start_up;
pub mod store;
pub mod stragglers;
pub mod study;
pub mod task;
pub mod telemetry;
pub mod text_file;
pub mod train;
pub mod user_file;
pub mod watch;
pub mod word_list;

/// The version, and the commit where this was built in a git checkout: `0.1.0 (0123456789)`. Checkpoints, logs and pictures
/// say it. Changes that were not committed it does not show.
pub const CODE_VERSION: &str = env!("RLDIFF_CODE_VERSION");
