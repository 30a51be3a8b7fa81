//! The elementary layers, with PyTorch's parameter names and initial distributions.

use anyhow::{ensure, Result};
use tch::{Device, Kind, Tensor};

use super::{
    flops,
    lora::LoraPair,
    parameters::{Builder, Init},
};
use crate::kernels::{group_norm_silu::group_norm_silu, layer_norm};

/// y = x·Wᵀ + b over the last dimension, plus a low-rank adapter where the builder was asked for one.
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    lora: Option<LoraPair>,
}

impl Linear {
    pub fn new(b: &Builder, inputs: i64, outputs: i64) -> Result<Self> {
        let init = Init::Uniform((inputs as f64).powf(-0.5));
        Ok(Linear {
            weight: b.parameter("weight", &[outputs, inputs], init)?,
            bias: Some(b.parameter("bias", &[outputs], init)?),
            lora: b.lora(inputs, outputs)?,
        })
    }

    pub fn without_bias(b: &Builder, inputs: i64, outputs: i64) -> Result<Self> {
        let init = Init::Uniform((inputs as f64).powf(-0.5));
        let weight = b.parameter("weight", &[outputs, inputs], init)?;
        Ok(Linear { weight, bias: None, lora: b.lora(inputs, outputs)? })
    }

    /// CLIP's initial distribution: weights N(0, std²), biases zero.
    pub fn normal(b: &Builder, inputs: i64, outputs: i64, std: f64) -> Result<Self> {
        let weight = b.parameter("weight", &[outputs, inputs], Init::Normal(std))?;
        Ok(Linear { weight, bias: Some(b.parameter("bias", &[outputs], Init::Zeros)?), lora: None })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        flops::add(x.numel() as i64 * self.weight.size()[0]);
        let y = x.linear(&self.weight, self.bias.as_ref());
        match &self.lora {
            Some(lora) => y + lora.forward(x),
            None => y,
        }
    }
}

/// 2-D convolution, NCHW.
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    pub fn new(b: &Builder, inputs: i64, outputs: i64, kernel: i64, stride: i64, padding: i64) -> Result<Self> {
        let init = Init::Uniform(((inputs * kernel * kernel) as f64).powf(-0.5));
        Ok(Conv2d {
            weight: b.parameter("weight", &[outputs, inputs, kernel, kernel], init)?,
            bias: b.parameter("bias", &[outputs], init)?,
            stride,
            padding,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.convolve(x, Some(&self.bias))
    }

    /// Without the bias, which the caller adds where it costs no pass over memory.
    pub fn forward_without_bias(&self, x: &Tensor) -> Tensor {
        self.convolve(x, None)
    }

    fn convolve(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let y = x.conv2d(&self.weight, bias, self.stride, self.padding, 1, 1);
        flops::add(y.numel() as i64 * (self.weight.numel() as i64 / self.weight.size()[0]));
        y
    }

    /// A 1×1 convolution as a product of the tokens, plus `more` `[outputs]`: libraries add a bias of products, but not of
    /// convolutions, without a pass of its own.
    pub fn forward_as_product(&self, x: &Tensor, more: &Tensor) -> Tensor {
        let s = x.size();
        let outputs = self.weight.size()[0];
        flops::add(x.numel() as i64 * outputs);
        let y = to_tokens(x).linear(&self.weight.view([outputs, s[1]]), Some(&self.bias + more));
        to_pixels(&y, &[s[0], outputs, s[2], s[3]])
    }

    /// `[outputs]`.
    pub fn bias(&self) -> &Tensor {
        &self.bias
    }
}

/// Normalisation over groups of channels.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    pub fn new(b: &Builder, groups: i64, channels: i64, eps: f64) -> Result<Self> {
        ensure!(groups > 0 && channels % groups == 0, "{channels} channels do not divide into {groups} norm groups");
        Ok(GroupNorm {
            weight: b.parameter("weight", &[channels], Init::Ones)?,
            bias: b.parameter("bias", &[channels], Init::Zeros)?,
            groups,
            eps,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.normalise(x, None, false)
    }

    /// SiLU of [`GroupNorm::forward`]; on a GPU in the same pass over memory.
    pub fn forward_silu(&self, x: &Tensor) -> Tensor {
        self.normalise(x, None, true)
    }

    /// As [`GroupNorm::forward_silu`], of x with `shift` `[B, C]` added to every pixel.
    pub fn forward_shifted_silu(&self, x: &Tensor, shift: &Tensor) -> Tensor {
        self.normalise(x, Some(shift), true)
    }

    /// On a GPU by our kernel, whose result is channels-last.
    fn normalise(&self, x: &Tensor, shift: Option<&Tensor>, silu: bool) -> Tensor {
        if x.device() == Device::Cpu {
            let shifted = shift.map(|shift| x + shift.unsqueeze(-1).unsqueeze(-1));
            let x = shifted.as_ref().unwrap_or(x);
            let y = x.group_norm(self.groups, Some(&self.weight), Some(&self.bias), self.eps, true);
            return if silu { y.silu() } else { y };
        }
        // as libtorch's own operations here: a failure ends the rank with the message
        let shift = shift.map(|shift| shift.to_kind(Kind::Float).contiguous());
        group_norm_silu(x, shift.as_ref(), &self.weight, &self.bias, self.groups, self.eps, silu)
            .unwrap_or_else(|e| panic!("{e:#}"))
    }
}

/// The values of `[N, C, H, W]` with the channels next to each other in memory.
pub fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

/// Tokens `[B, H·W, C]` of pixels `[B, C, H, W]`; of channels-last pixels the same memory.
pub fn to_tokens(pixels: &Tensor) -> Tensor {
    pixels.flatten(2, 3).transpose(1, 2).contiguous()
}

/// The reverse: pixels of the `size` given, channels-last on a GPU.
pub fn to_pixels(tokens: &Tensor, size: &[i64]) -> Tensor {
    let channels_first = tokens.transpose(1, 2);
    match tokens.device() {
        Device::Cpu => channels_first.contiguous().view(size),
        _ => channels_first.view(size),
    }
}

/// Normalisation over the last dimension.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    pub fn new(b: &Builder, channels: i64, eps: f64) -> Result<Self> {
        Ok(LayerNorm {
            weight: b.parameter("weight", &[channels], Init::Ones)?,
            bias: b.parameter("bias", &[channels], Init::Zeros)?,
            eps,
        })
    }

    /// On a GPU by our kernel where the rows fit it.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        if x.device() != Device::Cpu && layer_norm::fits(x) {
            return layer_norm::layer_norm(x, &self.weight, &self.bias, self.eps).unwrap_or_else(|e| panic!("{e:#}"));
        }
        x.layer_norm([*self.weight.size().last().unwrap_or(&0)], Some(&self.weight), Some(&self.bias), self.eps, true)
    }
}
