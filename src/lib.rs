//! rldiff: reinforcement-learning fine-tuning of text-to-image diffusion models under MPI.

pub mod comm;
pub mod prompts;
pub mod random;
pub mod rewards;
pub mod telemetry;
