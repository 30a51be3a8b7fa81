//! The cases of AdamW and of the gradient's norm; see `cases.rs`.

use half::bf16;
use rldiff::kernels::adamw::{self, AdamW, Piece, Table};
use rldiff::kernels::cuda::Element;

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
