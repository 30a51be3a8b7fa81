//! Three cascaded heads (Cai and Vasconcelos, arXiv 1712.00726): each looks at the boxes of the one before it, moves them,
//! and says how much they look like every class.

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};

use super::{
    boxes,
    layers::{Conv, Shape},
    pyramid::STRIDES,
    roi_align::{roi_align, BINS},
};
use crate::{
    models::{layers::Linear, parameters::Builder},
    rewards::weights::Checkpoint,
};

/// By which a stage divides its deltas.
const WEIGHTS: [[f64; 4]; 3] = [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]];
/// Levels that boxes are pooled from: p3 to p5.
const LEVELS: i64 = 3;

/// Sizes, as a checkpoint's shapes say them.
#[derive(Clone, Debug)]
pub struct HeadSizes {
    /// Outputs of 3×3 convolutions before the linear layers.
    pub convs: Vec<i64>,
    pub linears: Vec<i64>,
    pub classes: i64,
}

impl HeadSizes {
    pub fn of(checkpoint: &Checkpoint) -> Result<HeadSizes> {
        let (mut convs, mut linears) = (Vec::new(), Vec::new());
        let head = "roi_heads.box_head.0";
        while checkpoint.has(&format!("{head}.conv{}.weight", convs.len() + 1)) {
            convs.push(checkpoint.shape::<4>(&format!("{head}.conv{}.weight", convs.len() + 1))?[0]);
        }
        while linears.is_empty() || checkpoint.has(&format!("{head}.fc{}.weight", linears.len() + 1)) {
            linears.push(checkpoint.shape::<2>(&format!("{head}.fc{}.weight", linears.len() + 1))?[0]);
        }
        let [outputs, _] = checkpoint.shape("roi_heads.box_predictor.0.cls_score.weight")?;
        ensure!(outputs > 1, "{}: cls_score has {outputs} outputs", checkpoint.path);
        Ok(HeadSizes { convs, linears, classes: outputs - 1 })
    }
}

struct Stage {
    convs: Vec<Conv>,
    linears: Vec<Linear>,
    cls_score: Linear,
    bbox_pred: Linear,
}

impl Stage {
    fn new(head: &Builder, predictor: &Builder, sizes: &HeadSizes, channels: i64) -> Result<Self> {
        let (mut convs, mut linears, mut inputs) = (Vec::new(), Vec::new(), channels);
        for (i, &outputs) in sizes.convs.iter().enumerate() {
            convs.push(Conv::with_norm(&head.sub(format!("conv{}", i + 1)), Shape::new(inputs, outputs, 3))?);
            inputs = outputs;
        }
        inputs *= BINS * BINS;
        for (i, &outputs) in sizes.linears.iter().enumerate() {
            linears.push(Linear::new(&head.sub(format!("fc{}", i + 1)), inputs, outputs)?);
            inputs = outputs;
        }
        Ok(Stage {
            convs,
            linears,
            // one column more than there are classes; it is not used
            cls_score: Linear::new(&predictor.sub("cls_score"), inputs, sizes.classes + 1)?,
            bbox_pred: Linear::new(&predictor.sub("bbox_pred"), inputs, 4)?,
        })
    }

    /// Pooled features `[n, C, 7, 7]` → logits `[n, classes + 1]` and deltas `[n, 4]`.
    fn forward(&self, pooled: &Tensor) -> (Tensor, Tensor) {
        let x = self.convs.iter().fold(pooled.shallow_clone(), |x, conv| conv.forward(&x).relu());
        let x = self.linears.iter().fold(x.flatten(1, -1), |x, linear| linear.forward(&x).relu());
        (self.cls_score.forward(&x), self.bbox_pred.forward(&x))
    }
}

pub struct Cascade {
    stages: Vec<Stage>,
    classes: i64,
}

impl Cascade {
    pub fn new(b: &Builder, sizes: &HeadSizes, channels: i64) -> Result<Self> {
        let (heads, predictors) = (b.sub("box_head"), b.sub("box_predictor"));
        let stage = |i: usize| Stage::new(&heads.sub(i), &predictors.sub(i), sizes, channels);
        Ok(Cascade { stages: (0..WEIGHTS.len()).map(stage).collect::<Result<_>>()?, classes: sizes.classes })
    }

    /// Levels p3 to p7 of one picture of `size` = \[height, width\] and its proposals `[n, 4]` → boxes f32 `[n, 4]` of the
    /// last stage, and the stages' mean confidence that a box shows a class, f32 `[n, classes]` in [0, 1].
    pub fn forward(&self, levels: &[Tensor; 5], proposals: &Tensor, size: [i64; 2]) -> (Tensor, Tensor) {
        let mut boxes = proposals.shallow_clone();
        let mut confidence = Tensor::zeros([boxes.size()[0], self.classes], (Kind::Float, boxes.device()));
        for (stage, weights) in self.stages.iter().zip(WEIGHTS) {
            let (logits, deltas) = stage.forward(&pool(levels, &boxes));
            confidence += logits.narrow(1, 0, self.classes).sigmoid();
            boxes = boxes::clip(&boxes::decode(&boxes, &deltas, weights), size);
        }
        (boxes, confidence / WEIGHTS.len() as f64)
    }
}

/// Every box's features, from the level that fits its size: one of 224 pixels belongs to p4.
fn pool(levels: &[Tensor; 5], boxes: &Tensor) -> Tensor {
    let side = boxes::areas(boxes).sqrt();
    let level = ((side / 224.0 + 1e-8).log2() + 4.0).floor().clamp(3.0, 2.0 + LEVELS as f64) - 3.0;
    let channels = levels[0].size()[1];
    let mut pooled = Tensor::zeros([boxes.size()[0], channels, BINS, BINS], (Kind::Float, boxes.device()));
    for (i, features) in levels.iter().enumerate().take(LEVELS as usize) {
        let mine = level.eq(i as f64).nonzero().view([-1]);
        let part = roi_align(&features.get(0), &boxes.index_select(0, &mine), 1.0 / STRIDES[i] as f64);
        pooled = pooled.index_copy(0, &mine, &part);
    }
    pooled
}
