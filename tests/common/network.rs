//! A network of a few parameters whose gradients show every change in the order of their additions.

use rldiff::{
    comm::Communicator,
    kernels::FlatBuffer,
    models::{
        flat_parameters::FlatParameters,
        parameters::{Builder, Init, Source},
    },
    policy::{gradient_sum::GradientSum, lanes::Lanes},
};
use tch::{Device, Kind, Tensor};

pub const LANES: usize = 8;
/// Bytes: every parameter by itself, some together, one for all.
pub const BUCKETS: [usize; 4] = [1, 3000, 40_000, usize::MAX];

/// Some parameters of different sizes.
pub struct Network {
    pub leaves: Vec<Tensor>,
    pub params: FlatParameters,
}

impl Network {
    pub fn new(device: Device) -> Self {
        let builder = Builder::new(Source::Seeded(3), Kind::Float, device);
        let sizes: [&[i64]; 6] = [&[37, 41], &[5], &[300], &[64, 64], &[1], &[17, 3, 3, 3]];
        let make = |(i, shape): (usize, &&[i64])| builder.sub(i).parameter("weight", shape, Init::Normal(1.0)).unwrap();
        let leaves = sizes.iter().enumerate().map(make).collect();
        let (parameters, _) = builder.finish();
        Network { leaves, params: FlatParameters::new(&[&parameters]).unwrap() }
    }

    /// Its gradients are of very different size from lane to lane, so that the order of additions shows. Leaf 2 is not
    /// part of it, and leaf 4 in odd lanes only; leaf 0 is used twice.
    pub fn loss(&self, lane: usize) -> Tensor {
        let mut loss = Tensor::zeros([], (Kind::Float, self.params.device()));
        for (i, leaf) in self.leaves.iter().enumerate().filter(|(i, _)| *i != 2 && (*i != 4 || lane % 2 == 1)) {
            let factor = 10f64.powi((lane * 5 + i) as i32 % 7 - 3) * if lane % 3 == 0 { -1.0 } else { 1.0 };
            loss += ((leaf * (lane as f64 + 1.37)).sin() * factor).sum(Kind::Float);
        }
        loss + (self.leaves[0].square() * 0.1).sum(Kind::Float)
    }

    /// One lane's gradient by autograd's other way, as one flat vector, row-major.
    pub fn gradient(&self, lane: usize) -> Vec<f32> {
        // allow_unused is not among tch's arguments: ask for the used ones only
        let used = |i: &usize| *i != 2 && (*i != 4 || lane % 2 == 1);
        let indices: Vec<usize> = (0..self.leaves.len()).filter(used).collect();
        let wanted: Vec<&Tensor> = indices.iter().map(|&i| &self.leaves[i]).collect();
        let gradients = Tensor::run_backward(&[self.loss(lane)], &wanted, false, false);
        let flat = FlatBuffer::zeros(self.params.len(), self.params.device());
        for (&i, gradient) in indices.iter().zip(&gradients) {
            self.params.layout[i].put_gradient(gradient, &flat);
        }
        self.params.row_major(&flat).into_owned()
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// The sum of the gradients of all lanes, row-major; `sum` is for the network's parameters.
pub fn summed(network: &Network, mut sum: GradientSum, lanes: &Lanes, comm: &dyn Communicator) -> Vec<f32> {
    let mut once = || {
        let total = lanes.sum_gradients(&mut sum, comm, |lane| Ok(network.loss(lane))).unwrap();
        let values = network.params.row_major(&total).into_owned();
        sum.recycle(total);
        values
    };
    // the second sum takes over the buffers of the first
    let (first, second) = (once(), once());
    assert_eq!(bits(&first), bits(&second));
    first
}
