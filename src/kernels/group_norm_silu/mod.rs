//! Group normalisation (Wu and He), optionally followed by SiLU, of channels-last activations, forward and backward. On a
//! device the activations may have a shift of every sample's channels `[N, C]` added first: x + shift for x below.
//!
//! ```text
//! forward   x̂ = (x − mean)·rstd,   u = x̂·weight + bias,   y = u  or  u·s(u),   s(u) = 1/(1 + exp(−u))
//! backward  du = dy  or  dy·s(u)·(1 + u·(1 − s(u)))
//!           dbias = Σ du,   dweight = Σ du·x̂   (over samples and pixels)
//!           dx = rstd·(du·weight − mean_M(du·weight) − x̂·mean_M(du·weight·x̂))
//! ```
//!
//! mean, rstd = 1/√(variance + ε) and mean_M are over the M = pixels·C/groups elements of one group of one sample; the
//! variance is the biased one. Activations are `[N, pixels, C]` in memory, which is what channels-last `[N, C, H, W]`
//! tensors are. libtorch's own group normalisation has no fast way for them.

mod autograd;

pub use autograd::group_norm_silu;
pub(super) use autograd::register;

use super::cuda::{arguments, ensure_apart, Element, Machine, Slice};
use anyhow::{ensure, Result};

/// What is normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// N.
    pub samples: usize,
    /// H·W.
    pub pixels: usize,
    /// C.
    pub channels: usize,
    /// Divides C.
    pub groups: usize,
    /// ε, inside the square root.
    pub epsilon: f64,
    pub silu: bool,
}

impl Shape {
    /// N·H·W·C.
    pub fn elements(&self) -> usize {
        self.samples * self.pixels * self.channels
    }

    fn check(&self) -> Result<()> {
        let &Shape { samples, pixels, channels, groups, epsilon, .. } = self;
        ensure!(groups > 0 && channels % groups == 0, "{channels} channels cannot be {groups} groups of equal size");
        ensure!(epsilon >= 0.0, "epsilon is {epsilon}");
        // 65535 is CUDA's limit for the second dimension of a grid
        ensure!(samples <= 65535, "{samples} samples are too many for a launch");
        ensure!(pixels < 1 << 30 && channels < 1 << 30, "{pixels} pixels of {channels} channels are too many");
        Ok(())
    }

    /// How many pixels a block takes: at least 16, and at most 32 pieces. Of the pixels alone, so that the order of a
    /// sample's sums does not depend on the batch.
    fn pixels_per_piece(&self) -> usize {
        self.pixels.div_ceil(32).max(16)
    }

    fn pieces(&self) -> usize {
        self.pixels.div_ceil(self.pixels_per_piece())
    }

    /// f32 numbers in the pieces' channel sums, two per channel.
    fn partial_length(&self) -> usize {
        2 * self.samples * self.pieces() * self.channels
    }
}

/// What [`reference_backward`] gives.
#[derive(Debug)]
pub struct Gradients {
    pub grad_x: Vec<f32>,
    pub grad_weight: Vec<f32>,
    pub grad_bias: Vec<f32>,
}

fn sigmoid(u: f64) -> f64 {
    1.0 / (1.0 + (-u).exp())
}

/// mean and rstd of each sample's groups `[N, groups]`, in f64.
fn statistics(x: &[f32], shape: &Shape) -> Vec<(f64, f64)> {
    let width = shape.channels / shape.groups;
    let mut all = Vec::with_capacity(shape.samples * shape.groups);
    for sample in x.chunks((shape.pixels * shape.channels).max(1)) {
        for group in 0..shape.groups {
            let values = || sample.chunks(shape.channels).flat_map(|pixel| &pixel[group * width..][..width]);
            let count = (shape.pixels * width) as f64;
            let mean = values().map(|&v| f64::from(v)).sum::<f64>() / count;
            let variance = values().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
            all.push((mean, 1.0 / (variance + shape.epsilon).sqrt()));
        }
    }
    all
}

fn check_lengths(x: &[f32], weight: &[f32], bias: &[f32], shape: &Shape) -> Result<()> {
    shape.check()?;
    ensure!(x.len() == shape.elements(), "x has {} elements, expected {}", x.len(), shape.elements());
    let parameters = [weight.len(), bias.len()];
    ensure!(parameters == [shape.channels; 2], "weight and bias have {parameters:?} of {} channels", shape.channels);
    Ok(())
}

