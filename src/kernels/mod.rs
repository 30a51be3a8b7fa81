//! The kernels: one file per operation, each with a plain `reference()` that every platform compiles and a checked
//! launcher of the CUDA kernel in `cuda/<operation>.cu`, which must agree with it.
//!
//! A `reference()` works on flat row-major f32 slices (one row per sample), does the per-element arithmetic in f32
//! and every sum in f64 in an order that depends on nothing but the length, so its results are reproducible bit for
//! bit. The rest of the program sees tensors; this file is the bridge between the two.

use anyhow::{ensure, Context, Result};
use tch::{Device, Kind, Tensor};

pub mod adamw;
pub mod buffer;
pub mod clipped_surrogate;
pub mod cuda;
pub mod ddim_step;
pub mod geglu;
pub mod group_norm_silu;
pub mod layer_norm;
pub mod normal_rows;
pub mod on_device;
mod operation;

pub use buffer::FlatBuffer;
pub use operation::install;

/// Partial sums kept side by side: fixes the order of a sum and lets it use vector registers.
pub(crate) const LANES: usize = 8;

/// Sum in the fixed order of the kernels: term i goes to partial sum i mod 8, then the partial sums are paired up.
pub(crate) fn ordered_sum(terms: impl Iterator<Item = f64>) -> f64 {
    let mut partial = [0.0; LANES];
    for (i, term) in terms.enumerate() {
        partial[i % LANES] += term;
    }
    pair_up(partial)
}

/// ((0+4)+(2+6)) + ((1+5)+(3+7)): the last part of every ordered sum.
pub(crate) fn pair_up(p: [f64; LANES]) -> f64 {
    ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]))
}

/// The values of `tensor` in row-major order on the host, as f32 (exact for f32, f16 and bf16).
///
/// `size` is the shape it must have; `name` is what an error calls it.
pub(crate) fn to_host(tensor: &Tensor, size: &[i64], name: &str) -> Result<Vec<f32>> {
    ensure!(tensor.size() == size, "{name} has shape {:?}, expected {size:?}", tensor.size());
    ensure!(tensor.is_floating_point(), "{name} holds {:?}, not floating-point numbers", tensor.kind());
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().reshape([-1]);
    Vec::<f32>::try_from(&flat).with_context(|| format!("reading {name}"))
}

/// As [`to_host`], for what must already be f32: latents, noise, log-probabilities.
pub(crate) fn to_host_f32(tensor: &Tensor, size: &[i64], name: &str) -> Result<Vec<f32>> {
    ensure!(tensor.kind() == Kind::Float, "{name} must be f32, it is {:?}", tensor.kind());
    to_host(tensor, size, name)
}

/// An f32 tensor of shape `size` on `device`.
pub(crate) fn from_host(values: &[f32], size: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(values).reshape(size).to_device(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordered_sum_adds_every_term_once() {
        for n in [0, 1, 7, 8, 9, 1000] {
            let expected = (n * (n + 1) / 2) as f64;
            assert_eq!(ordered_sum((1..=n).map(|i| i as f64)), expected, "n = {n}");
        }
    }

    #[test]
    fn bridge_keeps_values_of_views_and_names_a_wrong_shape() {
        let tensor = Tensor::from_slice(&[0f32, 1., 2., 3., 4., 5.]).reshape([2, 3]);
        assert_eq!(to_host(&tensor.transpose(0, 1), &[3, 2], "t").unwrap(), [0., 3., 1., 4., 2., 5.]);
        let error = to_host(&tensor, &[3, 2], "x_t").unwrap_err().to_string();
        assert!(error.contains("x_t") && error.contains("[3, 2]"), "{error}");
        let error = to_host_f32(&tensor.to_kind(Kind::Double), &[2, 3], "x_t").unwrap_err().to_string();
        assert!(error.contains("must be f32"), "{error}");
    }
}
