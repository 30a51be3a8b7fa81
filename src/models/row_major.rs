//! Vectors like a network's flat buffer as they leave the device and come to it: every parameter in row-major order,
//! whatever its order in memory. Any range can go by itself, and only that is copied; a GPU sends it through page-locked
//! memory, in pieces.

use std::{borrow::Cow, ops::Range};

use tch::{Device, Kind, Tensor};

use super::flat_parameters::{FlatParameters, LayoutEntry};
use crate::kernels::FlatBuffer;

/// Scalars that are under way at once between a GPU and the host: 16 MiB.
const PIECE: usize = 1 << 22;

/// A stretch of a vector, in row-major order.
enum Stretch<'a> {
    /// Scalars that follow each other in memory as well.
    AsItLies(Range<usize>),
    /// Some of a parameter whose order in memory is another.
    Of(&'a LayoutEntry, Range<usize>),
}

impl FlatParameters {
    /// A vector like the buffer on the host, every parameter in row-major order: what checkpoints hold. Borrowed where it
    /// lies there so.
    pub fn row_major<'a>(&self, vector: &'a FlatBuffer) -> Cow<'a, [f32]> {
        match vector.device() {
            Device::Cpu if !self.is_permuted() => Cow::Borrowed(vector.slice()),
            _ => Cow::Owned(self.read_row_major(vector, 0..vector.len())),
        }
    }

    /// The scalars `range` of [`FlatParameters::row_major`] on the host; no others are copied to it.
    pub fn read_row_major(&self, vector: &FlatBuffer, range: Range<usize>) -> Vec<f32> {
        let mut values = vec![0f32; range.len()];
        let device = vector.device();
        let locked = |length: usize| Tensor::zeros([length as i64], (Kind::Float, Device::Cpu)).pin_memory(device);
        let staging = (device != Device::Cpu && !range.is_empty()).then(|| locked(range.len().min(PIECE)));
        for (at, out) in (range.start..range.end).step_by(PIECE).zip(values.chunks_mut(PIECE)) {
            let gathered = self.gather(vector, at..at + out.len());
            let on_host = match &staging {
                Some(staging) => {
                    let mut part = staging.narrow(0, 0, out.len() as i64);
                    tch::no_grad(|| part.copy_(&gathered));
                    part
                }
                None => gathered,
            };
            on_host.copy_data(out, out.len());
            moved::note(size_of_val(out));
        }
        values
    }

    /// A vector like the buffer, on its device, from all of its scalars in row-major order: the reverse of
    /// [`FlatParameters::row_major`].
    ///
    /// # Panics
    /// `values` are not as many as the buffer's.
    pub fn with_row_major(&self, values: &[f32]) -> FlatBuffer {
        assert_eq!(values.len(), self.len(), "a vector of another length");
        let vector = FlatBuffer::zeros(values.len(), self.device());
        for (piece, values) in values.chunks(PIECE).enumerate() {
            self.write_row_major(&vector, piece * PIECE, values);
        }
        vector
    }

    /// Writes to a vector like the buffer what [`FlatParameters::read_row_major`] reads from it: the scalars from `at` on.
    pub fn write_row_major(&self, vector: &FlatBuffer, at: usize, values: &[f32]) {
        let piece = Tensor::from_slice(values).to_device(vector.device());
        self.each_block(vector, at..at + values.len(), &mut |block, at| {
            let of_block = piece.narrow(0, at, block.numel() as i64).view(&block.size()[..]);
            tch::no_grad(|| block.shallow_clone().copy_(&of_block));
        });
    }

    /// A range in row-major order as a flat tensor on the vector's device; shares its memory where it can.
    fn gather(&self, vector: &FlatBuffer, range: Range<usize>) -> Tensor {
        if let [Stretch::AsItLies(all)] = &self.stretches(range.clone())[..] {
            return vector.part(all.clone());
        }
        let piece = Tensor::zeros([range.len() as i64], (Kind::Float, vector.device()));
        self.each_block(vector, range, &mut |block, at| {
            let mut of_block = piece.narrow(0, at, block.numel() as i64).view(&block.size()[..]);
            tch::no_grad(|| of_block.copy_(block));
        });
        piece
    }

    /// Gives `act` blocks of the vector that together are `range`, each of any shape and order in memory, with its place in
    /// the range: there its scalars lie in row-major order.
    fn each_block(&self, vector: &FlatBuffer, range: Range<usize>, act: &mut dyn FnMut(&Tensor, i64)) {
        let mut at = 0;
        for stretch in self.stretches(range) {
            match stretch {
                Stretch::AsItLies(part) => {
                    act(&vector.part(part.clone()), at);
                    at += part.len() as i64;
                }
                Stretch::Of(entry, part) => {
                    let (begin, end) = (part.start as i64, part.end as i64);
                    blocks(&entry.of(vector), begin..end, at, act);
                    at += end - begin;
                }
            }
        }
    }

    fn stretches(&self, range: Range<usize>) -> Vec<Stretch<'_>> {
        let (mut stretches, mut done) = (Vec::new(), range.start);
        let permuted = self.layout.iter().filter(|entry| entry.is_permuted());
        for entry in permuted {
            let whole = entry.range();
            let part = whole.start.max(range.start)..whole.end.min(range.end);
            if part.is_empty() {
                continue;
            }
            if done < part.start {
                stretches.push(Stretch::AsItLies(done..part.start));
            }
            done = part.end;
            stretches.push(Stretch::Of(entry, part.start - whole.start..part.end - whole.start));
        }
        if done < range.end {
            stretches.push(Stretch::AsItLies(done..range.end));
        }
        stretches
    }

    fn is_permuted(&self) -> bool {
        self.layout.iter().any(LayoutEntry::is_permuted)
    }
}

