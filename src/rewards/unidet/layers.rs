//! Convolutions with a frozen BatchNorm or a bias, named as detectron2 names them.

use anyhow::Result;
use tch::Tensor;

use crate::models::parameters::{Builder, Init};

/// ε of every BatchNorm.
const EPS: f64 = 1e-5;

/// BatchNorm with the statistics of training.
pub struct FrozenNorm {
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
}

impl FrozenNorm {
    pub fn new(b: &Builder, channels: i64) -> Result<Self> {
        Ok(FrozenNorm {
            weight: b.parameter("weight", &[channels], Init::Ones)?,
            bias: b.parameter("bias", &[channels], Init::Zeros)?,
            mean: b.parameter("running_mean", &[channels], Init::Zeros)?,
            variance: b.parameter("running_var", &[channels], Init::Ones)?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (weight, bias) = (Some(&self.weight), Some(&self.bias));
        x.batch_norm(weight, bias, Some(&self.mean), Some(&self.variance), false, 0.0, EPS, true)
    }
}

/// A convolution's shape; it is padded so that stride 1 keeps the size.
#[derive(Clone, Copy)]
pub struct Shape {
    pub inputs: i64,
    pub outputs: i64,
    /// Odd.
    pub kernel: i64,
    pub stride: i64,
    pub groups: i64,
}

impl Shape {
    pub fn new(inputs: i64, outputs: i64, kernel: i64) -> Shape {
        Shape { inputs, outputs, kernel, stride: 1, groups: 1 }
    }

    pub fn stride(self, stride: i64) -> Shape {
        Shape { stride, ..self }
    }
}

/// What comes after the weights.
enum After {
    Nothing,
    Bias(Tensor),
    Norm(FrozenNorm),
}

pub struct Conv {
    weight: Tensor,
    after: After,
    shape: Shape,
}

impl Conv {
    fn new(b: &Builder, shape: Shape, after: After) -> Result<Self> {
        let Shape { inputs, outputs, kernel, groups, .. } = shape;
        let init = Init::Normal((2.0 / (inputs * kernel * kernel) as f64).sqrt());
        Ok(Conv { weight: b.parameter("weight", &[outputs, inputs / groups, kernel, kernel], init)?, after, shape })
    }

    pub fn plain(b: &Builder, shape: Shape) -> Result<Self> {
        Conv::new(b, shape, After::Nothing)
    }

    pub fn with_bias(b: &Builder, shape: Shape) -> Result<Self> {
        let bias = b.parameter("bias", &[shape.outputs], Init::Zeros)?;
        Conv::new(b, shape, After::Bias(bias))
    }

    /// The norm's tensors lie under `norm`.
    pub fn with_norm(b: &Builder, shape: Shape) -> Result<Self> {
        let norm = FrozenNorm::new(&b.sub("norm"), shape.outputs)?;
        Conv::new(b, shape, After::Norm(norm))
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        let Shape { kernel, stride, groups, .. } = self.shape;
        let bias = match &self.after {
            After::Bias(bias) => Some(bias),
            _ => None,
        };
        let y = x.conv2d(&self.weight, bias, stride, kernel / 2, 1, groups);
        match &self.after {
            After::Norm(norm) => norm.forward(&y),
            _ => y,
        }
    }
}
