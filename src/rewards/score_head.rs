//! The head that ImageReward and the aesthetic predictor share: a stack of linear layers, `layers.{0,2,4,6,7}`, that
//! ends in one number. No activations lie between them (dropout does in training), so it is one affine map; the
//! predictor's ReLU variant has `layers.{0,3,6,9,11}`.

use anyhow::{ensure, Context, Result};
use tch::Tensor;

use super::weights::Checkpoint;
use crate::models::{layers::Linear, parameters::Builder};

/// Numbers of the layers in a file, and whether ReLUs lie between them.
const LAYOUTS: [([i64; 5], bool); 2] = [([0, 2, 4, 6, 7], false), ([0, 3, 6, 9, 11], true)];

/// What a checkpoint's names and shapes say of the head.
#[derive(Clone, Debug)]
pub struct HeadSizes {
    numbers: Vec<i64>,
    /// Inputs of each layer; the last one gives 1.
    inputs: Vec<i64>,
    relu: bool,
}

impl HeadSizes {
    /// The head whose tensors are `prefix` + `layers.…`.
    ///
    /// # Errors
    /// Neither layout.
    pub fn of(checkpoint: &Checkpoint, prefix: &str) -> Result<HeadSizes> {
        let name = |number: &i64| format!("{prefix}layers.{number}.weight");
        let found = LAYOUTS.iter().find(|(numbers, _)| numbers.iter().all(|n| checkpoint.has(&name(n))));
        let (numbers, relu) = found.with_context(|| {
            format!("{}: there is no {prefix}layers.{{0,2,4,6,7}} (or {{0,3,6,9,11}}) with weights", checkpoint.path)
        })?;
        let inputs = numbers.iter().map(|n| Ok(checkpoint.shape::<2>(&name(n))?[1])).collect::<Result<Vec<_>>>()?;
        Ok(HeadSizes { numbers: numbers.to_vec(), inputs, relu: *relu })
    }

    pub fn input(&self) -> i64 {
        self.inputs[0]
    }
}

/// See the module.
pub struct ScoreHead {
    layers: Vec<Linear>,
    relu: bool,
}

impl ScoreHead {
    pub fn new(b: &Builder, sizes: &HeadSizes) -> Result<Self> {
        ensure!(!sizes.inputs.is_empty(), "a head without layers");
        let outputs = sizes.inputs[1..].iter().copied().chain([1]);
        let shapes = sizes.numbers.iter().zip(&sizes.inputs).zip(outputs);
        let layers =
            shapes.map(|((number, &inputs), outputs)| Linear::new(&b.sub("layers").sub(number), inputs, outputs));
        Ok(ScoreHead { layers: layers.collect::<Result<_>>()?, relu: sizes.relu })
    }

    /// f32 `[n, inputs]` → `[n]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = x.shallow_clone();
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x);
            if self.relu && i + 1 < self.layers.len() {
                x = x.relu();
            }
        }
        x.squeeze_dim(-1)
    }
}