/// Cuts the scalars `range` of `view`, counted in row-major order, into blocks: rows of the first dimension where they are
/// whole, and blocks of what is left of the first and the last.
fn blocks(view: &Tensor, range: Range<i64>, at: i64, act: &mut dyn FnMut(&Tensor, i64)) {
    if range.is_empty() {
        return;
    }
    let all = view.numel() as i64;
    if range == (0..all) {
        return act(view, at);
    }
    let row = all / view.size()[0];
    let of_row = |index: i64, part: Range<i64>, at: i64, act: &mut dyn FnMut(&Tensor, i64)| {
        blocks(&view.select(0, index), part, at, act);
    };
    let (first, last) = (range.start / row, (range.end - 1) / row);
    if first == last {
        return of_row(first, range.start - first * row..range.end - first * row, at, act);
    }
    let whole = (range.start + row - 1) / row..range.end / row;
    if first < whole.start {
        of_row(first, range.start - first * row..row, at, act);
    }
    if !whole.is_empty() {
        act(&view.narrow(0, whole.start, whole.end - whole.start), at + whole.start * row - range.start);
    }
    if whole.end == last {
        of_row(last, 0..range.end - last * row, at + last * row - range.start, act);
    }
}

/// Bytes that this thread has copied to the host, for tests of how many they are.
pub(crate) mod moved {
    #[cfg(test)]
    use std::cell::Cell;

    #[cfg(test)]
    thread_local! {
        static BYTES: Cell<usize> = const { Cell::new(0) };
    }

    pub(crate) fn note(_bytes: usize) {
        #[cfg(test)]
        BYTES.set(BYTES.get() + _bytes);
    }

    /// Of `work`.
    #[cfg(test)]
    pub(crate) fn during<T>(work: impl FnOnce() -> T) -> (usize, T) {
        let before = BYTES.get();
        let made = work();
        (BYTES.get() - before, made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::{
        layers::channels_last,
        parameters::{Parameter, Parameters},
    };

    /// Convolutions as a GPU wants them between parameters that lie as they are, and a scalar.
    pub(super) fn mixed() -> FlatParameters {
        let entry = |name: &str, shape: &[i64], permuted: bool| {
            let count: i64 = shape.iter().product();
            let tensor = Tensor::arange(count, (Kind::Float, Device::Cpu)).view(shape) + 0.5;
            let tensor = if permuted { channels_last(&tensor) } else { tensor };
            Parameter::new(name, &tensor)
        };
        let entries = vec![
            entry("linear", &[3, 5], false),
            entry("conv", &[4, 3, 3, 2], true),
            entry("bias", &[7], false),
            entry("one", &[], false),
            entry("conv 2", &[2, 5, 1, 3], true),
            entry("conv 3", &[3, 2, 2, 2], true),
        ];
        FlatParameters::new(&[&Parameters { entries }]).unwrap()
    }

    /// As the name says, by another way: each parameter as a whole.
    fn whole(params: &FlatParameters, vector: &FlatBuffer) -> Vec<f32> {
        let mut values = vec![0f32; vector.len()];
        for entry in &params.layout {
            let of_entry = entry.of(vector).contiguous().view([-1]);
            of_entry.copy_data(&mut values[entry.range()], entry.range().len());
        }
        values
    }

    #[test]
    fn every_range_is_read_and_written_in_row_major_order() {
        let params = mixed();
        let all = whole(&params, params.buffer());
        assert_eq!(params.row_major(params.buffer()), all);
        assert_ne!(params.buffer().slice(), all, "nothing lies in another order");
        for begin in 0..all.len() {
            for end in begin..=all.len() {
                assert_eq!(params.read_row_major(params.buffer(), begin..end), all[begin..end], "{begin}..{end}");
            }
        }
        for step in [1, 3, 16, 37, all.len()] {
            let vector = FlatBuffer::zeros(params.len(), Device::Cpu);
            for (piece, values) in all.chunks(step).enumerate() {
                params.write_row_major(&vector, piece * step, values);
            }
            assert_eq!(vector.slice(), params.buffer().slice(), "pieces of {step}");
        }
        assert_eq!(params.with_row_major(&all).slice(), params.buffer().slice());
    }
}
