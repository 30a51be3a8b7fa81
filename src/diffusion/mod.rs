//! The diffusion process below the sampler: the noise schedule and one transition of it.

pub mod schedule;
pub mod scheduler_config;
pub mod transition;
