//! The policy gradient: from rewards to advantages, from advantages to gradients, from gradients to a step.

pub mod advantage;
pub mod gradient_sum;
pub mod lanes;
pub mod optimizer;
pub mod pretraining;
pub mod surrogate;
pub mod update;
