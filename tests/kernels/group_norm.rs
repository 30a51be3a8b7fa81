//! The cases of group normalisation with SiLU; see `cases.rs`.

use std::sync::Arc;

use rldiff::kernels::cuda::{Element, Machine};
use rldiff::kernels::group_norm_silu::{self as op, DeviceGradients, DeviceInputs, Shape};
use tch::{Device, Kind, Tensor};

use super::cases::{normals, Buffer, Machines, Observed, Real};

const fn shape(samples: usize, pixels: usize, channels: usize, groups: usize, silu: bool) -> Shape {
    Shape { samples, pixels, channels, groups, epsilon: 1e-5, silu }
}

/// One element per group, widths that are not a multiple of four, groups that straddle four channels (the U-Net's 320
/// channels in 32 groups), pieces of unequal length, more channels than a block has columns for, nothing at all.
const SHAPES: [Shape; 10] = [
    shape(1, 1, 2, 2, false),
    shape(2, 7, 6, 3, true),
    shape(1, 37, 5, 5, true),
    shape(3, 17, 12, 4, false),
    shape(2, 64, 320, 32, true),
    shape(1, 600, 32, 8, true),
    shape(2, 19, 1100, 10, true),
    shape(1, 16, 2560, 32, false),
    shape(0, 16, 8, 2, true),
    shape(2, 0, 8, 2, true),
];

/// y, mean, rstd, grad_x, grad_weight, grad_bias, grad_shift.
type Outcome = [Vec<f32>; 7];

/// `values` are x, dy, weight, bias and the shift.
fn run<T: Real, P: Real>(machine: &Arc<dyn Machine>, values: [&[f32]; 5], shape: &Shape) -> Outcome {
    let [x, dy] = [values[0], values[1]].map(|v| upload::<T>(machine, v));
    let [weight, bias] = [values[2], values[3]].map(|v| upload::<P>(machine, v));
    let floats = |length| Buffer::new(machine, length, Element::F32).unwrap();
    let [mean, rstd] = [0, 1].map(|_| floats(shape.samples * shape.groups));
    let [grad_weight, grad_bias] = [0, 1].map(|_| floats(shape.channels));
    let [channel_mean, grad_shift] = [0, 1].map(|_| floats(shape.samples * shape.channels));
    let shift = Buffer::upload(machine, values[4]).unwrap();
    let [y, grad_x] = [0, 1].map(|_| Buffer::new(machine, shape.elements(), T::ELEMENT).unwrap());
    let inputs = DeviceInputs {
        x: x.slice(),
        shift: Some(shift.slice()),
        weight: weight.slice(),
        bias: bias.slice(),
        mean: mean.slice(),
        rstd: rstd.slice(),
        channel_mean: Some(channel_mean.slice()),
    };
    let workspace = floats(op::forward_workspace(shape) / 4);
    op::launch_forward(&**machine, &inputs, y.slice(), workspace.slice(), shape).unwrap();
    let workspace = Buffer::new(machine, op::backward_workspace(shape) / 8, Element::F64).unwrap();
    let gradients = DeviceGradients {
        grad_y: dy.slice(),
        grad_x: grad_x.slice(),
        grad_weight: grad_weight.slice(),
        grad_bias: grad_bias.slice(),
        grad_shift: Some(grad_shift.slice()),
        workspace: workspace.slice(),
    };
    op::launch_backward(&**machine, &inputs, &gradients, shape).unwrap();
    let [y, grad_x] = [y, grad_x].map(|b| b.download::<T>().unwrap().into_iter().map(T::value).collect());
    let [mean, rstd, grad_weight, grad_bias] = [mean, rstd, grad_weight, grad_bias].map(|b| b.download().unwrap());
    // without pixels nobody writes it
    let grad_shift = if shape.elements() > 0 { grad_shift.download().unwrap() } else { Vec::new() };
    [y, mean, rstd, grad_x, grad_weight, grad_bias, grad_shift]
}

fn upload<T: Real>(machine: &Arc<dyn Machine>, values: &[f32]) -> Buffer {
    Buffer::upload(machine, &values.iter().map(|&v| T::rounded(v)).collect::<Vec<T>>()).unwrap()
}

