//! The two backbones: ResNet-50 (He et al.) as converted from MSRA's, and ResNeSt-200 (Zhang et al., arXiv 2004.08955).
//! Pictures to features at strides 8, 16 and 32.

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};

use super::layers::{Conv, FrozenNorm, Shape};
use crate::{models::parameters::Builder, rewards::weights::Checkpoint};

/// Splits of ResNeSt's attention.
const RADIX: i64 = 2;

/// Which of the two networks a checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    ResNet,
    ResNeSt,
}

#[derive(Clone, Copy, Debug)]
pub struct Stage {
    pub blocks: i64,
    pub bottleneck: i64,
    pub outputs: i64,
}

/// Sizes, as a checkpoint's shapes say them.
#[derive(Clone, Debug)]
pub struct BackboneSizes {
    pub family: Family,
    /// Channels inside and after the stem.
    pub stem: [i64; 2],
    /// res2 to res5.
    pub stages: [Stage; 4],
}

impl BackboneSizes {
    pub fn of(checkpoint: &Checkpoint) -> Result<BackboneSizes> {
        let b = "backbone.bottom_up";
        let family = match checkpoint.has(&format!("{b}.stem.conv1_1.weight")) {
            true => Family::ResNeSt,
            false => Family::ResNet,
        };
        let width = |name: &str| -> Result<i64> { Ok(checkpoint.shape::<4>(&format!("{b}.{name}.weight"))?[0]) };
        let stem = match family {
            Family::ResNet => [width("stem.conv1")?; 2],
            Family::ResNeSt => [width("stem.conv1_1")?, width("stem.conv1_3")?],
        };
        let stage = |i: usize| -> Result<Stage> {
            let bottleneck = width(&format!("res{i}.0.conv1"))?;
            ensure!(
                family == Family::ResNet || bottleneck % RADIX == 0,
                "{}: res{i} has {bottleneck} channels, they do not divide into {RADIX} splits",
                checkpoint.path
            );
            let blocks = checkpoint.blocks(&format!("{b}.res{i}"));
            Ok(Stage { blocks, bottleneck, outputs: width(&format!("res{i}.0.conv3"))? })
        };
        Ok(BackboneSizes { family, stem, stages: [stage(2)?, stage(3)?, stage(4)?, stage(5)?] })
    }

    /// Channels of res3, res4, res5.
    pub fn outputs(&self) -> [i64; 3] {
        [1, 2, 3].map(|i| self.stages[i].outputs)
    }
}

/// The 3×3 convolution of a block.
enum Middle {
    Conv(Conv),
    Split(Box<SplitAttention>),
}

struct Block {
    shortcut: Option<Conv>,
    conv1: Conv,
    middle: Middle,
    conv3: Conv,
    /// ResNeSt takes the stride out of its convolutions: means over this many pixels follow instead.
    pool: i64,
}

