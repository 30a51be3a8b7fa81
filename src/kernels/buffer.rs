//! A flat f32 vector on the host or on a GPU: weights, moments, gradients.

use std::{borrow::Cow, ops::Range};

use tch::{Device, Kind, Tensor};

use crate::comm::Leaf;

/// A contiguous f32 vector that owns its memory. Nothing that autograd tracks.
#[derive(Debug)]
pub struct FlatBuffer {
    tensor: Tensor,
}

impl FlatBuffer {
    pub fn zeros(length: usize, device: Device) -> Self {
        FlatBuffer { tensor: Tensor::zeros([length as i64], (Kind::Float, device)) }
    }

    pub fn from_slice(values: &[f32], device: Device) -> Self {
        FlatBuffer { tensor: Tensor::from_slice(values).to_device(device) }
    }

    pub fn len(&self) -> usize {
        self.tensor.size()[0] as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn device(&self) -> Device {
        self.tensor.device()
    }

    /// The vector as a tensor that shares its memory.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// A part of it as a tensor that shares its memory.
    pub fn part(&self, range: Range<usize>) -> Tensor {
        self.tensor.narrow(0, range.start as i64, range.len() as i64)
    }

    /// Address of its first element, on its device.
    pub fn address(&self) -> u64 {
        self.tensor.data_ptr() as u64
    }

    /// The values on the host: borrowed where they lie there, else copied.
    pub fn host(&self) -> Cow<'_, [f32]> {
        match self.device() {
            Device::Cpu => Cow::Borrowed(self.slice()),
            _ => {
                let mut values = vec![0.0; self.len()];
                self.tensor.to_device(Device::Cpu).copy_data(&mut values, self.len());
                Cow::Owned(values)
            }
        }
    }

    /// The values of a vector on the host. Panics for one on a GPU.
    pub fn slice(&self) -> &[f32] {
        assert_eq!(self.device(), Device::Cpu, "the values are not on the host");
        if self.is_empty() {
            return &[];
        }
        // SAFETY: a contiguous f32 CPU tensor of `len` scalars that lives as long as self.
        unsafe { std::slice::from_raw_parts(self.tensor.data_ptr() as *const f32, self.len()) }
    }

    /// As [`FlatBuffer::slice`], to write to. No libtorch operation on it may run meanwhile.
    pub fn slice_mut(&mut self) -> &mut [f32] {
        assert_eq!(self.device(), Device::Cpu, "the values are not on the host");
        if self.is_empty() {
            return &mut [];
        }
        // SAFETY: as in `slice`; &mut self keeps other Rust views away.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr() as *mut f32, self.len()) }
    }

    /// Whether all values are finite numbers; piece by piece, since libtorch makes several masks of what it looks at.
    pub fn is_finite(&self) -> bool {
        const PIECE: i64 = 1 << 24;
        let finite = |piece: &Tensor| piece.isfinite().all();
        let pieces: Vec<Tensor> = self.tensor.split(PIECE, 0).iter().map(finite).collect();
        Tensor::stack(&pieces, 0).all().int64_value(&[]) != 0
    }

    /// Takes over the values of a host slice of the same length.
    pub fn copy_from_slice(&mut self, values: &[f32]) {
        assert_eq!(values.len(), self.len(), "a vector of another length");
        match self.device() {
            Device::Cpu => self.slice_mut().copy_from_slice(values),
            _ => tch::no_grad(|| self.tensor.copy_(&Tensor::from_slice(values))),
        }
    }

    /// Takes over the values of another vector of the same length, wherever it lies.
    pub fn copy_from(&mut self, other: &FlatBuffer) {
        assert_eq!(other.len(), self.len(), "a vector of another length");
        tch::no_grad(|| self.tensor.copy_(&other.tensor));
    }
}

impl Clone for FlatBuffer {
    fn clone(&self) -> Self {
        FlatBuffer { tensor: self.tensor.copy() }
    }
}

/// The sums of gradients over lanes: f32 additions, on the host the same bits as those of slices.
impl Leaf for FlatBuffer {
    fn length(&self) -> usize {
        self.len()
    }

    fn clear(&mut self) {
        let _ = self.tensor.zero_();
    }

    fn add_right(&mut self, right: &Self, range: Range<usize>) {
        let _ = self.part(range.clone()).g_add_(&right.part(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::{tree_sum, TreeSum},
        models::allocations::Allocations,
    };

    #[test]
    fn tensors_sum_to_the_bits_of_slices() {
        let leaf = |lane: usize| -> Vec<f32> {
            (0..1003).map(|i| ((i * 31 + lane * 17) as f32).sin() * 10f32.powi(((i + lane) % 9) as i32 - 4)).collect()
        };
        for lanes in 1..8 {
            let leaves: Vec<Vec<f32>> = (0..lanes).map(leaf).collect();
            let mut sum = TreeSum::of(|| FlatBuffer::zeros(1003, Device::Cpu));
            for values in &leaves {
                let mut lane = sum.buffer();
                lane.copy_from_slice(values);
                sum.push(lane);
            }
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(sum.finish().slice()), bits(&tree_sum(&leaves)), "{lanes} lanes");
        }
    }

    #[test]
    fn values_go_in_and_out() {
        let mut buffer = FlatBuffer::from_slice(&[1.0, 2.0, 3.0], Device::Cpu);
        let before = buffer.clone();
        buffer.copy_from_slice(&[4.0, 5.0, 6.0]);
        assert_eq!((&*buffer.host(), before.slice()), (&[4.0f32, 5.0, 6.0][..], &[1.0f32, 2.0, 3.0][..]));
        assert_eq!(buffer.part(1..3).double_value(&[1]), 6.0);
        assert!(FlatBuffer::zeros(0, Device::Cpu).slice().is_empty());
        assert!(buffer.is_finite() && FlatBuffer::zeros(0, Device::Cpu).is_finite());
    }

    /// One mask of SD2's weights would be a gigabyte, and libtorch makes several.
    #[test]
    fn one_bad_value_is_found_without_masks_of_the_whole() {
        for (at, bad) in [(0, f32::NAN), ((1 << 24) + 5, f32::INFINITY), ((5 << 24) - 1, f32::NEG_INFINITY)] {
            let mut buffer = FlatBuffer::zeros(5 << 24, Device::Cpu);
            let count = Allocations::begin();
            assert!(buffer.is_finite());
            assert!(count.peak() <= 16 << 24, "{} bytes", count.peak());
            buffer.slice_mut()[at] = bad;
            assert!(!buffer.is_finite(), "{bad} at {at}");
        }
    }
}