/// Largest difference relative to the largest expected value.
fn relative(ours: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(ours.len(), expected.len());
    let largest = expected.iter().fold(0f64, |m, v| f64::from(v.abs()).max(m)).max(1e-3);
    ours.iter().zip(expected).fold(0f64, |m, (&a, &b)| {
        assert!(a.is_finite(), "{a} where {b} is expected");
        m.max((f64::from(a) - f64::from(b)).abs())
    }) / largest
}

/// Activations in T, weight and bias in P; the activations have mean `offset` and standard deviation 1.
pub fn both_passes<T: Real, P: Real>(machines: &Machines, offset: f32, seen: &mut Observed) {
    for shape in &SHAPES {
        let rounded = |values: Vec<f32>| values.into_iter().map(|v| T::rounded(v).value()).collect::<Vec<f32>>();
        let x = rounded(normals(shape.elements(), 0).into_iter().map(|v| v + offset).collect());
        let dy = rounded(normals(shape.elements(), 1));
        let [weight, bias] =
            [2, 3].map(|i| normals(shape.channels, i).into_iter().map(|v| P::rounded(v).value()).collect::<Vec<f32>>());
        let shift = normals(shape.samples * shape.channels, 4);
        let values = [&x[..], &dy, &weight, &bias, &shift];
        let [ours, again] = machines.each_ref().map(|machine| run::<T, P>(machine, values, shape));
        for (a, b) in ours.iter().zip(&again) {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "two runs differ: {shape:?}");
        }
        let x: Vec<f32> = x
            .iter()
            .enumerate()
            .map(|(i, x)| x + shift[i / (shape.pixels * shape.channels) * shape.channels + i % shape.channels])
            .collect();
        let y = op::reference_forward(&x, &weight, &bias, shape).unwrap();
        let gradients = op::reference_backward(&x, &dy, &weight, &bias, shape).unwrap();
        // of the result's rounding: half a unit in the last place, relative to the largest value
        let rounding = match T::ELEMENT {
            Element::F32 => 6e-8,
            Element::Bf16 => 3.9e-3,
            _ => 4.9e-4,
        };
        // f32 sums and products: observed 3.3e-7, with bf16's rounding 3.7e-3, with a mean of 100 4.9e-6.
        // x − mean loses digits with the mean's size: 2^-24 |offset|, times rstd. One element per group has variance 0
        // and rstd 316; there the expected value is 0 and nothing is lost, for x equals its mean.
        let arithmetic = 2e-6 + 1.2e-7 * f64::from(offset.abs());
        let what =
            |name: [&'static str; 3]| name[if T::ELEMENT == Element::F32 { usize::from(offset > 10.0) } else { 2 }];
        let names = what(["y, f32", "y, f32, mean 100", "y, bf16 or f16"]);
        seen.check(names, relative(&ours[0], &y), arithmetic + rounding);
        let names = what(["grad_x, f32", "grad_x, f32, mean 100", "grad_x, bf16 or f16"]);
        seen.check(names, relative(&ours[3], &gradients.grad_x), arithmetic + rounding);
        for (a, b) in [(&ours[4], &gradients.grad_weight), (&ours[5], &gradients.grad_bias)] {
            let names =
                what(["grad of weight and bias", "grad of weight and bias, mean 100", "grad of weight and bias"]);
            seen.check(names, relative(a, b), arithmetic);
        }
        // Σ over pixels of grad_x, whose terms cancel: relative to the sum of their sizes; observed 8.3e-7
        let mut of_shift = vec![(0f64, 0f64); ours[6].len()];
        for (i, &value) in gradients.grad_x.iter().enumerate() {
            let at = i / (shape.pixels * shape.channels) * shape.channels + i % shape.channels;
            of_shift[at] = (of_shift[at].0 + f64::from(value), of_shift[at].1 + f64::from(value.abs()));
        }
        let largest = of_shift.iter().fold(1e-3, |m, sums| sums.1.max(m));
        let gap = ours[6].iter().zip(&of_shift).fold(0f64, |m, (&a, b)| (f64::from(a) - b.0).abs().max(m)) / largest;
        let names = what(["grad of shift", "grad of shift, mean 100", "grad of shift"]);
        seen.check(names, gap, arithmetic);
    }
}

