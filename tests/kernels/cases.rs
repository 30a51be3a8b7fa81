//! What every kernel must do, on any machine: each case runs on all the machines it is given, which must agree bit for
//! bit (the host emulation in two orders of its threads, or a GPU twice), and compares with `reference()`.
//!
//! `Observed` collects the largest errors; a test prints them, and the tolerances beside them stand here.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};
use rldiff::kernels::cuda::{self, Element, Machine, Number, Slice};
use rldiff::kernels::normal_rows::{self, Rows};
use rldiff::random::{Coordinates, Purpose};

/// What runs the kernels; all must give the same bits.
pub type Machines = [Arc<dyn Machine>; 2];

/// A number type of the model's outputs.
pub trait Real: Number {
    fn rounded(value: f32) -> Self;
    fn value(self) -> f32;
}

macro_rules! real {
    ($($t:ty: $from:expr),*) => { $(impl Real for $t {
        fn rounded(value: f32) -> Self { $from(value) }
        fn value(self) -> f32 { self.into() }
    })* };
}
real!(f32: std::convert::identity, bf16: bf16::from_f32, f16: f16::from_f32);

/// Largest error of each quantity, against its tolerance.
#[derive(Default)]
pub struct Observed(BTreeMap<&'static str, (f64, f64)>);

impl Observed {
    pub fn check(&mut self, what: &'static str, error: f64, tolerance: f64) {
        assert!(error <= tolerance, "{what}: error {error:e}, tolerance {tolerance:e}");
        let entry = self.0.entry(what).or_insert((0.0, tolerance));
        entry.0 = entry.0.max(error);
    }

    pub fn print(&self) {
        for (what, (error, tolerance)) in &self.0 {
            println!("{what:<40} largest error {error:9.2e}   tolerance {tolerance:.1e}");
        }
    }
}

pub fn normals(count: usize, sample: u32) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Coordinates { sample, ..Coordinates::new(17, Purpose::WeightInit) }.stream().fill_normal(&mut values);
    values
}

pub fn rounded<T: Real>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&v| T::rounded(v)).collect()
}

pub fn values<T: Real>(rounded: &[T]) -> Vec<f32> {
    rounded.iter().map(|v| v.value()).collect()
}

/// Memory of a machine between two guards, bytes that no kernel may change; looked at when it is dropped.
pub struct Buffer {
    words: cuda::Buffer,
    length: usize,
    element: Element,
}

impl Buffer {
    const GUARD: usize = 64;
    const GUARD_BYTE: u8 = 0xa5;

    /// Every bit is set: NaN.
    pub fn new(machine: &Arc<dyn Machine>, length: usize, element: Element) -> anyhow::Result<Self> {
        Buffer::holding(machine, &vec![0xff; length * element.bytes()], element)
    }

    pub fn upload<T: Number>(machine: &Arc<dyn Machine>, values: &[T]) -> anyhow::Result<Self> {
        Buffer::holding(machine, bytemuck::cast_slice(values), T::ELEMENT)
    }

    fn holding(machine: &Arc<dyn Machine>, bytes: &[u8], element: Element) -> anyhow::Result<Self> {
        let end = (Self::GUARD + bytes.len()).next_multiple_of(4) + Self::GUARD;
        let mut all = vec![Self::GUARD_BYTE; end];
        all[Self::GUARD..Self::GUARD + bytes.len()].copy_from_slice(bytes);
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&all);
        let words = cuda::Buffer::upload(machine, &words)?;
        Ok(Buffer { words, length: bytes.len() / element.bytes(), element })
    }

    fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        Ok(bytemuck::pod_collect_to_vec(&self.words.download::<u32>()?))
    }

    fn own(&self) -> std::ops::Range<usize> {
        Self::GUARD..Self::GUARD + self.length * self.element.bytes()
    }

    pub fn download<T: Number>(&self) -> anyhow::Result<Vec<T>> {
        anyhow::ensure!(T::ELEMENT == self.element, "a buffer of {:?} is read as {:?}", self.element, T::ELEMENT);
        Ok(bytemuck::pod_collect_to_vec(&self.bytes()?[self.own()]))
    }

    pub fn slice(&self) -> Slice<'_> {
        let address = self.words.slice().address() + Self::GUARD as u64;
        // SAFETY: what lies between the guards, as many elements of this type
        unsafe { Slice::from_raw(address, self.length, self.element) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let (bytes, own) = (self.bytes().unwrap(), self.own());
        let intact = bytes[..own.start].iter().chain(&bytes[own.end..]).all(|&byte| byte == Self::GUARD_BYTE);
        assert!(intact, "a kernel wrote beyond the ends of {} bytes", own.len());
    }
}

