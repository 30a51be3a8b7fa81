//! The sum of gradients over lanes and ranks, in buckets that travel while the backward pass goes on.
//!
//! The flat gradient is cut into buckets from its end to its beginning, roughly the order in which a backward pass makes
//! it. In the last lane of a rank, a bucket whose gradients are all there is added to the lanes before it and its sum
//! over ranks starts at once: on the host in the hook itself (blocking), on a GPU on a stream of its own, beside the rest
//! of the backward pass. All ranks send the buckets in the same order, so a bucket that is ready early waits its turn.
//!
//! With f32 on the wire the sum is that of the one fixed tree over lanes and ranks, whatever the size of the buckets:
//! cutting a vector changes no element's additions. (NCCL has its own order, fixed at equal world size.)

use std::{
    ops::Range,
    sync::{Arc, Mutex},
    thread::ThreadId,
};

use anyhow::{ensure, Context, Result};
use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::{
    comm::{Communicator, DeviceVector, TreeSum, Wire},
    device,
    kernels::FlatBuffer,
    models::{
        flat_parameters::{FlatParameters, LayoutEntry},
        gradient_hooks::{GradientHooks, GradientSink},
    },
};

/// How the sum travels between ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transport {
    /// A bucket is closed as soon as it holds this many bytes of f32.
    pub bucket_bytes: usize,
    pub wire: Wire,
}

impl Default for Transport {
    fn default() -> Self {
        Transport { bucket_bytes: 25 << 20, wire: Wire::F32 }
    }
}

/// Sums the gradients of a set of parameters. While it lives, their gradients do not gather in `.grad`.
pub struct GradientSum {
    shared: Arc<Shared>,
    _hooks: GradientHooks,
}

struct Shared(Mutex<State>);

/// The CUDA stream that libtorch computes on now.
type StreamOf = Box<dyn Fn() -> Result<usize> + Send>;

struct State {
    layout: Vec<LayoutEntry>,
    /// Where sums over ranks start on a stream: the one that computes now. None: on the host, blocking.
    stream: Option<StreamOf>,
    wire: Wire,
    /// Elements of each bucket, in the order in which they are sent; together the whole buffer.
    buckets: Vec<Range<usize>>,
    /// By leaf.
    bucket_of: Vec<usize>,
    tree: TreeSum<FlatBuffer>,
    /// bf16 copy of the gradient, where it travels as bf16 on a stream.
    staging: Option<Tensor>,
    pass: Option<Pass>,
}

/// One lane's backward pass.
struct Pass {
    lane: FlatBuffer,
    seen: Vec<bool>,
    /// By bucket: gradients that have not come yet.
    missing: Vec<usize>,
    /// Where the sums go, in a rank's last lane.
    comm: Option<BorrowedCommunicator>,
    /// Bucket whose turn it is.
    next: usize,
    caller: ThreadId,
    error: Option<anyhow::Error>,
}

