//! One AdamW step on a flat range of parameters (Loshchilov and Hutter, decoupled weight decay), and the norm that
//! gradient clipping needs.
//!
//! ```text
//! g ← scale·g
//! p ← p·(1 − lr·λ)
//! m ← m + (1−β₁)(g − m)
//! v ← β₂·v + (1−β₂)·g²
//! p ← p − lr/(1−β₁ᵏ) · m / (√v/√(1−β₂ᵏ) + ε)
//! ```
//!
//! The order of operations is that of torch's AdamW. State and arithmetic are f32, the scalars are worked out in f64
//! and rounded once. At the paper's setting lr·λ = 2e-8 is below half a unit in the last place of 1, so in f32 the
//! decay factor is exactly 1, here as in torch.

use super::cuda::{arguments, ensure_apart, Buffer, Element, Machine, Slice};
use super::{ordered_sum, pair_up, LANES};
use anyhow::{ensure, Result};
use std::ops::Range;
use std::sync::Arc;

/// Hyperparameters; the default is the paper's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// ε, outside the square root.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { learning_rate: 2e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 }
    }
}

/// What a step multiplies with, in f32; also `Scalars` of `cuda/adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Scalars {
    grad_scale: f32,
    /// 1 − lr·λ.
    decay: f32,
    /// 1 − β₁.
    rest1: f32,
    beta2: f32,
    /// 1 − β₂.
    rest2: f32,
    /// √(1 − β₂ᵏ).
    correction2: f32,
    epsilon: f32,
    /// −lr/(1 − β₁ᵏ).
    negative_step_size: f32,
}

impl Scalars {
    fn of(settings: &AdamW, step: u64, grad_scale: f32) -> Self {
        let &AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } = settings;
        Scalars {
            grad_scale,
            decay: (1.0 - learning_rate * weight_decay) as f32,
            rest1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            rest2: (1.0 - beta2) as f32,
            correction2: (1.0 - beta2.powf(step as f64)).sqrt() as f32,
            epsilon: epsilon as f32,
            negative_step_size: -(learning_rate / (1.0 - beta1.powf(step as f64))) as f32,
        }
    }
}

/// Step number `step` (k = 1 is the first) on `params`, with `grads` multiplied by `grad_scale` as they are read.
///
/// `exp_avg` (m) and `exp_avg_sq` (v) start at 0. Elements do not interact: any partition of the parameters gives the
/// same bits.
///
/// # Errors
/// Slices of different lengths, or `step` = 0.
pub fn reference(
    params: &mut [f32],
    grads: &[f32],
    exp_avg: &mut [f32],
    exp_avg_sq: &mut [f32],
    settings: &AdamW,
    step: u64,
    grad_scale: f32,
) -> Result<()> {
    let lengths = [grads.len(), exp_avg.len(), exp_avg_sq.len()];
    ensure!(lengths == [params.len(); 3], "AdamW: {} parameters, but gradient, m and v have {lengths:?}", params.len());
    ensure!(step > 0, "AdamW counts steps from 1");
    let s = Scalars::of(settings, step, grad_scale);
    let moments = exp_avg.iter_mut().zip(exp_avg_sq.iter_mut());
    for ((param, &grad), (m, v)) in params.iter_mut().zip(grads).zip(moments) {
        let grad = grad * s.grad_scale;
        *m += s.rest1 * (grad - *m);
        *v = s.beta2 * *v + s.rest2 * grad * grad;
        let denominator = v.sqrt() / s.correction2 + s.epsilon;
        *param = *param * s.decay + s.negative_step_size * *m / denominator;
    }
    Ok(())
}

/// L2 norm in f64, summed in a fixed order that depends only on the length.
pub fn global_norm(values: &[f32]) -> f64 {
    sum_of_squares(values).sqrt()
}

/// Σ v² in f64, in a fixed order; for norms over several ranges.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let mut partial = [0.0; LANES];
    let blocks = values.chunks_exact(LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for (partial, &value) in partial.iter_mut().zip(block) {
            *partial += f64::from(value) * f64::from(value);
        }
    }
    pair_up(partial) + ordered_sum(rest.iter().map(|&value| f64::from(value) * f64::from(value)))
}

