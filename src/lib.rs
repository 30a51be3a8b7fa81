//! rldiff: reinforcement-learning fine-tuning of text-to-image diffusion models under MPI.

pub mod cli;
pub mod comm;
pub mod config;
pub mod diffusion;
pub mod evaluate;
pub mod iteration_log;
pub mod kernels;
pub mod learner;
pub mod miniature;
pub mod models;
pub mod pairs;
pub mod policy;
pub mod prompts;
pub mod random;
pub mod rewards;
pub mod run;
pub mod store;
pub mod task;
pub mod telemetry;
pub mod train;
