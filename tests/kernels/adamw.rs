//! The cases of AdamW and of the gradient's norm; see `cases.rs`.

use half::bf16;
use rldiff::kernels::adamw::{self, AdamW, Piece, Table};
use rldiff::kernels::cuda::Element;
use rldiff::kernels::on_device::{Stepped, Stepper};
use rldiff::kernels::FlatBuffer;
use rldiff::models::allocations::Allocations;
use rldiff::models::flat_parameters::FlatParameters;
use rldiff::models::layers::channels_last;
use rldiff::models::parameters::{Parameter, Parameters};
use tch::{Device, Kind, Tensor};

use super::cases::{f32_bits, normals, on_all, rounded, values, Machines, Observed, Placed, Real};

pub fn steps<T: Real>(machines: &Machines, seen: &mut Observed) {
    const SETTINGS: AdamW = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 };
    // (length, elements behind an aligned address, with a bf16 copy)
    let pieces = [
        (1, 0, true),
        (3, 1, false),
        (4095, 0, true),
        (0, 0, true),
        (4096, 0, true),
        (4097, 0, false),
        (10_001, 3, true),
    ];
    let total: usize = pieces.iter().map(|&(length, ..)| length).sum();
    let start = normals(total, 0);
    let gradients: Vec<Vec<T>> = (1..4).map(|k| rounded(&normals(total, k))).collect();
    let cut = |values: &[f32]| {
        let mut rest = values;
        pieces.map(|(length, ..)| {
            let (piece, tail) = rest.split_at(length);
            rest = tail;
            piece.to_vec()
        })
    };

    let (mut params, mut m, mut v) = (start.clone(), vec![0.0; total], vec![0.0; total]);
    for (k, gradient) in gradients.iter().enumerate() {
        adamw::reference(&mut params, &values(gradient), &mut m, &mut v, &SETTINGS, k as u64 + 1, 0.37).unwrap();
    }
    let squares = adamw::sum_of_squares(&values(&gradients[2]));
    type Run = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<Vec<bf16>>, f64);
    let bits = |(p, m, v, copies, squares): &Run| {
        let mut bits: Vec<u32> = [p, m, v].into_iter().flat_map(|values| f32_bits(values)).collect();
        bits.extend(copies.concat().iter().map(|c| u32::from(c.to_bits())));
        bits.extend([squares.to_bits() as u32, (squares.to_bits() >> 32) as u32]);
        bits
    };
    let ours: Run = on_all(machines, bits, |machine| {
        let place = |values: &[f32]| {
            let parts = cut(values);
            pieces.iter().zip(&parts).map(|(p, part)| Placed::new(machine, part, p.1)).collect::<Vec<_>>()
        };
        let state = [start.clone(), vec![0.0; total], vec![0.0; total]].map(|values| place(&values));
        let copies: Vec<Placed> = pieces.iter().map(|p| Placed::empty(machine, p.0, Element::Bf16, p.1)).collect();
        let mut squares = 0.0;
        for (k, gradient) in gradients.iter().enumerate() {
            let parts = cut(&values(gradient));
            let grads: Vec<Placed> =
                pieces.iter().zip(&parts).map(|(p, part)| Placed::new(machine, &rounded::<T>(part), p.1)).collect();
            let table: Vec<Piece> = (0..pieces.len())
                .map(|i| Piece {
                    param: state[0][i].slice(),
                    grad: grads[i].slice(),
                    exp_avg: state[1][i].slice(),
                    exp_avg_sq: state[2][i].slice(),
                    copy: pieces[i].2.then(|| copies[i].slice()),
                })
                .collect();
            let table = Table::new(machine, &table).unwrap();
            squares = table.sum_of_squares().unwrap();
            table.step(&SETTINGS, k as u64 + 1, 0.37).unwrap();
        }
        let [p, m, v] = state.map(|parts| parts.iter().flat_map(Placed::download::<f32>).collect::<Vec<f32>>());
        let with_copy = copies.iter().zip(pieces).filter(|(_, piece)| piece.2);
        (p, m, v, with_copy.map(|(copy, _)| copy.download()).collect(), squares)
    });
    // element by element in the order of the reference
    assert_eq!(f32_bits(&ours.0), f32_bits(&params));
    assert_eq!(f32_bits(&ours.1), f32_bits(&m));
    assert_eq!(f32_bits(&ours.2), f32_bits(&v));
    let copied = cut(&ours.0);
    let expected = copied.iter().zip(pieces).filter(|(_, piece)| piece.2).map(|(part, _)| rounded::<bf16>(part));
    assert_eq!(ours.3, expected.collect::<Vec<_>>());
    // both in f64, in another order: observed 2e-15
    seen.check("sum of squares, relative", (ours.4 / squares - 1.0).abs(), 1e-13);

    let nothing = Table::new(&machines[0], &[]).unwrap();
    nothing.step(&SETTINGS, 1, 1.0).unwrap();
    assert_eq!(nothing.sum_of_squares().unwrap(), 0.0);
    assert!(nothing.step(&SETTINGS, 0, 1.0).is_err());
}

