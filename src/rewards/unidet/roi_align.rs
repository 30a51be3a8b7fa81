//! ROIAlign (He et al., arXiv 1703.06870; the variant with half-pixel offset): a box's features on a grid of 7 × 7 bins.
//!
//! A bin is the mean of bilinear samples, ⌈side/7⌉ per axis. Both the sampling and the mean factor into an axis each, so
//! out = W_y · F · W_xᵀ with a 7 × H and a W × 7 matrix per box; matrix products in place of a kernel of its own.

use tch::{Kind, Tensor};

/// Bins per axis.
pub const BINS: i64 = 7;
/// Boxes at once, which bounds the memory.
const CHUNK: i64 = 128;

/// Features f32 `[C, H, W]` and boxes f32 `[n, 4]` in pixels, `scale` features per pixel → f32 `[n, C, 7, 7]`.
pub fn roi_align(features: &Tensor, boxes: &Tensor, scale: f64) -> Tensor {
    let [channels, height, width] = features.size()[..] else { panic!("features {:?}", features.size()) };
    let n = boxes.size()[0];
    // rows of the picture, each all its pixels with all their channels
    let rows = features.permute([1, 2, 0]).reshape([height, width * channels]);
    let corners = boxes * scale - 0.5;
    let mut pieces = vec![Tensor::zeros([0, channels, BINS, BINS], (Kind::Float, features.device()))];
    for start in (0..n).step_by(CHUNK as usize) {
        let corners = corners.narrow(0, start, CHUNK.min(n - start));
        let axis =
            |low: i64, high: i64, length| axis_weights(&corners.select(1, low), &corners.select(1, high), length);
        let (down, across) = (axis(1, 3, height), axis(0, 2, width));
        let strips = down.flatten(0, 1).matmul(&rows).view([-1, BINS, width, channels]);
        pieces.push(across.unsqueeze(1).matmul(&strips).permute([0, 3, 1, 2]));
    }
    Tensor::cat(&pieces, 0).contiguous()
}

/// Weights f32 `[n, 7, length]` of the cells of an axis in the bins between `low` and `high`, f32 `[n]` in cells.
fn axis_weights(low: &Tensor, high: &Tensor, length: i64) -> Tensor {
    let (kind, device) = (Kind::Float, low.device());
    let bin = ((high - low) / BINS as f64).view([-1, 1, 1]);
    let samples = bin.ceil();
    let most = (samples.max().double_value(&[]) as i64).max(1);
    let number = Tensor::arange(most, (kind, device)).view([1, 1, -1]);
    let bins = Tensor::arange(BINS, (kind, device)).view([1, -1, 1]);
    let at_least_one = samples.clamp_min(1.0);
    let position = low.view([-1, 1, 1]) + bins * &bin + (&number + 0.5) * &bin / &at_least_one;
    // a sample up to one cell outside takes the border's value, one beyond counts as 0
    let inside = position.ge(-1.0).logical_and(&position.le(length as f64)).logical_and(&number.lt_tensor(&samples));
    let position = position.clamp(0.0, (length - 1) as f64).unsqueeze(-1);
    let cells = Tensor::arange(length, (kind, device));
    let distance = (position - cells).abs();
    let hat = (-distance + 1.0).clamp_min(0.0) * inside.unsqueeze(-1);
    hat.sum_dim_intlist(2, false, kind) / at_least_one
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Features that grow linearly are sampled exactly: the middle of each bin.
    #[test]
    fn linear_features_come_back_at_the_bins_middles() {
        let (height, width) = (12, 20);
        let axis = |n: i64| Tensor::arange(n, (Kind::Float, Device::Cpu));
        let features = Tensor::stack(
            &[axis(width).expand([height, width], false), axis(height).view([-1, 1]).expand([height, width], false)],
            0,
        );
        let boxes = Tensor::from_slice(&[16.0f32, 8.0, 128.0, 78.0]).view([1, 4]);
        let out = roi_align(&features, &boxes, 0.125);
        for bin in 0..7 {
            // 2 to 16 and 1 to 9.75 cells, pixel centres at whole numbers
            let (x, y) = (2.0 - 0.5 + (bin as f64 + 0.5) * 2.0, 1.0 - 0.5 + (bin as f64 + 0.5) * 1.25);
            assert!((out.double_value(&[0, 0, 3, bin]) - x).abs() < 1e-5);
            assert!((out.double_value(&[0, 1, bin, 3]) - y).abs() < 1e-5);
        }
        assert_eq!(roi_align(&features, &Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)), 1.0).size(), [0, 2, 7, 7]);
    }
}
