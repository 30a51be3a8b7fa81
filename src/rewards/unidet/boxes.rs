//! Boxes f32 `[n, 4]` as left, top, right, bottom in pixels.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

/// A box grows at most by this factor's logarithm, from 16 to 1000 pixels.
fn largest_log() -> f64 {
    (1000.0f64 / 16.0).ln()
}

/// `boxes` moved and scaled by `deltas` (dx, dy, dw, dh over `weights`).
pub fn decode(boxes: &Tensor, deltas: &Tensor, weights: [f64; 4]) -> Tensor {
    let (left, top) = (boxes.select(1, 0), boxes.select(1, 1));
    let (width, height) = (boxes.select(1, 2) - &left, boxes.select(1, 3) - &top);
    let delta = |i: i64| deltas.select(1, i) / weights[i as usize];
    let x = delta(0) * &width + (left + &width * 0.5);
    let y = delta(1) * &height + (top + &height * 0.5);
    let half_width = delta(2).clamp_max(largest_log()).exp() * width * 0.5;
    let half_height = delta(3).clamp_max(largest_log()).exp() * height * 0.5;
    Tensor::stack(&[&x - &half_width, &y - &half_height, x + half_width, y + half_height], 1)
}

/// Clipped to a picture of `size` = \[height, width\].
pub fn clip(boxes: &Tensor, size: [i64; 2]) -> Tensor {
    let side = |i: i64, limit: i64| boxes.select(1, i).clamp(0.0, limit as f64);
    Tensor::stack(&[side(0, size[1]), side(1, size[0]), side(2, size[1]), side(3, size[0])], 1)
}

pub fn areas(boxes: &Tensor) -> Tensor {
    (boxes.select(1, 2) - boxes.select(1, 0)) * (boxes.select(1, 3) - boxes.select(1, 1))
}

/// Intersection over union of every two boxes, `[n, n]`.
fn overlaps(boxes: &Tensor) -> Tensor {
    let (a, b) = (boxes.unsqueeze(1), boxes.unsqueeze(0));
    let top_left = a.narrow(2, 0, 2).maximum(&b.narrow(2, 0, 2));
    let bottom_right = a.narrow(2, 2, 2).minimum(&b.narrow(2, 2, 2));
    let sides = (bottom_right - top_left).clamp_min(0.0);
    let inter = sides.select(2, 0) * sides.select(2, 1);
    let area = areas(boxes);
    &inter / (area.unsqueeze(1) + area.unsqueeze(0) - &inter)
}

/// Which pairs of boxes overlap by more than `threshold`, row by row.
pub struct Overlapping {
    n: usize,
    pairs: Vec<bool>,
}

impl Overlapping {
    pub fn new(boxes: &Tensor, threshold: f64) -> Result<Overlapping> {
        let pairs = overlaps(boxes).gt(threshold).to_kind(Kind::Uint8).to_device(Device::Cpu);
        let pairs = Vec::<u8>::try_from(pairs.contiguous().view([-1]))?;
        Ok(Overlapping { n: boxes.size()[0] as usize, pairs: pairs.into_iter().map(|p| p != 0).collect() })
    }

    pub fn are(&self, a: usize, b: usize) -> bool {
        self.pairs[a * self.n + b]
    }
}

/// Non-maximum suppression: indices of the boxes of which no better one overlaps by more than `threshold`, the best
/// first, i64 on the CPU. Equal scores keep their order.
pub fn nms(boxes: &Tensor, scores: &Tensor, threshold: f64) -> Result<Vec<i64>> {
    let order = scores.argsort_stable(true, 0, true);
    let overlapping = Overlapping::new(&boxes.index_select(0, &order), threshold)?;
    let order = Vec::<i64>::try_from(order.to_device(Device::Cpu))?;
    let mut kept: Vec<usize> = Vec::new();
    for i in 0..order.len() {
        if !kept.iter().any(|&better| overlapping.are(better, i)) {
            kept.push(i);
        }
    }
    Ok(kept.into_iter().map(|i| order[i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boxes(values: &[[f32; 4]]) -> Tensor {
        Tensor::from_slice(&values.concat()).view([-1, 4])
    }

    #[test]
    fn boxes_move_and_grow() {
        let start = boxes(&[[10.0, 20.0, 30.0, 60.0]]);
        let deltas = boxes(&[[1.0, -0.5, 2f32.ln(), 100.0]]);
        let out: Vec<f32> = Vec::try_from(decode(&start, &deltas, [1.0, 1.0, 1.0, 1.0]).view([-1])).unwrap();
        // centre (20, 40) → (40, 20), width 20 → 40, height 40 → 40 · 1000/16
        for (got, wanted) in out.iter().zip([20.0, 20.0 - 1250.0, 60.0, 20.0 + 1250.0]) {
            assert!((got - wanted).abs() < 1e-3, "{out:?}");
        }
        let out: Vec<f32> = Vec::try_from(clip(&boxes(&[[-3.0, 5.0, 700.0, 90.0]]), [80, 640]).view([-1])).unwrap();
        assert_eq!(out, [0.0, 5.0, 640.0, 80.0]);
    }

    #[test]
    fn worse_boxes_that_overlap_go() {
        let all =
            boxes(&[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0], [20.0, 0.0, 30.0, 10.0], [0.0, 0.0, 10.0, 5.0]]);
        let scores = Tensor::from_slice(&[0.5f32, 0.9, 0.1, 0.9]);
        // overlaps with box 1: 0.8, 0, 0.625; box 3 with box 0: 0.5
        assert_eq!(nms(&all, &scores, 0.7).unwrap(), [1, 3, 2]);
        assert_eq!(nms(&all, &scores, 0.6).unwrap(), [1, 2]);
        assert_eq!(nms(&all, &scores, 0.9).unwrap(), [1, 3, 0, 2]);
        assert_eq!(nms(&boxes(&[]), &Tensor::from_slice(&[0f32; 0]), 0.5).unwrap(), [0i64; 0]);
    }
}
