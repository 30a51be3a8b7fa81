//! The policy gradient: from rewards to advantages, and from advantages to gradients of the model's outputs.

pub mod advantage;
pub mod surrogate;
