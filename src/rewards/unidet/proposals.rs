//! The region proposal network: up to 1,000 boxes per picture that may hold something.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::{
    boxes,
    layers::{Conv, Shape},
    pyramid::STRIDES,
};
use crate::models::parameters::Builder;

/// Side of the smallest anchor of each level, in pixels.
const SIZES: [f64; 5] = [32.0, 64.0, 128.0, 256.0, 512.0];
/// Heights over widths.
const RATIOS: [f64; 3] = [0.5, 1.0, 2.0];
/// Sizes of a level: 1, 2^(1/3), 2^(2/3) times the smallest.
const OCTAVES: i32 = 3;
const ANCHORS: i64 = 9;
/// Boxes kept per level and per picture.
const TOP: i64 = 1000;
const NMS: f64 = 0.7;

pub struct ProposalNetwork {
    conv: Conv,
    objectness: Conv,
    deltas: Conv,
}

impl ProposalNetwork {
    pub fn new(b: &Builder, channels: i64) -> Result<Self> {
        Ok(ProposalNetwork {
            conv: Conv::with_bias(&b.sub("conv"), Shape::new(channels, channels, 3))?,
            objectness: Conv::with_bias(&b.sub("objectness_logits"), Shape::new(channels, ANCHORS, 1))?,
            deltas: Conv::with_bias(&b.sub("anchor_deltas"), Shape::new(channels, 4 * ANCHORS, 1))?,
        })
    }

    /// Levels p3 to p7 of one picture, f32 `[1, channels, h, w]`, whose own `size` is \[height, width\] without padding
    /// → boxes f32 `[n, 4]`, the likeliest first.
    pub fn propose(&self, levels: &[Tensor; 5], size: [i64; 2]) -> Result<Tensor> {
        let (mut all_boxes, mut all_scores) = (Vec::new(), Vec::new());
        for (level, features) in levels.iter().enumerate() {
            let shared = self.conv.forward(features).relu();
            // anchors vary fastest, then columns, then rows
            let scores = self.objectness.forward(&shared).permute([0, 2, 3, 1]).reshape([-1]);
            let deltas = self.deltas.forward(&shared).permute([0, 2, 3, 1]).reshape([-1, 4]);
            let anchors = anchors(level, features.size()[2], features.size()[3], features.device());
            let (scores, order) = scores.sort_stable(true, 0, true);
            let count = TOP.min(order.size()[0]);
            let (scores, order) = (scores.narrow(0, 0, count), order.narrow(0, 0, count));
            let decoded = boxes::decode(&anchors.index_select(0, &order), &deltas.index_select(0, &order), [1.0; 4]);
            let clipped = boxes::clip(&decoded, size);
            let sides = clipped.narrow(1, 2, 2) - clipped.narrow(1, 0, 2);
            let some = sides.gt(0.0).all_dim(1, false).nonzero().view([-1]);
            let (clipped, scores) = (clipped.index_select(0, &some), scores.index_select(0, &some));
            let kept = Tensor::from_slice(&boxes::nms(&clipped, &scores, NMS)?).to_device(features.device());
            all_boxes.push(clipped.index_select(0, &kept));
            all_scores.push(scores.index_select(0, &kept));
        }
        let order = Tensor::cat(&all_scores, 0).argsort_stable(true, 0, true);
        let order = order.narrow(0, 0, TOP.min(order.size()[0]));
        Ok(Tensor::cat(&all_boxes, 0).index_select(0, &order))
    }
}

/// All anchors of a level, f32 `[rows · columns · 9, 4]`, centred at the pixels' upper left corners.
fn anchors(level: usize, rows: i64, columns: i64, device: Device) -> Tensor {
    let mut cell = Vec::new();
    for octave in 0..OCTAVES {
        let size = SIZES[level] * 2f64.powf(f64::from(octave) / f64::from(OCTAVES));
        for ratio in RATIOS {
            let width = (size * size / ratio).sqrt();
            let (x, y) = ((width / 2.0) as f32, (ratio * width / 2.0) as f32);
            cell.extend([-x, -y, x, y]);
        }
    }
    let cell = Tensor::from_slice(&cell).view([1, ANCHORS, 4]).to_device(device);
    let places = |n: i64| Tensor::arange(n, (Kind::Float, device)) * STRIDES[level] as f64;
    let x = places(columns).view([1, -1]).expand([rows, columns], false);
    let y = places(rows).view([-1, 1]).expand([rows, columns], false);
    let corner = Tensor::stack(&[&x, &y, &x, &y], 2).view([-1, 1, 4]);
    (corner + cell).view([-1, 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_have_their_areas_and_ratios() {
        let all = anchors(1, 2, 3, Device::Cpu);
        assert_eq!(all.size(), [54, 4]);
        let areas = boxes::areas(&all);
        for (i, wanted) in [64.0f64, 64.0 * 2f64.powf(1.0 / 3.0), 64.0 * 2f64.powf(2.0 / 3.0)].iter().enumerate() {
            for ratio in 0..3 {
                let area = areas.double_value(&[(3 * i + ratio) as i64]);
                assert!((area / (wanted * wanted) - 1.0).abs() < 1e-6, "{area}");
            }
        }
        // the last cell: column 2, row 1; its second anchor is a square of 64
        let square: Vec<f32> = Vec::try_from(all.get(45 + 1)).unwrap();
        assert_eq!(square, [0.0, -16.0, 64.0, 48.0]);
    }
}
