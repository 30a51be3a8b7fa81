//! The bridge to CUDA: memory, launches and compiled kernels, in three levels.
//!
//! *Raw*: [`Machine::launch`] hands a named kernel its arguments; nothing is checked. *Checked*: a [`Slice`] is memory
//! with a length and a number type, from a tensor, a [`Buffer`], or (unsafely) an address. *Safe*: the launchers in
//! `kernels::<op>` take slices, check that they fit together and do not overlap where they must not, and are what the
//! rest of the program calls.
//!
//! A [`Machine`] is what kernels run on: [`Gpu`], or the host emulation of the tests. Kernels run asynchronously, on
//! CUDA's legacy default stream, which is the stream libtorch works on: what libtorch did before is done before, and
//! what it does next comes after.

mod compile;
mod device;
mod shared;

pub use compile::{compile, Architecture, Compiled, Source, Toolkit, SOURCES};
pub use device::{is_driver_present, Gpu};
pub use shared::{share, share_with, shared_bytes};

use std::ffi::c_void;
use std::marker::PhantomData;
use std::sync::Arc;

use anyhow::{bail, ensure, Context, Result};
use tch::{Device, Kind, Tensor};

/// What kernels run on.
pub trait Machine: Send + Sync {
    /// Starts `kernel` with `grid` (x, y) blocks of `threads` threads.
    ///
    /// # Safety
    /// `arguments` point to values of the types the kernel declares, in its order, and every address among them is
    /// memory of this machine as long as the kernel takes it to be, alive until the kernel ends.
    unsafe fn launch(&self, kernel: &str, grid: [u32; 2], threads: u32, arguments: &[*const c_void]) -> Result<()>;

    /// This machine, launching on another stream; 0 is the default stream.
    fn on_stream(&self, stream: u64) -> Arc<dyn Machine>;

    /// Where its tensors lie.
    fn device(&self) -> Device;
}

/// Number type of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    F32,
    Bf16,
    F16,
    F64,
    U32,
    U64,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::Bf16 | Element::F16 => 2,
            Element::F32 | Element::U32 => 4,
            Element::F64 | Element::U64 => 8,
        }
    }

    /// Of a tensor that kernels read or write.
    pub fn of(kind: Kind) -> Result<Self> {
        Ok(match kind {
            Kind::Float => Element::F32,
            Kind::BFloat16 => Element::Bf16,
            Kind::Half => Element::F16,
            Kind::Double => Element::F64,
            other => bail!("kernels take f32, bf16, f16 and f64, not {other:?}"),
        })
    }

    /// The tensors that hold such numbers; the bits of unsigned ones are those of signed ones.
    fn kind(self) -> Kind {
        match self {
            Element::F32 => Kind::Float,
            Element::Bf16 => Kind::BFloat16,
            Element::F16 => Kind::Half,
            Element::F64 => Kind::Double,
            Element::U32 => Kind::Int,
            Element::U64 => Kind::Int64,
        }
    }

    /// Index of f32, bf16, f16, which is the order of each kernel's variants.
    pub(super) fn variant(self, name: &str) -> Result<usize> {
        match self {
            Element::F32 => Ok(0),
            Element::Bf16 => Ok(1),
            Element::F16 => Ok(2),
            other => bail!("{name} must be f32, bf16 or f16, it is {other:?}"),
        }
    }
}

/// A Rust number type that device memory can hold.
pub trait Number: bytemuck::Pod {
    const ELEMENT: Element;
}

macro_rules! number {
    ($($t:ty => $e:ident),*) => { $(impl Number for $t { const ELEMENT: Element = Element::$e; })* };
}
number!(f32 => F32, half::bf16 => Bf16, half::f16 => F16, f64 => F64, u32 => U32, u64 => U64);

/// Device memory with its length and number type; kernels may read and write it.
#[derive(Clone, Copy, Debug)]
pub struct Slice<'a> {
    address: u64,
    length: usize,
    element: Element,
    memory: PhantomData<&'a ()>,
}