/// y `[N, pixels, C]`, worked out in f64 and rounded once.
///
/// # Errors
/// Slices whose lengths do not fit the shape; groups that do not divide the channels.
pub fn reference_forward(x: &[f32], weight: &[f32], bias: &[f32], shape: &Shape) -> Result<Vec<f32>> {
    check_lengths(x, weight, bias, shape)?;
    let of_groups = statistics(x, shape);
    let normalise = |(i, &x): (usize, &f32)| {
        let (sample, channel) = (i / (shape.pixels * shape.channels), i % shape.channels);
        let (mean, rstd) = of_groups[sample * shape.groups + channel / (shape.channels / shape.groups)];
        let u = (f64::from(x) - mean) * rstd * f64::from(weight[channel]) + f64::from(bias[channel]);
        (if shape.silu { u * sigmoid(u) } else { u }) as f32
    };
    Ok(x.iter().enumerate().map(normalise).collect())
}

/// The gradients for `grad_y` `[N, pixels, C]`, worked out in f64 and rounded once.
///
/// # Errors
/// As [`reference_forward`].
pub fn reference_backward(x: &[f32], grad_y: &[f32], weight: &[f32], bias: &[f32], shape: &Shape) -> Result<Gradients> {
    check_lengths(x, weight, bias, shape)?;
    ensure!(grad_y.len() == x.len(), "the gradient has {} elements, x has {}", grad_y.len(), x.len());
    let of_groups = statistics(x, shape);
    let width = shape.channels / shape.groups;
    let group_of = |i: usize| i / (shape.pixels * shape.channels) * shape.groups + i % shape.channels / width;
    // x̂ and du of every element, and the sums of both kinds
    let mut elements = Vec::with_capacity(x.len());
    let mut of_channels = vec![(0.0, 0.0); shape.channels];
    let mut group_sums = vec![(0.0, 0.0); of_groups.len()];
    for (i, (&x, &dy)) in x.iter().zip(grad_y).enumerate() {
        let channel = i % shape.channels;
        let (mean, rstd) = of_groups[group_of(i)];
        let (weight, bias) = (f64::from(weight[channel]), f64::from(bias[channel]));
        let xhat = (f64::from(x) - mean) * rstd;
        let u = xhat * weight + bias;
        let slope = if shape.silu { sigmoid(u) * (1.0 + u * (1.0 - sigmoid(u))) } else { 1.0 };
        let du = f64::from(dy) * slope;
        elements.push((xhat, du));
        of_channels[channel].0 += du * xhat;
        of_channels[channel].1 += du;
        let sums = &mut group_sums[group_of(i)];
        sums.0 += du * weight;
        sums.1 += du * weight * xhat;
    }
    let count = (shape.pixels * width) as f64;
    let grad_x = elements.iter().enumerate().map(|(i, &(xhat, du))| {
        let (sum, product) = group_sums[group_of(i)];
        let rstd = of_groups[group_of(i)].1;
        (rstd * (du * f64::from(weight[i % shape.channels]) - sum / count - xhat * product / count)) as f32
    });
    Ok(Gradients {
        grad_x: grad_x.collect(),
        grad_weight: of_channels.iter().map(|sums| sums.0 as f32).collect(),
        grad_bias: of_channels.iter().map(|sums| sums.1 as f32).collect(),
    })
}

/// `Shape` of `cuda/group_norm_silu.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DeviceShape {
    pixels: u32,
    channels: u32,
    groups: u32,
    pieces: u32,
    pixels_per_piece: u32,
    silu: u32,
    parameter_kind: u32,
    epsilon: f64,
}

/// Input of both passes on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInputs<'a> {
    /// f32, bf16 or f16, `[N, pixels, C]`.
    pub x: Slice<'a>,
    /// f32 `[N, C]`, added to every pixel of x; None for none.
    pub shift: Option<Slice<'a>>,
    /// f32, bf16 or f16, `[C]`.
    pub weight: Slice<'a>,
    /// As weight.
    pub bias: Slice<'a>,
    /// f32 `[N, groups]`: written by the forward pass, read by the backward pass.
    pub mean: Slice<'a>,
    /// As mean.
    pub rstd: Slice<'a>,
    /// f32 `[N, C]`, mean of a channel's x̂: as mean; where a shift has one, it has a gradient.
    pub channel_mean: Option<Slice<'a>>,
}