impl Block {
    fn new(b: &Builder, family: Family, inputs: i64, stage: Stage, stride: i64) -> Result<Self> {
        let Stage { bottleneck, outputs, .. } = stage;
        let in_conv = if family == Family::ResNet { stride } else { 1 };
        let shortcut = (inputs != outputs)
            .then(|| Conv::with_norm(&b.sub("shortcut"), Shape::new(inputs, outputs, 1).stride(in_conv)));
        let middle = b.sub("conv2");
        Ok(Block {
            shortcut: shortcut.transpose()?,
            conv1: Conv::with_norm(&b.sub("conv1"), Shape::new(inputs, bottleneck, 1).stride(in_conv))?,
            middle: match family {
                Family::ResNet => Middle::Conv(Conv::with_norm(&middle, Shape::new(bottleneck, bottleneck, 3))?),
                Family::ResNeSt => Middle::Split(Box::new(SplitAttention::new(&middle, bottleneck)?)),
            },
            conv3: Conv::with_norm(&b.sub("conv3"), Shape::new(bottleneck, outputs, 1))?,
            pool: if family == Family::ResNet { 1 } else { stride },
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let y = self.conv1.forward(x).relu();
        let mut y = match &self.middle {
            Middle::Conv(conv) => conv.forward(&y).relu(),
            Middle::Split(split) => split.forward(&y),
        };
        if self.pool > 1 {
            let p = self.pool;
            y = y.avg_pool2d([3, 3], [p, p], [1, 1], false, true, None);
        }
        let short = match &self.shortcut {
            Some(conv) if self.pool > 1 => {
                let p = self.pool;
                conv.forward(&x.avg_pool2d([p, p], [p, p], [0, 0], true, false, None))
            }
            Some(conv) => conv.forward(x),
            None => x.shallow_clone(),
        };
        (self.conv3.forward(&y) + short).relu()
    }
}

/// ResNeSt's convolution: two splits of the channels, weighted by an attention over their common mean.
struct SplitAttention {
    conv: Conv,
    bn0: FrozenNorm,
    fc1: Conv,
    bn1: FrozenNorm,
    fc2: Conv,
}

impl SplitAttention {
    fn new(b: &Builder, channels: i64) -> Result<Self> {
        let inner = (channels * RADIX / 4).max(32);
        let split = Shape { groups: RADIX, ..Shape::new(channels, channels * RADIX, 3) };
        Ok(SplitAttention {
            conv: Conv::plain(&b.sub("conv"), split)?,
            bn0: FrozenNorm::new(&b.sub("bn0"), channels * RADIX)?,
            fc1: Conv::with_bias(&b.sub("fc1"), Shape::new(channels, inner, 1))?,
            bn1: FrozenNorm::new(&b.sub("bn1"), inner)?,
            fc2: Conv::with_bias(&b.sub("fc2"), Shape::new(inner, channels * RADIX, 1))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let x = self.bn0.forward(&self.conv.forward(x)).relu();
        let s = x.size();
        // [n, radix, channels, H, W]
        let splits = x.view([s[0], RADIX, s[1] / RADIX, s[2], s[3]]);
        let sum = splits.sum_dim_intlist(1, false, Kind::Float);
        let mean = sum.mean_dim([2, 3].as_slice(), true, Kind::Float);
        let attention = self.fc2.forward(&self.bn1.forward(&self.fc1.forward(&mean)).relu());
        let attention = attention.view([s[0], RADIX, s[1] / RADIX, 1, 1]).softmax(1, Kind::Float);
        (splits * attention).sum_dim_intlist(1, false, Kind::Float)
    }
}

pub struct Backbone {
    stem: Vec<Conv>,
    /// res2 to res5.
    stages: Vec<Vec<Block>>,
}

impl Backbone {
    pub fn new(b: &Builder, sizes: &BackboneSizes) -> Result<Self> {
        let [inner, outer] = sizes.stem;
        let s = b.sub("stem");
        let stem = match sizes.family {
            Family::ResNet => vec![Conv::with_norm(&s.sub("conv1"), Shape::new(3, outer, 7).stride(2))?],
            Family::ResNeSt => vec![
                Conv::with_norm(&s.sub("conv1_1"), Shape::new(3, inner, 3).stride(2))?,
                Conv::with_norm(&s.sub("conv1_2"), Shape::new(inner, inner, 3))?,
                Conv::with_norm(&s.sub("conv1_3"), Shape::new(inner, outer, 3))?,
            ],
        };
        let mut inputs = outer;
        let mut stages = Vec::new();
        for (i, &stage) in sizes.stages.iter().enumerate() {
            let b = b.sub(format!("res{}", i + 2));
            ensure!(stage.blocks > 0, "res{} has no block", i + 2);
            let mut blocks = Vec::new();
            for number in 0..stage.blocks {
                let stride = if number == 0 && i > 0 { 2 } else { 1 };
                blocks.push(Block::new(&b.sub(number), sizes.family, inputs, stage, stride)?);
                inputs = stage.outputs;
            }
            stages.push(blocks);
        }
        Ok(Backbone { stem, stages })
    }

    /// Normalised pictures f32 `[n, 3, H, W]`, sides multiples of 32 → features at strides 8, 16, 32.
    pub fn forward(&self, pictures: &Tensor) -> [Tensor; 3] {
        let stem = self.stem.iter().fold(pictures.shallow_clone(), |x, conv| conv.forward(&x).relu());
        let mut x = stem.max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false);
        let outputs: Vec<Tensor> = self
            .stages
            .iter()
            .map(|blocks| {
                x = blocks.iter().fold(x.shallow_clone(), |x, block| block.forward(&x));
                x.shallow_clone()
            })
            .collect();
        [1, 2, 3].map(|i| outputs[i].shallow_clone())
    }
}