impl<'a> Slice<'a> {
    /// # Safety
    /// `length` elements at `address` are memory of the machine this is used with, alive for 'a and until the kernels
    /// that use it have ended, and nothing else touches it meanwhile but on the same stream.
    pub unsafe fn from_raw(address: u64, length: usize, element: Element) -> Self {
        Slice { address, length, element, memory: PhantomData }
    }

    /// The elements of a tensor in memory order. libtorch reuses memory in stream order, so the tensor may be dropped
    /// while a kernel runs.
    ///
    /// # Errors
    /// A tensor on another device or with gaps between its elements (channels-last has none).
    pub fn of(tensor: &'a Tensor, machine: &dyn Machine) -> Result<Self> {
        ensure!(
            tensor.device() == machine.device(),
            "the tensor lies on {:?}, not on the kernels' device",
            tensor.device()
        );
        ensure!(is_dense(tensor), "the tensor has gaps: shape {:?}, strides {:?}", tensor.size(), tensor.stride());
        let element = Element::of(tensor.kind())?;
        // SAFETY: a dense tensor's elements are numel() neighbours from data_ptr(), and the tensor is borrowed for 'a
        Ok(unsafe { Slice::from_raw(tensor.data_ptr() as u64, tensor.numel(), element) })
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    pub fn element(&self) -> Element {
        self.element
    }

    /// The elements `from..from + length`.
    ///
    /// # Panics
    /// Beyond the end.
    pub fn part(&self, from: usize, length: usize) -> Slice<'a> {
        assert!(from + length <= self.length, "{from}..{} of {} elements", from + length, self.length);
        Slice { address: self.address + (from * self.element.bytes()) as u64, length, ..*self }
    }

    pub(super) fn expect(&self, length: usize, element: Element, name: &str) -> Result<()> {
        ensure!(self.length == length, "{name} has {} elements, expected {length}", self.length);
        ensure!(self.element == element, "{name} must be {element:?}, it is {:?}", self.element);
        let bytes = element.bytes() as u64;
        ensure!(self.address % bytes == 0 && (self.address != 0 || length == 0), "{name} has a bad address");
        Ok(())
    }

    fn end(&self) -> u64 {
        self.address + (self.length * self.element.bytes()) as u64
    }
}