impl DeviceInputs<'_> {
    fn check(&self, shape: &Shape) -> Result<DeviceShape> {
        shape.check()?;
        self.x.element().variant("x")?;
        self.x.expect(shape.elements(), self.x.element(), "x")?;
        let parameter_kind = self.weight.element().variant("weight")? as u32;
        self.weight.expect(shape.channels, self.weight.element(), "weight")?;
        self.bias.expect(shape.channels, self.weight.element(), "bias")?;
        self.mean.expect(shape.samples * shape.groups, Element::F32, "mean")?;
        self.rstd.expect(shape.samples * shape.groups, Element::F32, "rstd")?;
        for (slice, name) in [(self.shift, "shift"), (self.channel_mean, "channel_mean")] {
            slice.map_or(Ok(()), |slice| slice.expect(shape.samples * shape.channels, Element::F32, name))?;
        }
        Ok(DeviceShape {
            pixels: shape.pixels as u32,
            channels: shape.channels as u32,
            groups: shape.groups as u32,
            pieces: shape.pieces() as u32,
            pixels_per_piece: shape.pixels_per_piece() as u32,
            silu: u32::from(shape.silu),
            parameter_kind,
            epsilon: shape.epsilon,
        })
    }
}

/// Bytes of workspace that [`launch_forward`] needs.
pub fn forward_workspace(shape: &Shape) -> usize {
    4 * shape.partial_length()
}

/// Bytes of workspace that [`launch_backward`] needs.
pub fn backward_workspace(shape: &Shape) -> usize {
    // channel sums in f64, pieces' sums and group means in f32; widest first, so that each is aligned
    16 * shape.samples * shape.channels + 4 * shape.partial_length() + 8 * shape.samples * shape.groups
}

/// [`reference_forward`] on the device: writes mean, rstd and y (number type of x). Sums within a piece of the pixels
/// are f32.
///
/// # Errors
/// Slices that do not fit the shape or overlap; a launch that fails.
pub fn launch_forward(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    y: Slice,
    workspace: Slice,
    shape: &Shape,
) -> Result<()> {
    let device_shape = inputs.check(shape)?;
    y.expect(shape.elements(), inputs.x.element(), "y")?;
    workspace.expect(shape.partial_length(), Element::F32, "workspace")?;
    let mut written = vec![y, workspace, inputs.mean, inputs.rstd];
    written.extend(inputs.channel_mean);
    let mut read = vec![inputs.x, inputs.weight, inputs.bias];
    read.extend(inputs.shift);
    ensure_apart(&written, &read)?;
    if shape.elements() == 0 {
        return Ok(());
    }
    let variant = inputs.x.element().variant("x")?;
    let DeviceInputs { x, weight, bias, mean, rstd, .. } = inputs;
    let [x, weight, bias, mean, rstd] = [x, weight, bias, mean, rstd].map(Slice::address);
    let [shift, xhat] = [inputs.shift, inputs.channel_mean].map(|slice| slice.map_or(0, |slice| slice.address()));
    let (y, partial) = (y.address(), workspace.address());
    let by_piece = [device_shape.pieces, shape.samples as u32];
    let by_group = [shape.groups as u32, shape.samples as u32];
    let sums = ["group_norm_silu_sums_f32", "group_norm_silu_sums_bf16", "group_norm_silu_sums_f16"][variant];
    let statistics =
        ["group_norm_silu_statistics_f32", "group_norm_silu_statistics_bf16", "group_norm_silu_statistics_f16"]
            [variant];
    let forward =
        ["group_norm_silu_forward_f32", "group_norm_silu_forward_bf16", "group_norm_silu_forward_f16"][variant];
    // SAFETY: types and order as in cuda/group_norm_silu.cu; lengths checked above
    unsafe {
        machine.launch(sums, by_piece, 256, arguments![x, partial, device_shape])?;
        machine.launch(statistics, by_group, 32, arguments![x, shift, partial, mean, rstd, xhat, device_shape])?;
        machine.launch(forward, by_piece, 256, arguments![x, shift, weight, bias, mean, rstd, y, device_shape])
    }
}

