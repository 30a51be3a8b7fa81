//! The cases of the gated activation; see `cases.rs`.

use std::sync::Arc;

use rldiff::kernels::cuda::Machine;
use rldiff::kernels::geglu as op;
use tch::{Device, Kind, Tensor};

use super::cases::{normals, Buffer, Machines, Observed, Real};

/// Rows and width: packs that are not full, fewer than a block has and more, nothing at all.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 5), (7, 16), (130, 72), (0, 8), (2, 1280)];

fn of_libtorch(h: &Tensor) -> Tensor {
    let halves = h.chunk(2, -1);
    &halves[0] * halves[1].gelu("none")
}

fn run<T: Real>(machine: &Arc<dyn Machine>, h: &[f32], dy: &[f32], width: usize) -> [Vec<f32>; 2] {
    let upload = |v: &[f32]| Buffer::upload(machine, &v.iter().map(|&v| T::rounded(v)).collect::<Vec<T>>()).unwrap();
    let (h, dy) = (upload(h), upload(dy));
    let [y, dh] = [dy.slice().len(), h.slice().len()].map(|n| Buffer::new(machine, n, T::ELEMENT).unwrap());
    op::launch_forward(&**machine, h.slice(), y.slice(), width).unwrap();
    op::launch_backward(&**machine, h.slice(), dy.slice(), dh.slice(), width).unwrap();
    [y, dh].map(|b| b.download::<T>().unwrap().into_iter().map(T::value).collect())
}

/// Both passes against libtorch's operations in f64, with gates of up to 6 standard deviations. f32: an error of Φ of
/// 6e-8 times |a b| of up to 20, relative to the largest value: observed 1.1e-7; bf16 and f16 round the result.
pub fn both_passes<T: Real>(machines: &Machines, rounding: f64, seen: &mut Observed) {
    for (rows, width) in SHAPES {
        let rounded = |values: Vec<f32>| values.into_iter().map(|v| T::rounded(v).value()).collect::<Vec<f32>>();
        let h = rounded(normals(rows * 2 * width, 0).into_iter().map(|v| 1.5 * v).collect());
        let dy = rounded(normals(rows * width, 1));
        let [ours, again] = machines.each_ref().map(|machine| run::<T>(machine, &h, &dy, width));
        assert!(ours == again, "two runs differ: {rows}x{width}");
        let size = [rows as i64, 2 * width as i64];
        let leaf = Tensor::from_slice(&h).to_kind(Kind::Double).view(size).set_requires_grad(true);
        let y = of_libtorch(&leaf);
        let weights = Tensor::from_slice(&dy).to_kind(Kind::Double).view([rows as i64, width as i64]);
        (&y * weights).sum(Kind::Double).backward();
        let what =
            if rounding < 1e-6 { ["geglu y, f32", "geglu dh, f32"] } else { ["geglu y, 16 bits", "geglu dh, 16 bits"] };
        for ((ours, expected), what) in ours.iter().zip([y.detach(), leaf.grad()]).zip(what) {
            let expected = Vec::<f64>::try_from(expected.view([-1])).unwrap();
            let largest = expected.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
            assert_eq!(ours.len(), expected.len());
            let gap = ours.iter().zip(&expected).fold(0f64, |m, (&a, b)| m.max((f64::from(a) - b).abs()));
            seen.check(what, gap / largest, 1e-6 + rounding);
        }
    }
}

/// The differentiable operation against libtorch's in f64, and what it refuses.
pub fn autograd(machine: Arc<dyn Machine>, device: Device, seen: &mut Observed) {
    rldiff::kernels::install(machine.clone());
    let values = Tensor::from_slice(&normals(2 * 3 * 24, 2)).view([2, 3, 24]).to_device(device);
    let dy = Tensor::from_slice(&normals(2 * 3 * 12, 3)).view([2, 3, 12]).to_device(device);
    let [ours, oracle] = [Kind::Float, Kind::Double].map(|kind| values.to_kind(kind).detach().set_requires_grad(true));
    let y = op::geglu(&ours).unwrap();
    (&y * &dy).sum(Kind::Float).backward();
    let expected = of_libtorch(&oracle);
    (&expected * dy.to_kind(Kind::Double)).sum(Kind::Double).backward();
    for (a, b) in [(y.detach(), expected.detach()), (ours.grad(), oracle.grad())] {
        assert_eq!(a.size(), b.size());
        let gap = (a.to_kind(Kind::Double) - &b).abs().max() / b.abs().max();
        seen.check("geglu autograd", gap.double_value(&[]), 1e-6);
    }
    let error = op::geglu(&Tensor::zeros([2, 3], (Kind::Float, device))).unwrap_err().to_string();
    assert!(error.contains("[2, 3]"), "{error}");
    let slice = Buffer::upload(&machine, &[0f32; 6]).unwrap();
    let (h, y) = (slice.slice().part(0, 4), slice.slice().part(3, 2));
    let error = op::launch_forward(&*machine, h, y, 2).unwrap_err().to_string();
    assert!(error.contains("overlaps"), "{error}");
    assert!(op::launch_forward(&*machine, h, slice.slice().part(4, 2), 3).is_err());
}
