//! The trainable parameters of a network as one flat f32 buffer: what the optimizer, the ranks and the checkpoints see.

use std::{collections::BTreeMap, ops::Range};

use anyhow::{ensure, Result};
use tch::{Device, Kind, Tensor};

use super::parameters::{Parameter, Parameters};
use crate::kernels::FlatBuffer;

/// Every parameter starts at a multiple of this many scalars (64 bytes of f32), so that the kernels of the CPU
/// libraries see the same alignment as in a tensor of its own.
const ALIGN: usize = 16;

/// Order of a parameter's scalars in the flat buffer: that of the tensor the network computes with, so that both are the
/// same stretch of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    RowMajor,
    /// `[N, C, H, W]` stored as `[N, H, W, C]`: kernels of convolutions on a GPU.
    ChannelsLast,
}

impl Order {
    fn of(tensor: &Tensor) -> Self {
        match (&tensor.size()[..], &tensor.stride()[..]) {
            (&[_, c, h, w], strides) if strides == [h * w * c, 1, w * c, c] => Order::ChannelsLast,
            _ => Order::RowMajor,
        }
    }
}

/// One entry of the flat buffer's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutEntry {
    pub name: String,
    pub shape: Vec<i64>,
    /// First scalar in the flat buffer.
    pub offset: usize,
    order: Order,
}

impl LayoutEntry {
    /// An entry in row-major order.
    pub fn new(name: impl Into<String>, shape: &[i64], offset: usize) -> Self {
        LayoutEntry { name: name.into(), shape: shape.to_vec(), offset, order: Order::RowMajor }
    }

    /// Its scalars in the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.shape.iter().product::<i64>() as usize
    }

    /// Whether its scalars lie in another order than row-major.
    pub(super) fn is_permuted(&self) -> bool {
        self.order != Order::RowMajor
    }

    /// Its part of `flat`, of its shape; shares the memory.
    pub fn of(&self, flat: &FlatBuffer) -> Tensor {
        let part = flat.part(self.range());
        match (self.order, &self.shape[..]) {
            (Order::ChannelsLast, &[n, c, h, w]) => part.view([n, h, w, c]).permute([0, 3, 1, 2]),
            _ => part.view(&self.shape[..]),
        }
    }

    /// Copies a gradient into its place in `out`.
    pub fn put_gradient(&self, gradient: &Tensor, out: &FlatBuffer) {
        tch::no_grad(|| self.of(out).copy_(gradient));
    }
}

/// The trainable parameters of a network as one flat f32 buffer. A network that computes in f32 has views of the
/// buffer as its tensors; one that computes in bf16 has rounded copies, which [`FlatParameters::publish`] renews. Gaps
/// between parameters hold zeros.
///
/// On a GPU the kernels of convolutions lie in the buffer as the network wants them, channels-last. What leaves the GPU is
/// row-major: [`FlatParameters::row_major`] and [`FlatParameters::with_row_major`].
pub struct FlatParameters {
    flat: FlatBuffer,
    pub layout: Vec<LayoutEntry>,
    leaves: Vec<Tensor>,
}

impl FlatParameters {
    /// Moves the parameters of one or more networks into one buffer and makes them leaves that require a gradient.
    /// f32 or bf16, all on one device: the buffer lies there too. It starts from the values that the networks' sources
    /// gave, not from those of a bf16 network, and the parameters let go of them.
    pub fn new(networks: &[&Parameters]) -> Result<Self> {
        let entries: Vec<&Parameter> = networks.iter().flat_map(|n| &n.entries).collect();
        let device = entries.first().map_or(Device::Cpu, |p| p.tensor.device());
        let mut layout = Vec::new();
        let mut end = 0usize;
        for p in &entries {
            ensure!(
                matches!(p.tensor.kind(), Kind::Float | Kind::BFloat16),
                "parameter {} is {:?}, training wants f32 or bf16",
                p.name,
                p.tensor.kind()
            );
            ensure!(p.tensor.device() == device, "parameter {} is not on {device:?}", p.name);
            let entry = LayoutEntry { order: Order::of(&p.tensor), ..LayoutEntry::new(&p.name, &p.shape, end) };
            end = entry.range().end.next_multiple_of(ALIGN);
            layout.push(entry);
        }
        let flat = FlatBuffer::zeros(end, device);
        let mut leaves = Vec::new();
        for (entry, p) in layout.iter().zip(&entries) {
            let mut view = entry.of(&flat).detach();
            tch::no_grad(|| view.copy_(&p.exact()));
            p.forget_given();
            let mut leaf = p.tensor.shallow_clone();
            if leaf.kind() == Kind::Float {
                leaf.set_data(&view);
            } else if entry.order == Order::RowMajor {
                leaf.set_data(&leaf.contiguous());
            }
            leaves.push(leaf.set_requires_grad(true));
        }
        Ok(FlatParameters { flat, layout, leaves })
    }