/// Where the backward pass reads and writes on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceGradients<'a> {
    /// Number type of x.
    pub grad_y: Slice<'a>,
    /// Number type of x.
    pub grad_x: Slice<'a>,
    /// f32 `[C]`.
    pub grad_weight: Slice<'a>,
    /// f32 `[C]`.
    pub grad_bias: Slice<'a>,
    /// f32 `[N, C]`; None where nobody wants it.
    pub grad_shift: Option<Slice<'a>>,
    /// [`backward_workspace`] bytes, as f64.
    pub workspace: Slice<'a>,
}

/// [`reference_backward`] on the device, with mean and rstd of [`launch_forward`].
///
/// # Errors
/// Slices that do not fit the shape or overlap; a launch that fails.
pub fn launch_backward(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    gradients: &DeviceGradients,
    shape: &Shape,
) -> Result<()> {
    let device_shape = inputs.check(shape)?;
    let &DeviceGradients { grad_y, grad_x, grad_weight, grad_bias, grad_shift, workspace } = gradients;
    grad_y.expect(shape.elements(), inputs.x.element(), "grad_y")?;
    grad_x.expect(shape.elements(), inputs.x.element(), "grad_x")?;
    grad_weight.expect(shape.channels, Element::F32, "grad_weight")?;
    grad_bias.expect(shape.channels, Element::F32, "grad_bias")?;
    workspace.expect(backward_workspace(shape) / 8, Element::F64, "workspace")?;
    let DeviceInputs { x, weight, bias, mean, rstd, .. } = inputs;
    let mut written = vec![grad_x, grad_weight, grad_bias, workspace];
    if let Some(grad_shift) = grad_shift {
        grad_shift.expect(shape.samples * shape.channels, Element::F32, "grad_shift")?;
        ensure!(inputs.channel_mean.is_some(), "the gradient of a shift needs channel_mean");
        written.push(grad_shift);
    }
    let mut read = vec![*x, grad_y, *weight, *bias, *mean, *rstd];
    read.extend(inputs.shift);
    read.extend(inputs.channel_mean);
    ensure_apart(&written, &read)?;
    let [shift, xhat, grad_shift] =
        [inputs.shift, inputs.channel_mean, grad_shift].map(|slice| slice.map_or(0, |slice| slice.address()));
    let variant = x.element().variant("x")?;
    let [x, weight, bias, mean, rstd] = [x, weight, bias, mean, rstd].map(Slice::address);
    let [dy, dx, grad_weight, grad_bias, channel_sums] =
        [grad_y, grad_x, grad_weight, grad_bias, workspace].map(|slice| slice.address());
    let partial = channel_sums + 16 * (shape.samples * shape.channels) as u64;
    let group_means = partial + 4 * shape.partial_length() as u64;
    let (samples, channels) = (shape.samples as u32, shape.channels as u32);
    let by_piece = [device_shape.pieces, samples];
    let by_group = [shape.groups as u32, samples];
    let sums = [
        "group_norm_silu_backward_sums_f32",
        "group_norm_silu_backward_sums_bf16",
        "group_norm_silu_backward_sums_f16",
    ][variant];
    let backward =
        ["group_norm_silu_backward_f32", "group_norm_silu_backward_bf16", "group_norm_silu_backward_f16"][variant];
    // SAFETY: types and order as in cuda/group_norm_silu.cu; lengths checked above; the three parts of the workspace
    // are as long as `backward_workspace` counts them
    unsafe {
        if shape.elements() > 0 {
            let arguments = arguments![x, shift, dy, weight, bias, mean, rstd, partial, device_shape];
            machine.launch(sums, by_piece, 256, arguments)?;
            let arguments =
                arguments![partial, weight, rstd, xhat, channel_sums, group_means, grad_shift, device_shape];
            machine.launch("group_norm_silu_backward_groups", by_group, 32, arguments)?;
            let arguments = arguments![x, shift, dy, weight, bias, mean, rstd, group_means, dx, device_shape];
            machine.launch(backward, by_piece, 256, arguments)?;
        }
        // without samples or pixels the gradients of the parameters are 0
        let rows = if shape.pixels == 0 { 0 } else { samples };
        let arguments = arguments![channel_sums, grad_weight, grad_bias, rows, channels];
        let kernel = "group_norm_silu_backward_parameters";
        if channels > 0 {
            machine.launch(kernel, [channels.div_ceil(256), 1], 256, arguments)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