/// No two elements share memory and there is nothing between them.
fn is_dense(tensor: &Tensor) -> bool {
    let mut dimensions: Vec<(i64, i64)> = tensor.stride().into_iter().zip(tensor.size()).collect();
    dimensions.retain(|&(_, size)| size != 1);
    dimensions.sort_unstable();
    let mut expected = 1;
    for (stride, size) in dimensions {
        if size == 0 {
            return true;
        }
        if stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

/// Refuses memory that is written and also read or written under another name.
pub(super) fn ensure_apart(written: &[Slice], read: &[Slice]) -> Result<()> {
    let mut all: Vec<(u64, u64, bool)> = written.iter().map(|s| (s.address, s.end(), true)).collect();
    all.extend(read.iter().map(|s| (s.address, s.end(), false)));
    all.retain(|&(begin, end, _)| begin < end);
    all.sort_unstable();
    // furthest end of what was written, and of anything, so far
    let (mut written_end, mut any_end) = (0, 0);
    for (begin, end, is_written) in all {
        ensure!(
            begin >= if is_written { any_end } else { written_end },
            "a kernel's output overlaps other memory of it"
        );
        any_end = any_end.max(end);
        if is_written {
            written_end = written_end.max(end);
        }
    }
    Ok(())
}

/// Memory of a machine that is no tensor's: a table or work space of a kernel. It is libtorch's, which has taken most of a
/// GPU: the driver might have nothing left to give, though libtorch holds memory that nobody uses. libtorch hands it on in
/// stream order, so it may be dropped while a kernel runs.
pub struct Buffer {
    tensor: Tensor,
    element: Element,
}

impl Buffer {
    /// Uninitialised memory.
    pub fn new(machine: &Arc<dyn Machine>, length: usize, element: Element) -> Result<Self> {
        let length = i64::try_from(length).context("a buffer larger than the address space")?;
        let tensor = Tensor::f_empty([length], (element.kind(), machine.device()))?;
        Ok(Buffer { tensor, element })
    }

    pub fn upload<T: Number>(machine: &Arc<dyn Machine>, values: &[T]) -> Result<Self> {
        let (bytes, kind) = (bytemuck::cast_slice(values), T::ELEMENT.kind());
        let on_host = Tensor::f_from_data_size(bytes, &[values.len() as i64], kind)?;
        Ok(Buffer { tensor: on_host.f_to_device(machine.device())?, element: T::ELEMENT })
    }

    /// The values, after all that libtorch's current stream was given before.
    ///
    /// # Errors
    /// `T` is not the buffer's number type; a kernel failed.
    pub fn download<T: Number>(&self) -> Result<Vec<T>> {
        ensure!(T::ELEMENT == self.element, "a buffer of {:?} is read as {:?}", self.element, T::ELEMENT);
        let mut values = vec![T::zeroed(); self.tensor.numel()];
        let on_host = self.tensor.f_to_device(Device::Cpu).context("a kernel failed")?;
        on_host.f_copy_data_u8(bytemuck::cast_slice_mut(&mut values), self.tensor.numel())?;
        Ok(values)
    }

    pub fn slice(&self) -> Slice<'_> {
        // SAFETY: the memory is this buffer's, as many elements of this type
        unsafe { Slice::from_raw(self.tensor.data_ptr() as u64, self.tensor.numel(), self.element) }
    }
}

/// The pointers that [`Machine::launch`] takes, to the values given.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$(std::ptr::from_ref(&$value).cast::<std::ffi::c_void>()),*] };
}
pub(super) use arguments;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: u64, length: usize) -> Slice<'static> {
        // SAFETY: never dereferenced
        unsafe { Slice::from_raw(address, length, Element::F32) }
    }

    #[test]
    fn overlapping_outputs_are_found_and_shared_inputs_allowed() {
        ensure_apart(&[at(16, 4)], &[at(32, 4), at(32, 4), at(0, 4)]).unwrap();
        ensure_apart(&[at(16, 0)], &[at(16, 4)]).unwrap();
        assert!(ensure_apart(&[at(16, 4)], &[at(28, 4)]).is_err());
        assert!(ensure_apart(&[at(16, 4)], &[at(0, 5)]).is_err());
        assert!(ensure_apart(&[at(16, 4), at(16, 1)], &[]).is_err());
        // the written range lies inside the first of two that are read
        assert!(ensure_apart(&[at(40, 1)], &[at(0, 100), at(8, 1)]).is_err());
    }

    #[test]
    fn dense_means_without_gaps_in_any_order() {
        let tensor = Tensor::zeros([2, 3, 4, 5], (Kind::Float, tch::Device::Cpu));
        assert!(is_dense(&tensor) && is_dense(&tensor.permute([0, 2, 3, 1])) && is_dense(&tensor.narrow(0, 1, 1)));
        assert!(!is_dense(&tensor.narrow(1, 0, 2)) && !is_dense(&tensor.slice(3, 0, 5, 2)));
        assert!(!is_dense(&Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)).expand([4], false)));
        assert!(is_dense(&Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu))));
    }

    #[test]
    fn a_slice_names_what_does_not_fit() {
        assert!(at(16, 4).expect(4, Element::F32, "x").is_ok());
        for (slice, length, element) in
            [(at(16, 4), 5, Element::F32), (at(16, 4), 4, Element::F16), (at(17, 4), 4, Element::F32)]
        {
            let error = slice.expect(length, element, "x_t").unwrap_err().to_string();
            assert!(error.contains("x_t"), "{error}");
        }
        assert!(at(0, 1).expect(1, Element::F32, "x").is_err() && at(0, 0).expect(0, Element::F32, "x").is_ok());
    }
}