/// A gradient that is not finite shows in the norm.
pub fn norm_shows_what_is_not_finite(machines: &Machines) {
    for bad in [f32::NAN, f32::INFINITY] {
        let machine = &machines[0];
        let mut grads = vec![0.5f32; 5000];
        grads[4999] = bad;
        let [param, m, v] = [0, 1, 2].map(|_| Placed::new(machine, &[0f32; 5000], 0));
        let grad = Placed::new(machine, &grads, 0);
        let piece =
            Piece { param: param.slice(), grad: grad.slice(), exp_avg: m.slice(), exp_avg_sq: v.slice(), copy: None };
        assert!(!Table::new(machine, &[piece]).unwrap().sum_of_squares().unwrap().is_finite());
    }
}

/// A bf16 network on `device` follows the step of its parameters, its channels-last kernel too: the bits of the host.
pub fn the_network_follows(machines: &Machines, device: Device) {
    let settings = AdamW { learning_rate: 1e-2, ..AdamW::default() };
    // the second and the third leave gaps behind them
    let shapes: [&[i64]; 4] = [&[24, 40, 3, 3], &[7], &[33, 9, 1, 1], &[64, 48]];
    let tensors: Vec<Tensor> = (0u32..)
        .zip(shapes)
        .map(|(i, shape)| {
            let values = normals(shape.iter().product::<i64>() as usize, 40 + i);
            Tensor::from_slice(&values).view(shape).to_kind(Kind::BFloat16)
        })
        .collect();
    // weights, both moments and the network's tensors, all in row-major order
    type State = (Vec<f32>, Vec<f32>, Vec<f32>, Vec<Tensor>);
    type Step<'s> = &'s mut dyn FnMut(Stepped, u64);
    let stepped = |device: Device, order: fn(&Tensor) -> Tensor, step: Step| -> State {
        let placed = |i: usize| {
            let own = tensors[i].to_device(device).copy();
            if own.dim() == 4 {
                order(&own)
            } else {
                own
            }
        };
        let parameter = |i: usize| Parameter::new(i.to_string(), &placed(i));
        let entries = (0..4).map(parameter).collect();
        let mut params = FlatParameters::new(&[&Parameters { entries }]).unwrap();
        let mut moments = [0, 1].map(|_| FlatBuffer::zeros(params.len(), device));
        for k in 1..4 {
            let mut grads = FlatBuffer::zeros(params.len(), Device::Cpu);
            for (i, entry) in (0..).zip(&params.layout) {
                grads.slice_mut()[entry.range()].copy_from_slice(&normals(entry.range().len(), 50 + 10 * k + i));
            }
            let grads = params.with_row_major(grads.slice());
            let [exp_avg, exp_avg_sq] = &mut moments;
            let (buffer, copies) = params.buffer_and_copies();
            step(Stepped { params: buffer, copies: &copies, grads: &grads, exp_avg, exp_avg_sq }, u64::from(k));
        }
        let host = |vector: &FlatBuffer| params.row_major(vector).into_owned();
        let leaves = params.leaves().iter().map(|leaf| leaf.detach().to_device(Device::Cpu).contiguous());
        (host(params.buffer()), host(&moments[0]), host(&moments[1]), leaves.collect())
    };
    let mut plain = Stepper::default();
    let on_host = stepped(Device::Cpu, Tensor::copy, &mut |stepped, k| plain.step(stepped, &settings, k, 0.7).unwrap());
    assert!(on_host.3.iter().zip(&tensors).all(|(after, before)| after != before), "a tensor did not move");
    let mut stepper = Stepper::default();
    for machine in machines {
        // a table for every set of vectors, kept as long as they are there; the gradient lies elsewhere each time
        let mut gradients = Vec::new();
        let mut by_kernel = |stepped: Stepped, k: u64| {
            gradients.push(stepped.grads.clone());
            let Stepped { params, copies, exp_avg, exp_avg_sq, .. } = stepped;
            let grads = gradients.last().unwrap();
            let count = Allocations::begin();
            let stepped = Stepped { params, copies, grads, exp_avg, exp_avg_sq };
            let norm = stepper.gradient_norm_by(machine, &stepped).unwrap();
            stepper.step_by(machine, stepped, &settings, k, 0.7).unwrap();
            let (made, expected) = (count.made(device), if k == 1 { 3 } else { 0 });
            println!("step {k}: {made} allocations");
            assert_eq!(made, expected, "allocations of step {k}");
            let host = Vec::<f32>::try_from(grads.tensor().to_device(Device::Cpu)).unwrap();
            assert!((norm / adamw::global_norm(&host) - 1.0).abs() < 1e-12);
        };
        let ours = stepped(device, channels_last, &mut by_kernel);
        assert!(f32_bits(&ours.0) == f32_bits(&on_host.0), "weights");
        assert!(f32_bits(&ours.1) == f32_bits(&on_host.1), "first moments");
        assert!(f32_bits(&ours.2) == f32_bits(&on_host.2), "second moments");
        assert!(ours.3 == on_host.3, "the network's tensors");
    }
}