/// The factor that brings a gradient of norm `norm` down to `max_norm`: min(1, max_norm/(norm + 1e-6)), as torch.
///
/// A norm that is not finite gives a factor that is not finite either: check the norm before stepping.
pub fn clip_factor(norm: f64, max_norm: Option<f64>) -> f32 {
    match max_norm {
        None => 1.0,
        Some(_) if !norm.is_finite() => f32::NAN,
        Some(max_norm) => (max_norm / (norm + 1e-6)).min(1.0) as f32,
    }
}

/// Elements per block, as in `cuda/adamw.cu`.
const CHUNK: usize = 4096;

/// One tensor on the device, or one piece of a flat buffer; all slices have the same length.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// f32.
    pub param: Slice<'a>,
    /// f32, bf16 or f16, the same in all pieces.
    pub grad: Slice<'a>,
    /// m, f32.
    pub exp_avg: Slice<'a>,
    /// v, f32.
    pub exp_avg_sq: Slice<'a>,
    /// Gets the new parameters in bf16.
    pub copy: Option<Slice<'a>>,
}

impl<'a> Piece<'a> {
    /// The elements of `range`, without a copy.
    pub fn part(&self, range: Range<usize>) -> Self {
        let part = |slice: &Slice<'a>| slice.part(range.start, range.len());
        Piece {
            param: part(&self.param),
            grad: part(&self.grad),
            exp_avg: part(&self.exp_avg),
            exp_avg_sq: part(&self.exp_avg_sq),
            copy: None,
        }
    }
}

/// `Range` of `cuda/adamw.cu`: param, grad, exp_avg, exp_avg_sq, copy, length, first_block.
const RANGE_WORDS: usize = 7;

/// The parameters of an optimizer on the device: one launch steps all of them, two give the gradient's norm. What the
/// kernels need beside their operands is made with the table and stays: a step moves scalars alone.
pub struct Table<'a> {
    machine: Arc<dyn Machine>,
    ranges: Buffer,
    partial: Buffer,
    total: Buffer,
    blocks: u32,
    /// Index of the gradients' number type in the kernels' names.
    variant: usize,
    /// Where the first piece's gradient lies; those of the others lie relative to it.
    grads: u64,
    /// What the kernels write.
    written: Vec<Slice<'a>>,
}

