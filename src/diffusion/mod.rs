//! The diffusion process: the noise schedule, one transition of it, and roll-outs.

pub mod recorded;
pub mod sampler;
pub mod schedule;
pub mod transition;
