//! rldiff: reinforcement-learning fine-tuning of text-to-image diffusion models under MPI.

pub mod comm;
pub mod diffusion;
pub mod kernels;
pub mod miniature;
pub mod models;
pub mod policy;
pub mod prompts;
pub mod random;
pub mod rewards;
pub mod store;
pub mod telemetry;