impl<'a> Table<'a> {
    /// # Errors
    /// Slices that do not fit together, have other number types than [`Piece`] says, or overlap.
    pub fn new(machine: &Arc<dyn Machine>, pieces: &[Piece<'a>]) -> Result<Self> {
        let element = pieces.first().map_or(Element::F32, |piece| piece.grad.element());
        let grads = pieces.first().map_or(0, |piece| piece.grad.address());
        let mut words = Vec::with_capacity(pieces.len() * RANGE_WORDS);
        let (mut written, mut read, mut blocks) = (Vec::new(), Vec::new(), 0);
        for piece in pieces.iter().filter(|piece| !piece.param.is_empty()) {
            let length = piece.param.len();
            piece.param.expect(length, Element::F32, "a parameter")?;
            piece.grad.expect(length, element, "a gradient")?;
            piece.exp_avg.expect(length, Element::F32, "a first moment")?;
            piece.exp_avg_sq.expect(length, Element::F32, "a second moment")?;
            written.extend([piece.param, piece.exp_avg, piece.exp_avg_sq]);
            if let Some(copy) = piece.copy {
                copy.expect(length, Element::Bf16, "a parameter's copy")?;
                written.push(copy);
            }
            read.push(piece.grad);
            words.extend([piece.param.address(), piece.grad.address().wrapping_sub(grads)]);
            words.extend([piece.exp_avg, piece.exp_avg_sq].map(|slice| slice.address()));
            words.extend([piece.copy.map_or(0, |slice| slice.address()), length as u64, blocks as u64]);
            blocks += length.div_ceil(CHUNK);
        }
        ensure_apart(&written, &read)?;
        ensure!(blocks < 1 << 31, "the parameters are too many for a launch");
        Ok(Table {
            machine: machine.clone(),
            ranges: Buffer::upload(machine, &words)?,
            partial: Buffer::new(machine, blocks, Element::F64)?,
            total: Buffer::new(machine, 1, Element::F64)?,
            blocks: blocks as u32,
            variant: element.variant("a gradient")?,
            grads,
            written,
        })
    }

    /// The table for other gradients, which lie relative to each other as those it was made of, in one `vector`, and for
    /// launches by `machine`, which may be the same one on another stream.
    ///
    /// # Errors
    /// Another number type, or memory that the kernels write.
    pub(super) fn set_gradients(&mut self, machine: &Arc<dyn Machine>, vector: Slice<'a>) -> Result<()> {
        if vector.address() != self.grads {
            ensure!(vector.element().variant("a gradient")? == self.variant, "gradients of another number type");
            ensure_apart(&self.written, &[vector])?;
            self.grads = vector.address();
        }
        self.machine = machine.clone();
        Ok(())
    }

    /// [`reference()`] on all pieces, the same bits.
    ///
    /// # Errors
    /// `step` = 0; a launch that fails.
    pub fn step(&self, settings: &AdamW, step: u64, grad_scale: f32) -> Result<()> {
        ensure!(step > 0, "AdamW counts steps from 1");
        if self.blocks == 0 {
            return Ok(());
        }
        let kernel = ["adamw_f32", "adamw_bf16", "adamw_f16"][self.variant];
        let scalars = Scalars::of(settings, step, grad_scale);
        let (ranges, count) = self.ranges();
        // SAFETY: types and order as in cuda/adamw.cu; `new` checked the ranges, whose memory lives for 'a
        unsafe { self.machine.launch(kernel, [self.blocks, 1], 256, arguments![ranges, count, self.grads, scalars]) }
    }

    /// [`sum_of_squares`] of all gradients, in f64, in an order that depends on the lengths of the pieces alone; waits
    /// for the device.
    ///
    /// # Errors
    /// A launch or an earlier kernel that fails.
    pub fn sum_of_squares(&self) -> Result<f64> {
        if self.blocks == 0 {
            return Ok(0.0);
        }
        let kernel = ["sum_of_squares_f32", "sum_of_squares_bf16", "sum_of_squares_f16"][self.variant];
        let (ranges, count) = self.ranges();
        let (partial, total) = (self.partial.slice().address(), self.total.slice().address());
        // SAFETY: types and order as in cuda/adamw.cu; `partial` has one element per block
        unsafe {
            self.machine.launch(kernel, [self.blocks, 1], 256, arguments![ranges, count, self.grads, partial])?;
            self.machine.launch("sum_of_partials", [1, 1], 1024, arguments![partial, self.blocks, total])?;
        }
        Ok(self.total.download::<f64>()?[0])
    }

    fn ranges(&self) -> (u64, u32) {
        let slice = self.ranges.slice();
        (slice.address(), (slice.len() / RANGE_WORDS) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Coordinates, Purpose};
    use tch::nn::{self, OptimizerConfig};
    use tch::{Device, Kind, Tensor};

    const SETTINGS: AdamW = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 };

    fn normals(count: usize, sample: u32) -> Vec<f32> {
        let mut stream = Coordinates { sample, ..Coordinates::new(7, Purpose::WeightInit) }.stream();
        (0..count).map(|_| (0..12).map(|_| stream.uniform()).sum::<f64>() as f32 - 6.0).collect()
    }

    fn ours(start: &[f32], gradients: &[Vec<f32>], grad_scale: f32) -> Vec<f32> {
        let (mut params, mut m, mut v) = (start.to_vec(), vec![0.0; start.len()], vec![0.0; start.len()]);
        for (k, gradient) in gradients.iter().enumerate() {
            reference(&mut params, gradient, &mut m, &mut v, &SETTINGS, k as u64 + 1, grad_scale).unwrap();
        }
        params
    }

    /// Relative L2 distance between two movements away from `start`.
    fn movement_gap(start: &[f32], ours: &[f32], oracle: &[f64]) -> f64 {
        let gap = start.iter().zip(ours).zip(oracle).map(|((_, &a), &b)| (f64::from(a) - b).powi(2)).sum::<f64>();
        let size = start.iter().zip(oracle).map(|(&s, &b)| (b - f64::from(s)).powi(2)).sum::<f64>();
        (gap / size).sqrt()
    }

    #[test]
    fn five_steps_agree_with_torchs_optimizer() {
        let start = normals(1003, 0);
        let gradients: Vec<Vec<f32>> = (1..6).map(|k| normals(1003, k)).collect();
        let vs = nn::VarStore::new(Device::Cpu);
        let mut param = vs.root().zeros("p", &[1003]);
        tch::no_grad(|| param.copy_(&Tensor::from_slice(&start)));
        let config = nn::AdamW { beta1: 0.9, beta2: 0.999, wd: 1e-2, eps: 1e-8, amsgrad: false };
        let mut optimizer = config.build(&vs, 1e-3).unwrap();
        for gradient in &gradients {
            optimizer.zero_grad();
            (&param * Tensor::from_slice(gradient)).sum(Kind::Float).backward();
            optimizer.step();
        }
        let oracle = Vec::<f32>::try_from(&param.detach()).unwrap();
        let oracle: Vec<f64> = oracle.into_iter().map(f64::from).collect();
        // rounding of the parameters (|p| ≈ 1: 6e-8) against a movement of 5e-3: observed 8e-7
        let gap = movement_gap(&start, &ours(&start, &gradients, 1.0), &oracle);
        assert!(gap < 1e-5, "{gap}");
    }

    #[test]
    fn steps_agree_with_the_formula_in_f64() {
        let start: Vec<f32> = normals(517, 0).into_iter().map(|p| p * 1e-2).collect();
        let gradients: Vec<Vec<f32>> = (1..6).map(|k| normals(517, k)).collect();
        let AdamW { learning_rate: lr, beta1, beta2, epsilon, weight_decay } = SETTINGS;
        let mut oracle: Vec<f64> = start.iter().copied().map(f64::from).collect();
        let (mut m, mut v) = (vec![0.0; 517], vec![0.0; 517]);
        for (k, gradient) in gradients.iter().enumerate() {
            for i in 0..517 {
                let g = 0.5 * f64::from(gradient[i]);
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let m_hat = m[i] / (1.0 - beta1.powi(k as i32 + 1));
                let v_hat = v[i] / (1.0 - beta2.powi(k as i32 + 1));
                oracle[i] -= lr * weight_decay * oracle[i] + lr * m_hat / (v_hat.sqrt() + epsilon);
            }
        }
        // f32 rounding of p ≈ 0.01 (9e-10) against a movement near 2e-3, plus cancellation in m: observed 4e-7
        let gap = movement_gap(&start, &ours(&start, &gradients, 0.5), &oracle);
        assert!(gap < 5e-6, "{gap}");
    }

    #[test]
    fn parts_of_the_parameters_step_as_the_whole() {
        let (start, gradients) = (normals(1000, 0), [normals(1000, 1), normals(1000, 2)]);
        let whole = ours(&start, &gradients, 0.3);
        let left = ours(&start[..333], &gradients.each_ref().map(|g| g[..333].to_vec()), 0.3);
        let right = ours(&start[333..], &gradients.each_ref().map(|g| g[333..].to_vec()), 0.3);
        assert_eq!(whole, [left, right].concat());
    }

    #[test]
    fn norm_and_clip_factor() {
        assert_eq!(global_norm(&[3.0, 4.0]), 5.0);
        assert_eq!(global_norm(&[]), 0.0);
        assert_eq!(global_norm(&[1.0; 10_000]), 100.0);
        // squares that overflow f32
        assert_eq!(global_norm(&[1e30f32]), f64::from(1e30f32));
        assert_eq!(clip_factor(3.0, None), 1.0);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert!((clip_factor(4.0, Some(1.0)) - 0.25).abs() < 1e-6);
        assert!(clip_factor(f64::NAN, Some(1.0)).is_nan() && clip_factor(f64::INFINITY, Some(1.0)).is_nan());
    }

    #[test]
    fn wrong_lengths_and_step_zero_are_errors() {
        let mut p = [0.0; 2];
        assert!(reference(&mut p, &[0.0; 3], &mut [0.0; 2], &mut [0.0; 2], &SETTINGS, 1, 1.0).is_err());
        assert!(reference(&mut p, &[0.0; 2], &mut [0.0; 2], &mut [0.0; 2], &SETTINGS, 0, 1.0).is_err());
    }
}
