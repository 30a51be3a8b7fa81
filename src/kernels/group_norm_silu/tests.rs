use super::*;
use crate::random::{Coordinates, Purpose};
use tch::{Kind, Tensor};

fn normals(count: usize, sample: u32) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Coordinates { sample, ..Coordinates::new(11, Purpose::WeightInit) }.stream().fill_normal(&mut values);
    values
}

/// Largest gap relative to the largest value.
fn gap(ours: &[f32], oracle: &Tensor) -> f64 {
    let ours = Tensor::from_slice(ours).to_kind(Kind::Double);
    let oracle = oracle.reshape([-1]);
    ((&ours - &oracle).abs().max() / oracle.abs().max()).double_value(&[])
}

/// x, dy `[N, pixels, C]`, weight and bias `[C]`; the activations' mean is far from 0.
fn case(shape: &Shape) -> [Vec<f32>; 4] {
    let x = normals(shape.elements(), 0).into_iter().map(|v| 2.0 * v + 3.0).collect();
    [x, normals(shape.elements(), 1), normals(shape.channels, 2), normals(shape.channels, 3)]
}

#[test]
fn both_passes_agree_with_libtorch_in_f64() {
    for silu in [false, true] {
        let shape = Shape { samples: 3, pixels: 20, channels: 12, groups: 4, epsilon: 1e-5, silu };
        let [x, dy, weight, bias] = case(&shape);
        let leaf = |values: &[f32], size: &[i64]| {
            Tensor::from_slice(values).to_kind(Kind::Double).reshape(size).set_requires_grad(true)
        };
        let (x_leaf, weight_leaf, bias_leaf) = (leaf(&x, &[3, 20, 12]), leaf(&weight, &[12]), leaf(&bias, &[12]));
        let channels_first = x_leaf.transpose(1, 2).contiguous();
        let normed = channels_first.group_norm(4, Some(&weight_leaf), Some(&bias_leaf), 1e-5, false);
        let y = if silu { normed.silu() } else { normed }.transpose(1, 2);
        (&y * Tensor::from_slice(&dy).to_kind(Kind::Double).reshape([3, 20, 12])).sum(Kind::Double).backward();

        let ours = reference_forward(&x, &weight, &bias, &shape).unwrap();
        let gradients = reference_backward(&x, &dy, &weight, &bias, &shape).unwrap();
        let gaps = [
            gap(&ours, &y.detach().contiguous()),
            gap(&gradients.grad_x, &x_leaf.grad()),
            gap(&gradients.grad_weight, &weight_leaf.grad()),
            gap(&gradients.grad_bias, &bias_leaf.grad()),
        ];
        // rounding of the results to f32, 6e-8: observed 3e-8
        assert!(gaps.iter().all(|&gap| gap < 1.2e-7), "silu {silu}: {gaps:?}");
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let shape = Shape { samples: 1, pixels: 4, channels: 6, groups: 3, epsilon: 1e-5, silu: true };
    let [x, dy, weight, bias] = case(&shape);
    assert!(reference_forward(&x, &weight, &bias, &Shape { groups: 4, ..shape }).is_err());
    assert!(reference_forward(&x[1..], &weight, &bias, &shape).is_err());
    assert!(reference_forward(&x, &weight, &bias[1..], &shape).is_err());
    assert!(reference_backward(&x, &dy[1..], &weight, &bias, &shape).is_err());
}

#[test]
fn the_cut_into_pieces_depends_on_the_pixels_alone_and_covers_them() {
    for pixels in [0, 1, 15, 16, 17, 64, 512, 513, 4096, 262_144] {
        let shape = Shape { samples: 1, pixels, channels: 8, groups: 2, epsilon: 1e-5, silu: false };
        assert!(shape.pieces() * shape.pixels_per_piece() >= pixels && shape.pieces() <= 32, "{pixels}");
        assert_eq!(shape.pieces(), Shape { samples: 9, channels: 4, ..shape }.pieces());
    }
}
