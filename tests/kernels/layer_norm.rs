//! The cases of layer normalisation; see `cases.rs`.

use std::sync::Arc;

use rldiff::kernels::cuda::{Element, Machine};
use rldiff::kernels::layer_norm::{self as op, DeviceInputs, ParameterGradients, Shape};
use tch::{Device, Kind, Tensor};

use super::cases::{normals, Buffer, Machines, Observed, Real};

/// Rows and width: one element, packs that are not full, 8, 16 and 32 lanes, several pieces, the widest row of 16 bits
/// that also fits in f32, no rows.
const SHAPES: [(usize, usize); 8] = [(1, 1), (3, 5), (33, 24), (70, 320), (3, 520), (2, 1024), (100, 16), (0, 8)];
const EPSILON: f64 = 1e-5;

/// y, dx, dweight, dbias; `values` are x, dy, weight, bias.
fn run<T: Real, P: Real>(machine: &Arc<dyn Machine>, values: [&[f32]; 4], shape: &Shape) -> [Vec<f32>; 4] {
    let [x, dy] = [values[0], values[1]].map(|v| upload::<T>(machine, v));
    let [weight, bias] = [values[2], values[3]].map(|v| upload::<P>(machine, v));
    let floats = |length| Buffer::new(machine, length, Element::F32).unwrap();
    let [mean, rstd] = [0, 1].map(|_| floats(shape.rows));
    let [grad_weight, grad_bias] = [0, 1].map(|_| floats(shape.width));
    let [y, dx] = [0, 1].map(|_| Buffer::new(machine, shape.elements(), T::ELEMENT).unwrap());
    let workspace = floats(shape.workspace_bytes() / 4);
    let inputs = DeviceInputs {
        x: x.slice(),
        weight: weight.slice(),
        bias: bias.slice(),
        mean: mean.slice(),
        rstd: rstd.slice(),
    };
    op::launch_forward(&**machine, &inputs, y.slice(), shape).unwrap();
    let parameters =
        ParameterGradients { weight: grad_weight.slice(), bias: grad_bias.slice(), workspace: workspace.slice() };
    op::launch_backward(&**machine, &inputs, dy.slice(), dx.slice(), Some(&parameters), shape).unwrap();
    let [y, dx] = [y, dx].map(|b| b.download::<T>().unwrap().into_iter().map(T::value).collect());
    [y, dx, grad_weight.download().unwrap(), grad_bias.download().unwrap()]
}

fn upload<T: Real>(machine: &Arc<dyn Machine>, values: &[f32]) -> Buffer {
    Buffer::upload(machine, &values.iter().map(|&v| T::rounded(v)).collect::<Vec<T>>()).unwrap()
}

fn of_libtorch(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    x.layer_norm(weight.size(), Some(weight), Some(bias), EPSILON, false)
}

/// Both passes against libtorch in f64. Activations in T, weight and bias in P, with mean `offset`: x − mean loses digits
/// with it. A row of one element has variance 0 and rstd 316. f32: observed 1.9e-7, with a mean of 100 1.7e-5; bf16 and f16 round the results.
pub fn both_passes<T: Real, P: Real>(machines: &Machines, offset: f32, rounding: f64, seen: &mut Observed) {
    for (rows, width) in SHAPES {
        let shape = Shape { rows, width, epsilon: EPSILON };
        let rounded = |values: Vec<f32>| values.into_iter().map(|v| T::rounded(v).value()).collect::<Vec<f32>>();
        let x = rounded(normals(rows * width, 0).into_iter().map(|v| v + offset).collect());
        let dy = rounded(normals(rows * width, 1));
        let [weight, bias] =
            [2, 3].map(|i| normals(width, i).into_iter().map(|v| P::rounded(v).value()).collect::<Vec<f32>>());
        let [ours, again] = machines.each_ref().map(|machine| run::<T, P>(machine, [&x, &dy, &weight, &bias], &shape));
        assert!(ours == again, "two runs differ: {shape:?}");
        let leaf = |values: &[f32], size: &[i64]| {
            Tensor::from_slice(values).to_kind(Kind::Double).view(size).set_requires_grad(true)
        };
        let (rows, width) = (rows as i64, width as i64);
        let (x, weight, bias) = (leaf(&x, &[rows, width]), leaf(&weight, &[width]), leaf(&bias, &[width]));
        let y = of_libtorch(&x, &weight, &bias);
        (&y * Tensor::from_slice(&dy).to_kind(Kind::Double).view([rows, width])).sum(Kind::Double).backward();
        let expected = [y.detach(), x.grad(), weight.grad(), bias.grad()];
        let names = match (rounding > 0.0, offset > 10.0) {
            (true, _) => "layer_norm, 16 bits",
            (false, false) => "layer_norm, f32",
            (false, true) => "layer_norm, f32, mean 100",
        };
        for (i, (ours, expected)) in ours.iter().zip(expected).enumerate() {
            let expected = Vec::<f64>::try_from(expected.view([-1])).unwrap();
            let largest = expected.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
            assert_eq!(ours.len(), expected.len());
            let gap = ours.iter().zip(&expected).fold(0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
            // the parameters' gradients are f32 whatever T is
            let rounding = if i < 2 { rounding } else { 0.0 };
            seen.check(names, gap / largest, 2e-6 + 3e-7 * f64::from(offset) + rounding);
        }
    }
}

/// The differentiable operation against libtorch's in f64, with and without gradients of the parameters, and what it
/// refuses.
pub fn autograd(machine: Arc<dyn Machine>, device: Device, seen: &mut Observed) {
    rldiff::kernels::install(machine);
    for of_parameters in [true, false] {
        let make = |kind: Kind| {
            let leaf = |seed: u32, size: &[i64], wanted: bool| {
                let count = size.iter().product::<i64>() as usize;
                Tensor::from_slice(&normals(count, seed))
                    .view(size)
                    .to_device(device)
                    .to_kind(kind)
                    .set_requires_grad(wanted)
            };
            (leaf(0, &[2, 7, 40], true), leaf(1, &[40], of_parameters), leaf(2, &[40], of_parameters))
        };
        let (ours, oracle) = (make(Kind::Float), make(Kind::Double));
        let dy = Tensor::from_slice(&normals(2 * 7 * 40, 3)).view([2, 7, 40]).to_device(device);
        let y = op::layer_norm(&ours.0, &ours.1, &ours.2, EPSILON).unwrap();
        (&y * &dy).sum(Kind::Float).backward();
        let expected = of_libtorch(&oracle.0, &oracle.1, &oracle.2);
        (&expected * dy.to_kind(Kind::Double)).sum(Kind::Double).backward();
        let mut pairs = vec![(y.detach(), expected.detach()), (ours.0.grad(), oracle.0.grad())];
        if of_parameters {
            pairs.extend([(ours.1.grad(), oracle.1.grad()), (ours.2.grad(), oracle.2.grad())]);
        }
        for (a, b) in pairs {
            assert_eq!(a.size(), b.size());
            let gap = (a.to_kind(Kind::Double) - &b).abs().max() / b.abs().max();
            seen.check("layer_norm autograd", gap.double_value(&[]), 2e-6);
        }
    }
    let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, device));
    let error = op::layer_norm(&zeros(&[2, 1025]), &zeros(&[1025]), &zeros(&[1025]), EPSILON).unwrap_err().to_string();
    assert!(error.contains("too long"), "{error}");
    let error = op::layer_norm(&zeros(&[2, 8]), &zeros(&[8]), &zeros(&[7]), EPSILON).unwrap_err().to_string();
    assert!(error.contains("bias"), "{error}");
}