/// A communicator borrowed for the length of [`GradientSum::backward`].
#[derive(Clone, Copy)]
struct BorrowedCommunicator(*const (dyn Communicator + 'static));

// SAFETY: the thread that calls backward() waits there while another one may use it, and a thread other than the caller
// uses only what Communicator allows to any thread (`State::may_send`).
unsafe impl Send for BorrowedCommunicator {}

impl BorrowedCommunicator {
    /// The result may be used only while `comm` is borrowed by the caller.
    fn new(comm: &dyn Communicator) -> Self {
        let pointer: *const (dyn Communicator + '_) = comm;
        // SAFETY: only the lifetime in the type changes; `backward` drops the pass, and this with it, before it returns.
        BorrowedCommunicator(unsafe {
            std::mem::transmute::<*const (dyn Communicator + '_), *const (dyn Communicator + 'static)>(pointer)
        })
    }

    fn get(&self) -> &dyn Communicator {
        // SAFETY: see `new`.
        unsafe { &*self.0 }
    }
}

/// Buckets of `layout` from its end to its beginning, each of whole parameters, and the bucket of every parameter.
fn plan(layout: &[LayoutEntry], length: usize, bucket_bytes: usize) -> (Vec<Range<usize>>, Vec<usize>) {
    let (mut buckets, mut bucket_of) = (Vec::new(), vec![0; layout.len()]);
    let mut end = length;
    for (index, entry) in layout.iter().enumerate().rev() {
        bucket_of[index] = buckets.len();
        if (end - entry.offset) * 4 >= bucket_bytes || index == 0 {
            buckets.push(entry.offset..end);
            end = entry.offset;
        }
    }
    (buckets, bucket_of)
}

impl GradientSum {
    /// Over ranks as the parameters' device asks: on the host by [`Communicator::all_reduce_sum_f32`] and its like, on a GPU
    /// by [`Communicator::start_device_sum`].
    pub fn new(params: &FlatParameters, transport: Transport) -> Result<Self> {
        let stream = match params.device() {
            Device::Cuda(index) => Some(Box::new(move || device::current_stream(index)) as StreamOf),
            _ => None,
        };
        Self::with(params, transport, stream)
    }

    /// As on a GPU, wherever the parameters lie; what computes the gradients has the stream `stream`.
    pub fn on_stream(params: &FlatParameters, transport: Transport, stream: usize) -> Result<Self> {
        Self::with(params, transport, Some(Box::new(move || Ok(stream))))
    }

    fn with(params: &FlatParameters, transport: Transport, stream: Option<StreamOf>) -> Result<Self> {
        let (length, device) = (params.len(), params.device());
        let (buckets, bucket_of) = plan(&params.layout, length, transport.bucket_bytes);
        let staged = stream.is_some() && transport.wire == Wire::Bf16;
        let shared = Arc::new(Shared(Mutex::new(State {
            layout: params.layout.clone(),
            stream,
            wire: transport.wire,
            buckets,
            bucket_of,
            tree: TreeSum::of(move || FlatBuffer::zeros(length, device)),
            staging: staged.then(|| Tensor::zeros([length as i64], (Kind::BFloat16, device))),
            pass: None,
        })));
        Ok(GradientSum { _hooks: GradientHooks::new(params.leaves(), shared.clone())?, shared })
    }

    /// Differentiates `loss` and adds its gradient to those of the lanes before it; a parameter that it does not depend
    /// on adds zeros. With `last`, the sum over ranks is done too (a collective call) and [`GradientSum::finish`] has
    /// the result.
    pub fn backward(&mut self, loss: &Tensor, last: bool, comm: &dyn Communicator) -> Result<()> {
        {
            let mut state = self.shared.lock();
            let mut missing = vec![0; state.buckets.len()];
            state.bucket_of.iter().for_each(|&bucket| missing[bucket] += 1);
            let pass = Pass {
                lane: state.tree.buffer(),
                seen: vec![false; state.layout.len()],
                missing,
                comm: last.then(|| BorrowedCommunicator::new(comm)),
                next: 0,
                caller: std::thread::current().id(),
                error: None,
            };
            state.pass = Some(pass);
        }
        let differentiated = loss.f_backward();
        let mut state = self.shared.lock();
        let ended = differentiated.map_err(anyhow::Error::from).and_then(|()| state.end_pass());
        if ended.is_err() {
            state.pass = None;
            state.tree.reset();
        }
        ended.context("backward pass")
    }

    /// The sum, after the last lane. Hand it back with [`GradientSum::recycle`] to save an allocation.
    pub fn finish(&mut self) -> FlatBuffer {
        self.shared.lock().tree.finish()
    }

    pub fn recycle(&mut self, buffer: FlatBuffer) {
        self.shared.lock().tree.recycle(buffer);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("a panic ends the process")
    }
}

impl GradientSink for Shared {
    fn take(&self, index: usize, gradient: &Tensor) {
        let mut state = self.lock();
        let taken = state.take(index, gradient);
        if let (Err(e), Some(pass)) = (taken, &mut state.pass) {
            pass.error.get_or_insert(e);
        }
    }
}

impl State {
    fn take(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        let entry = &self.layout[index];
        let Some(pass) = &mut self.pass else { return Ok(()) };
        ensure!(!std::mem::replace(&mut pass.seen[index], true), "two gradients of {} in one pass", entry.name);
        entry.put_gradient(gradient, &pass.lane);
        pass.missing[self.bucket_of[index]] -= 1;
        if pass.error.is_none() && self.may_send() {
            self.send_what_is_ready()?;
        }
        Ok(())
    }

    /// A communicator's host sums belong to the thread that called `backward`; device sums may start from any.
    fn may_send(&self) -> bool {
        self.stream.is_some() || self.pass.as_ref().is_some_and(|p| p.caller == std::thread::current().id())
    }

    fn send_what_is_ready(&mut self) -> Result<()> {
        while let Some(pass) = self.pass.as_mut().filter(|p| p.comm.is_some()) {
            let bucket = pass.next;
            if bucket == self.buckets.len() || pass.missing[bucket] > 0 {
                break;
            }
            pass.next += 1;
            self.send(bucket).with_context(|| format!("sum of gradient bucket {bucket} over the ranks"))?;
        }
        Ok(())
    }

    fn send(&mut self, bucket: usize) -> Result<()> {
        let range = self.buckets[bucket].clone();
        let pass = self.pass.as_ref().expect("a pass is on");
        self.tree.add_last(&pass.lane, range.clone());
        let comm = pass.comm.as_ref().expect("the last lane").get();
        // one rank on the host is asked too, so that whoever measures sees the same operations at every number of ranks
        if comm.size() == 1 && (self.stream.is_some() || self.wire != Wire::F32) {
            return Ok(());
        }
        let part = self.tree.root(&pass.lane).part(range.clone());
        let Some(stream) = &self.stream else { return sum_on_host(&part, self.wire, comm) };
        let travelling = match &self.staging {
            Some(staging) => {
                let mut staged = staging.narrow(0, range.start as i64, range.len() as i64);
                tch::no_grad(|| staged.copy_(&part));
                staged
            }
            None => part,
        };
        comm.start_device_sum(DeviceVector {
            address: travelling.data_ptr() as u64,
            length: range.len(),
            wire: self.wire,
            stream: stream()?,
        })
    }

    fn end_pass(&mut self) -> Result<()> {
        let pass = self.pass.as_mut().context("no pass is on")?;
        if let Some(e) = pass.error.take() {
            return Err(e);
        }
        // parameters that the loss does not depend on: their places hold zeros
        pass.missing.fill(0);
        self.send_what_is_ready()?;
        let pass = self.pass.take().context("no pass is on")?;
        let Some(comm) = pass.comm else {
            self.tree.push(pass.lane);
            return Ok(());
        };
        if let Some(stream) = &self.stream {
            comm.get().finish_device_sums(stream()?)?;
        }
        let total = self.tree.finish_in_parts(pass.lane);
        if let Some(staging) = self.staging.as_ref().filter(|_| comm.get().size() > 1) {
            tch::no_grad(|| total.tensor().shallow_clone().copy_(staging));
        }
        self.tree.push(total);
        Ok(())
    }
}

/// The sum over ranks of a part of a host buffer, in place.
fn sum_on_host(part: &Tensor, wire: Wire, comm: &dyn Communicator) -> Result<()> {
    let length = part.numel();
    ensure!(part.is_contiguous() && part.kind() == Kind::Float, "a gradient is not a flat f32 vector");
    // SAFETY: a contiguous f32 CPU tensor of `length` scalars that lives through this function, which no libtorch
    // operation touches meanwhile: the pass waits in the hook.
    let values = unsafe { std::slice::from_raw_parts_mut(part.data_ptr() as *mut f32, length) };
    match wire {
        Wire::F32 => comm.all_reduce_sum_f32(values),
        Wire::Bf16 => {
            let mut rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            comm.all_reduce_sum_bf16(&mut rounded)?;
            values.iter_mut().zip(rounded).for_each(|(value, sum)| *value = sum.to_f32());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::Local,
        models::parameters::{Builder, Init, Source},
    };

    fn entry(offset: usize, count: i64) -> LayoutEntry {
        LayoutEntry::new(offset.to_string(), &[count], offset)
    }

    #[test]
    fn buckets_run_from_the_end_and_cover_everything() {
        let layout = [entry(0, 3), entry(16, 40), entry(64, 1), entry(80, 9)];
        let (buckets, bucket_of) = plan(&layout, 96, 1);
        assert_eq!((buckets, bucket_of), (vec![80..96, 64..80, 16..64, 0..16], vec![3, 2, 1, 0]));
        let (buckets, bucket_of) = plan(&layout, 96, 4 * 30);
        assert_eq!((buckets, bucket_of), (vec![64..96, 16..64, 0..16], vec![2, 1, 0, 0]));
        let (one, of) = plan(&layout, 96, usize::MAX);
        assert_eq!((one.len(), one[0].clone(), of), (1, 0..96, vec![0; 4]));
        assert_eq!(plan(&[], 0, 1), (vec![], vec![]));
    }

    #[test]
    fn lanes_add_up_and_unused_parameters_are_zero() {
        let builder = Builder::new(Source::Seeded(1), Kind::Float, Device::Cpu);
        let a = builder.parameter("a", &[2], Init::Ones).unwrap();
        let _unused = builder.parameter("b", &[3], Init::Ones).unwrap();
        let (parameters, _) = builder.finish();
        let params = FlatParameters::new(&[&parameters]).unwrap();
        let mut sum = GradientSum::new(&params, Transport { bucket_bytes: 1, ..Transport::default() }).unwrap();
        for _ in 0..2 {
            for lane in 0..3 {
                let loss = (&a * f64::from(lane + 1)).sum(Kind::Float);
                sum.backward(&loss, lane == 2, &Local).unwrap();
            }
            let total = sum.finish();
            assert_eq!((total.slice()[..2].to_vec(), total.slice()[2..].to_vec()), (vec![6.0; 2], vec![0.0; 30]));
            sum.recycle(total);
        }
        // a failed pass leaves nothing behind
        let error = sum.backward(&Tensor::from(1f32), true, &Local).unwrap_err();
        assert!(format!("{error:#}").contains("grad"), "{error:#}");
        sum.backward(&a.sum(Kind::Float), true, &Local).unwrap();
        assert_eq!(sum.finish().slice()[..2], [1.0; 2]);
    }
}