/// The differentiable operation against libtorch's own in f64.
pub fn autograd(machine: Arc<dyn Machine>, device: Device, seen: &mut Observed) {
    rldiff::kernels::install(machine);
    let size = [3, 20, 5, 7];
    let values = normals(3 * 20 * 5 * 7, 5);
    let leaf = |values: &[f32], size: &[i64], kind: Kind| {
        Tensor::from_slice(values).reshape(size).to_device(device).to_kind(kind).detach().set_requires_grad(true)
    };
    // f32 arithmetic: observed 1.9e-7; bf16 rounds y and the gradients, 2^-9: observed 3.4e-3
    for (kind, parameter_kind, tolerance) in
        [(Kind::Float, Kind::Float, 2e-6), (Kind::BFloat16, Kind::BFloat16, 1e-2), (Kind::BFloat16, Kind::Float, 1e-2)]
    {
        for (silu, with_shift) in [(false, true), (true, true), (true, false)] {
            let x = leaf(&values, &size, kind);
            let [weight, bias] = [6, 7].map(|i| leaf(&normals(20, i), &[20], parameter_kind));
            let shift = leaf(&normals(60, 9), &[3, 20], Kind::Float);
            let oracle = [&x, &weight, &bias, &shift].map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true));
            let quiet =
                tch::no_grad(|| op::group_norm_silu(&x, with_shift.then_some(&shift), &weight, &bias, 4, 1e-5, silu));
            let y = op::group_norm_silu(&x, with_shift.then_some(&shift), &weight, &bias, 4, 1e-5, silu).unwrap();
            assert_eq!((y.size(), y.kind(), y.stride()[1]), (size.to_vec(), kind, 1), "channels-last, of x's type");
            assert!(y.equal(&quiet.unwrap()), "with and without gradients");
            let shifted =
                if with_shift { &oracle[0] + oracle[3].unsqueeze(-1).unsqueeze(-1) } else { oracle[0].shallow_clone() };
            let normed = shifted.group_norm(4, Some(&oracle[1]), Some(&oracle[2]), 1e-5, false);
            let expected = if silu { normed.silu() } else { normed };
            let dy = Tensor::from_slice(&normals(2100, 8)).reshape(size).to_device(device).to_kind(kind);
            (y.to_kind(Kind::Float) * dy.to_kind(Kind::Float)).sum(Kind::Float).backward();
            (&expected * dy.to_kind(Kind::Double)).sum(Kind::Double).backward();
            let mut pairs = vec![(y.detach(), expected.detach())];
            for (ours, theirs) in
                [&x, &weight, &bias, &shift].into_iter().zip(&oracle).take(3 + usize::from(with_shift))
            {
                assert_eq!(ours.grad().kind(), ours.kind());
                pairs.push((ours.grad(), theirs.grad()));
            }
            for (ours, theirs) in pairs {
                let gap = (ours.to_kind(Kind::Double) - &theirs).abs().max() / theirs.abs().max();
                let what = if kind == Kind::Float { "autograd, f32" } else { "autograd, bf16" };
                seen.check(what, gap.double_value(&[]), tolerance);
            }
        }
    }
    let x = leaf(&values, &size, Kind::Float);
    let parameter = leaf(&normals(20, 6), &[20], Kind::Float);
    let error = op::group_norm_silu(&x, None, &parameter, &parameter, 3, 1e-5, true).unwrap_err().to_string();
    assert!(error.contains("3 groups"), "{error}");
    let doubles = x.to_kind(Kind::Double);
    assert!(op::group_norm_silu(&doubles, None, &parameter, &parameter, 4, 1e-5, true).is_err());
    let error =
        op::group_norm_silu(&x, Some(&parameter), &parameter, &parameter, 4, 1e-5, true).unwrap_err().to_string();
    assert!(error.contains("shift"), "{error}");
}