    /// Scalars in the buffer, the gaps included.
    pub fn len(&self) -> usize {
        self.flat.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The network's tensors, leaves of the autograd graph, in layout order.
    pub fn leaves(&self) -> &[Tensor] {
        &self.leaves
    }

    /// Makes a bf16 network see what was written to the buffer; an f32 network sees it anyway.
    pub fn publish(&self) {
        tch::no_grad(|| {
            for (entry, leaf) in self.layout.iter().zip(&self.leaves).filter(|(_, leaf)| is_rounded(leaf)) {
                leaf.shallow_clone().copy_(&entry.of(&self.flat));
            }
        });
    }

    pub fn device(&self) -> Device {
        self.flat.device()
    }

    pub fn buffer(&self) -> &FlatBuffer {
        &self.flat
    }

    /// The buffer to write to; call [`FlatParameters::publish`] afterwards. Autograd does not notice a change, so no
    /// graph may be alive across a write.
    pub fn buffer_mut(&mut self) -> &mut FlatBuffer {
        &mut self.flat
    }

    /// The buffer and its rounded copies, for whoever writes both: every bf16 leaf with its range of the buffer, in layout
    /// order. The scalars of a leaf follow each other in memory as those of its range.
    pub fn buffer_and_copies(&mut self) -> (&mut FlatBuffer, Vec<(Range<usize>, &Tensor)>) {
        let pairs = self.layout.iter().zip(&self.leaves);
        let rounded = pairs.filter(|(_, leaf)| is_rounded(leaf)).map(|(entry, leaf)| (entry.range(), leaf));
        (&mut self.flat, rounded.collect())
    }

    /// Every parameter as a tensor of its own on the host, with the values of `vector` (weights or an average of them).
    pub fn unflatten(&self, vector: &FlatBuffer) -> BTreeMap<String, Tensor> {
        let flat = self.row_major(vector);
        let tensor_of = |entry: &LayoutEntry| Tensor::from_slice(&flat[entry.range()]).view(&entry.shape[..]);
        self.layout.iter().map(|entry| (entry.name.clone(), tensor_of(entry))).collect()
    }
}

/// A leaf that is a copy of its part of the buffer, not a view.
fn is_rounded(leaf: &Tensor) -> bool {
    leaf.kind() != Kind::Float
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{
        layers::channels_last,
        parameters::{Builder, Init, Source},
    };

    fn gradients_in(flat: &FlatParameters, gradients: &[Tensor]) -> Vec<f32> {
        let out = FlatBuffer::zeros(flat.len(), Device::Cpu);
        let entries = flat.layout.iter().zip(gradients);
        entries.for_each(|(entry, gradient)| entry.put_gradient(gradient, &out));
        out.host().into_owned()
    }

    #[test]
    fn the_flat_buffer_is_the_network() {
        let builder = Builder::new(Source::Seeded(1), Kind::Float, Device::Cpu);
        let w = builder.sub("a").parameter("weight", &[3, 5], Init::Uniform(1.0)).unwrap();
        let b = builder.parameter("bias", &[3], Init::Ones).unwrap();
        let before = w.copy();
        let (parameters, _) = builder.finish();
        let mut flat = FlatParameters::new(&[&parameters]).unwrap();
        assert_eq!(w, before);
        assert_eq!(flat.layout[1].offset, 16);
        flat.buffer_mut().slice_mut()[16..19].copy_from_slice(&[1.0, 2.0, 3.0]);
        assert_eq!(Vec::<f32>::try_from(&b).unwrap(), [1.0, 2.0, 3.0]);

        let loss = (w.sum(Kind::Float) * 2.0) + (&b * &b).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], flat.leaves(), false, false);
        let out = gradients_in(&flat, &gradients);
        assert_eq!(out[..15], [2.0; 15]);
        assert_eq!(out[16..19], [2.0, 4.0, 6.0]);
        assert_eq!(flat.unflatten(flat.buffer())["a.weight"], before);
    }

    /// Masters that begin as rounded weights lose up to 2^-9 of each: dozens of steps at the paper's learning rate.
    #[test]
    fn the_masters_of_a_bf16_network_start_from_the_weights_before_rounding() {
        let given = Tensor::from_slice(&[0.020_123_4f32, -1.000_9, -0.0]);
        let source = || Source::Tensors(BTreeMap::from([("weight".to_string(), given.copy())]));
        for kind in [Kind::Float, Kind::BFloat16] {
            let builder = Builder::new(source(), kind, Device::Cpu);
            let w = builder.parameter("weight", &[3], Init::Ones).unwrap();
            let (parameters, _) = builder.finish();
            let flat = FlatParameters::new(&[&parameters]).unwrap();
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&flat.buffer().slice()[..3]), bits(&Vec::<f32>::try_from(&given).unwrap()), "{kind:?}");
            flat.publish();
            assert_eq!(w, given.to_kind(kind));
        }
    }

    #[test]
    fn a_bf16_network_follows_its_f32_buffer() {
        let builder = Builder::new(Source::Seeded(1), Kind::BFloat16, Device::Cpu);
        let w = builder.parameter("weight", &[2], Init::Ones).unwrap();
        let (parameters, _) = builder.finish();
        let mut flat = FlatParameters::new(&[&parameters]).unwrap();
        flat.buffer_mut().slice_mut()[..2].copy_from_slice(&[1.001, 3.0]);
        flat.publish();
        // 1.001 rounds to 1 in bf16, and the buffer keeps it
        assert_eq!(Vec::<f32>::try_from(w.to_kind(Kind::Float)).unwrap(), [1.0, 3.0]);
        assert_eq!(flat.buffer().slice()[..2], [1.001, 3.0]);
        let loss = (&w * &w).sum(Kind::Float);
        let out = gradients_in(&flat, &Tensor::run_backward(&[loss], flat.leaves(), false, false));
        assert_eq!(out[..2], [2.0, 6.0]);
    }

    /// What a GPU makes of a convolution, here on the CPU.
    #[test]
    fn channels_last_parameters_lie_in_the_buffer_as_the_network_wants_them() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let numbered = Tensor::arange(2 * 3 * 2 * 2, (Kind::Float, Device::Cpu)).view([2, 3, 2, 2]);
            let kernel = channels_last(&numbered).to_kind(kind);
            let bias = Tensor::from_slice(&[7f32, 8.0]).to_kind(kind);
            let entries = vec![Parameter::new("kernel", &kernel), Parameter::new("bias", &bias)];
            let mut flat = FlatParameters::new(&[&Parameters { entries }]).unwrap();
            assert_eq!(flat.leaves()[0].stride(), [12, 1, 6, 3], "{kind:?}");
            // the channels of the first pixel, then those of the next
            assert_eq!(flat.buffer().slice()[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
            let in_order: Vec<f32> = (0..24).map(|i| i as f32).collect();
            let row_major = flat.row_major(flat.buffer()).into_owned();
            assert_eq!(row_major[..24], in_order);
            assert_eq!((row_major[32], row_major[33]), (7.0, 8.0));
            let again = flat.with_row_major(&row_major);
            assert_eq!(again.slice(), flat.buffer().slice());
            assert_eq!(flat.unflatten(flat.buffer())["kernel"], numbered);

            // a copy that is written in memory order is what publish() writes
            let doubled: Vec<f32> = row_major.iter().map(|v| v * 2.0).collect();
            let doubled = flat.with_row_major(&doubled);
            flat.buffer_mut().copy_from(&doubled);
            flat.publish();
            assert_eq!(kernel.to_kind(Kind::Float), &numbered * 2.0);
            let (buffer, copies) = flat.buffer_and_copies();
            assert_eq!(copies.len(), if kind == Kind::Float { 0 } else { 2 });
            for (range, leaf) in copies {
                let in_memory = leaf.as_strided([range.len() as i64], [1], None::<i64>).to_kind(Kind::Float);
                assert_eq!(in_memory, buffer.part(range));
            }

            let slope = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([2, 3, 2, 2]);
            let out = gradients_in(&flat, &[slope.shallow_clone(), Tensor::ones([2], (Kind::Float, Device::Cpu))]);
            assert_eq!(out[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
        }
    }
}