/// Values on a machine, `offset` elements behind an aligned address.
pub struct Placed {
    buffer: Buffer,
    offset: usize,
}

impl Placed {
    pub fn new<T: Number>(machine: &Arc<dyn Machine>, values: &[T], offset: usize) -> Self {
        let mut all = vec![T::zeroed(); offset];
        all.extend(values);
        Placed { buffer: Buffer::upload(machine, &all).unwrap(), offset }
    }

    pub fn empty(machine: &Arc<dyn Machine>, length: usize, element: Element, offset: usize) -> Self {
        Placed { buffer: Buffer::new(machine, length + offset, element).unwrap(), offset }
    }

    pub fn slice(&self) -> Slice<'_> {
        self.buffer.slice().part(self.offset, self.buffer.slice().len() - self.offset)
    }

    pub fn download<T: Number>(&self) -> Vec<T> {
        self.buffer.download::<T>().unwrap().split_off(self.offset)
    }
}

/// What `run` gives on every machine; asserts that all give the same bits.
pub fn on_all<R>(machines: &Machines, bits: impl Fn(&R) -> Vec<u32>, run: impl Fn(&Arc<dyn Machine>) -> R) -> R {
    let [first, second] = machines.each_ref().map(&run);
    assert!(bits(&first) == bits(&second), "two runs differ");
    first
}

pub fn f32_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Largest difference; NaN where only one is NaN.
pub fn largest_gap(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let gap =
        |(&a, &b): (&f32, &f32)| if a.to_bits() == b.to_bits() { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
    // keeps a NaN
    a.iter().zip(b).map(gap).fold(0.0, |m, g| if m.is_nan() || m > g { m } else { g })
}

pub fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |m, v| f64::from(v.abs()).max(m))
}

/// Random123's published vectors (kat_vectors, philox4x32, 10 rounds).
pub fn philox_known_answers(machines: &Machines) {
    let counters: [u32; 12] =
        [0, 0, 0, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX, 0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let keys: [u32; 6] = [0, 0, u32::MAX, u32::MAX, 0xa409_3822, 0x299f_31d0];
    let words = on_all(machines, Vec::clone, |machine| {
        let (counters, keys) = (Buffer::upload(machine, &counters).unwrap(), Buffer::upload(machine, &keys).unwrap());
        let words = Buffer::new(machine, 12, Element::U32).unwrap();
        normal_rows::launch_words(&**machine, counters.slice(), keys.slice(), words.slice()).unwrap();
        words.download::<u32>().unwrap()
    });
    let published = [
        0x6627_e8d5,
        0xe169_c58d,
        0xbc57_ac4c,
        0x9b00_dbd8,
        0x408f_276d,
        0x41c8_3b0e,
        0xa20b_c7c6,
        0x6d54_51fd,
        0xd16c_fe09,
        0x94fd_cceb,
        0x5001_e420,
        0x2412_6ea1,
    ];
    assert_eq!(words, published);
}

pub fn stream() -> Coordinates {
    Coordinates {
        iteration: 70_000,
        task: 3,
        sample: 2_000,
        step: 49,
        ..Coordinates::new(0x1234_5678_9abc_def0, Purpose::TransitionNoise)
    }
}

/// The noise of `rows` rows from [`stream`], drawn on the host.
pub fn noise(rows: usize, length: usize) -> Vec<f32> {
    let mut all = vec![0.0; rows * length];
    for (i, row) in all.chunks_mut(length.max(1)).enumerate() {
        Coordinates { sample: 2_000 + i as u32, ..stream() }.stream().fill_normal(row);
    }
    all
}

pub fn normal_numbers(machines: &Machines, seen: &mut Observed) {
    for (rows, length, offset) in [(1, 1, 0), (2, 3, 0), (3, 1025, 0), (2, 4096, 1), (1, 16_384, 0), (0, 7, 0)] {
        let ours = on_all(
            machines,
            |v: &Vec<f32>| f32_bits(v),
            |machine| {
                let out = Placed::empty(machine, rows * length, Element::F32, offset);
                normal_rows::launch(&**machine, Rows { first: stream() }, length, out.slice()).unwrap();
                out.download()
            },
        );
        // a device's logf, sinf, cosf: up to 2 units in the last place of a number below 6.7; the emulation has the
        // host's: observed 0
        seen.check("normal numbers", largest_gap(&ours, &noise(rows, length)), 2e-6);
    }
}
