//! Each operation where its operands lie: the plain implementation on the host, the kernel on a GPU.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex},
};

use anyhow::{bail, ensure, Context, Result};
use tch::{Device, Kind, Tensor};

use super::{
    adamw::{self, AdamW, Piece, Table},
    clipped_surrogate::{self, DeviceGradients, DeviceStored, Objective, SampleTerms, TERMS},
    cuda::{Gpu, Machine, Slice},
    ddim_step::{self, DeviceInputs, StepScalars},
    install,
    normal_rows::Rows,
    FlatBuffer,
};
use crate::{device::current_stream, random::Coordinates};

/// The kernels of a GPU on this thread's current stream; the first call for a GPU compiles them or takes them from the
/// cache.
pub fn machine(device: Device) -> Result<Arc<dyn Machine>> {
    static OPEN: Mutex<BTreeMap<usize, Gpu>> = Mutex::new(BTreeMap::new());
    let Device::Cuda(index) = device else { bail!("{device:?} has no kernels") };
    let mut open = OPEN.lock().expect("a panic ends the process");
    let gpu = match open.get(&index) {
        Some(gpu) => gpu,
        None => {
            let opened = Gpu::open(index).with_context(|| format!("kernels of GPU {index}"))?;
            open.entry(index).or_insert(opened)
        }
    };
    Ok(gpu.on_stream(current_stream(index)? as u64))
}

/// Opens the kernels of `device` and lets networks use them; nothing to do on the CPU.
///
/// # Errors
/// As [`Gpu::open`].
pub fn prepare(device: Device) -> Result<()> {
    if device != Device::Cpu {
        install(machine(device)?);
    }
    Ok(())
}

/// What an AdamW step reads and writes: vectors of one length, everything on one device.
pub struct Stepped<'a> {
    pub params: &'a mut FlatBuffer,
    /// bf16 tensors that follow the parameters: each with the range of them that it holds, in the order of its memory.
    /// Ascending, apart from each other.
    pub copies: &'a [(Range<usize>, &'a Tensor)],
    pub grads: &'a FlatBuffer,
    /// m.
    pub exp_avg: &'a mut FlatBuffer,
    /// v.
    pub exp_avg_sq: &'a mut FlatBuffer,
}

/// AdamW on one set of vectors, step after step. What the kernels need on a GPU is made in the first step and kept as long
/// as the vectors lie where they are: afterwards a step allocates nothing.
#[derive(Default)]
pub struct Stepper {
    kept: Option<Kept>,
}

struct Kept {
    /// Addresses and lengths of what the table names, the gradient aside.
    of: Vec<(u64, usize)>,
    /// The owners of that memory.
    _held: Vec<Tensor>,
    table: Table<'static>,
}

impl Stepper {
    /// L2 norm of the gradient in f64; on a GPU in another fixed order than on the host.
    ///
    /// # Errors
    /// As [`Stepper::step`].
    pub fn gradient_norm(&mut self, stepped: &Stepped) -> Result<f64> {
        match stepped.ensure_together()? {
            Device::Cpu => Ok(adamw::global_norm(stepped.grads.slice())),
            device => self.gradient_norm_by(&machine(device)?, stepped),
        }
    }

    /// [`Stepper::gradient_norm`] by the kernel, on whatever machine runs it.
    pub fn gradient_norm_by(&mut self, machine: &Arc<dyn Machine>, stepped: &Stepped) -> Result<f64> {
        Ok(self.table(machine, stepped)?.sum_of_squares()?.sqrt())
    }

    /// [`adamw::reference`], and the copies; on a GPU the same bits in one pass over memory.
    ///
    /// # Errors
    /// As [`adamw::reference`]; vectors of different devices; copies that do not fit; a launch that fails.
    pub fn step(&mut self, stepped: Stepped, settings: &AdamW, step: u64, grad_scale: f32) -> Result<()> {
        let device = stepped.ensure_together()?;
        if device != Device::Cpu {
            return self.step_by(&machine(device)?, stepped, settings, step, grad_scale);
        }
        let Stepped { params, copies, grads, exp_avg, exp_avg_sq } = stepped;
        let (m, v) = (exp_avg.slice_mut(), exp_avg_sq.slice_mut());
        adamw::reference(params.slice_mut(), grads.slice(), m, v, settings, step, grad_scale)?;
        for (range, copy) in copies {
            let mut in_memory_order = copy.detach().f_as_strided([range.len() as i64], [1], None::<i64>)?;
            in_memory_order.f_copy_(&params.part(range.clone()))?;
        }
        Ok(())
    }

    /// [`Stepper::step`] by the kernel, on whatever machine runs it.
    pub fn step_by(
        &mut self,
        machine: &Arc<dyn Machine>,
        stepped: Stepped,
        settings: &AdamW,
        step: u64,
        grad_scale: f32,
    ) -> Result<()> {
        self.table(machine, &stepped)?.step(settings, step, grad_scale)
    }

    /// The table of these vectors, made anew where they are others than last time.
    fn table(&mut self, machine: &Arc<dyn Machine>, stepped: &Stepped) -> Result<&Table<'static>> {
        let of = stepped.addresses();
        if self.kept.as_ref().is_none_or(|kept| kept.of != of) {
            // what is held of the old ones first: both may not fit into memory
            self.kept = None;
            let held = stepped.owners();
            let slice = |tensor: &Tensor| -> Result<Slice<'static>> {
                let slice = Slice::of(tensor, machine.as_ref())?;
                // SAFETY: `held` keeps the memory as long as the table, and so does whoever calls while it is stepped
                Ok(unsafe { Slice::from_raw(slice.address(), slice.len(), slice.element()) })
            };
            let table = Table::new(machine, &pieces(stepped, slice)?)?;
            self.kept = Some(Kept { of, _held: held, table });
        }
        let table = &mut self.kept.as_mut().expect("made above").table;
        let gradient = Slice::of(stepped.grads.tensor(), machine.as_ref())?;
        ensure!(gradient.len() == stepped.params.len(), "AdamW: {} parameters, another gradient", stepped.params.len());
        // SAFETY: the caller's gradient lives until the launches that follow, and libtorch reuses memory in stream order
        let gradient = unsafe { Slice::from_raw(gradient.address(), gradient.len(), gradient.element()) };
        table.set_gradients(machine, gradient)?;
        Ok(table)
    }
}

impl Stepped<'_> {
    /// The device of all vectors.
    fn ensure_together(&self) -> Result<Device> {
        let own = self.params.device();
        let devices = [self.grads.device(), self.exp_avg.device(), self.exp_avg_sq.device()];
        ensure!(devices == [own; 3], "AdamW: parameters on {own:?}, the rest on {devices:?}");
        Ok(own)
    }

    fn addresses(&self) -> Vec<(u64, usize)> {
        let vectors = [&*self.params, &*self.exp_avg, &*self.exp_avg_sq].map(|v| (v.address(), v.len()));
        let copies = self
            .copies
            .iter()
            .flat_map(|(range, copy)| [(range.start as u64, range.len()), (copy.data_ptr() as u64, copy.numel())]);
        vectors.into_iter().chain(copies).collect()
    }

    fn owners(&self) -> Vec<Tensor> {
        let vectors = [&*self.params, &*self.exp_avg, &*self.exp_avg_sq].map(|v| v.tensor().shallow_clone());
        vectors.into_iter().chain(self.copies.iter().map(|(_, copy)| copy.detach())).collect()
    }
}

/// The vectors in pieces, cut where a copy begins and ends.
fn pieces(stepped: &Stepped, slice: impl Fn(&Tensor) -> Result<Slice<'static>>) -> Result<Vec<Piece<'static>>> {
    let Stepped { params, copies, grads, exp_avg, exp_avg_sq } = stepped;
    let whole = Piece {
        param: slice(params.tensor())?,
        grad: slice(grads.tensor())?,
        exp_avg: slice(exp_avg.tensor())?,
        exp_avg_sq: slice(exp_avg_sq.tensor())?,
        copy: None,
    };
    let lengths = [whole.grad, whole.exp_avg, whole.exp_avg_sq].map(|slice| slice.len());
    ensure!(lengths == [params.len(); 3], "AdamW: {} parameters, gradient, m and v have {lengths:?}", params.len());
    let (mut pieces, mut done) = (Vec::with_capacity(2 * copies.len() + 1), 0);
    for (range, copy) in *copies {
        let in_order = done <= range.start && range.end <= params.len();
        ensure!(in_order, "AdamW: the copy of {range:?} is out of order among {} parameters", params.len());
        pieces.push(whole.part(done..range.start));
        pieces.push(Piece { copy: Some(slice(copy)?), ..whole.part(range.clone()) });
        done = range.end;
    }
    pieces.push(whole.part(done..params.len()));
    Ok(pieces)
}

/// The model's outputs and x_t of a batch on a GPU, in row-major order.
pub struct Batch {
    eps_uncond: Tensor,
    eps_cond: Tensor,
    x_t: Tensor,
    machine: Arc<dyn Machine>,
}

impl Batch {
    /// `eps_uncond` None: no guidance, whatever the guidance scale of the step says.
    ///
    /// # Errors
    /// Shapes that differ, latents that are not f32.
    pub fn new(eps_uncond: Option<&Tensor>, eps_cond: &Tensor, x_t: &Tensor) -> Result<Self> {
        let flat = |t: &Tensor, name: &str| {
            ensure!(t.size() == x_t.size(), "{name} has shape {:?}, expected {:?}", t.size(), x_t.size());
            Ok(t.detach().contiguous())
        };
        ensure_f32(x_t, "x_t")?;
        Ok(Batch {
            eps_uncond: flat(eps_uncond.unwrap_or(eps_cond), "eps_uncond")?,
            eps_cond: flat(eps_cond, "eps_cond")?,
            x_t: flat(x_t, "x_t")?,
            machine: machine(x_t.device())?,
        })
    }

    fn inputs(&self) -> Result<DeviceInputs<'_>> {
        Ok(DeviceInputs {
            eps_uncond: self.slice(&self.eps_uncond)?,
            eps_cond: self.slice(&self.eps_cond)?,
            x_t: self.slice(&self.x_t)?,
        })
    }

    fn slice<'a>(&self, tensor: &'a Tensor) -> Result<Slice<'a>> {
        Slice::of(tensor, self.machine.as_ref())
    }

    fn per_sample(&self) -> Tensor {
        Tensor::zeros([self.x_t.size()[0]], (Kind::Float, self.x_t.device()))
    }

    /// x_prev and its log-probability, with the noise of the streams from `first` on.
    pub fn draw(&self, step: &StepScalars, first: Coordinates) -> Result<(Tensor, Tensor)> {
        let (x_prev, log_prob) = (self.x_t.zeros_like(), self.per_sample());
        let (x, l) = (self.slice(&x_prev)?, self.slice(&log_prob)?);
        ddim_step::launch_draw(self.machine.as_ref(), &self.inputs()?, Rows { first }, step, x, l)?;
        Ok((x_prev, log_prob))
    }

    /// The log-probability of a stored x_prev, in the kernel's order of summation.
    pub fn score(&self, step: &StepScalars, x_prev: &Tensor) -> Result<Tensor> {
        ensure_f32(x_prev, "x_prev")?;
        let (x_prev, log_prob) = (x_prev.contiguous(), self.per_sample());
        let (x, l) = (self.slice(&x_prev)?, self.slice(&log_prob)?);
        ddim_step::launch_score(self.machine.as_ref(), &self.inputs()?, x, step, l)?;
        Ok(log_prob)
    }

    /// Terms of every sample and the gradients of the outputs (without and with the prompt), of their shape, f32.
    pub fn surrogate(
        &self,
        step: &StepScalars,
        x_prev: &Tensor,
        log_prob_old: &Tensor,
        advantage: &Tensor,
        objective: &Objective,
        guided: bool,
    ) -> Result<(Vec<SampleTerms>, Option<Tensor>, Tensor)> {
        for (tensor, name) in [(x_prev, "x_prev"), (log_prob_old, "log_prob_old"), (advantage, "advantage")] {
            ensure_f32(tensor, name)?;
        }
        let samples = self.x_t.size()[0];
        let (x_prev, log_prob_old, advantage) =
            (x_prev.contiguous(), log_prob_old.contiguous(), advantage.contiguous());
        for (tensor, name) in [(&log_prob_old, "log_prob_old"), (&advantage, "advantage")] {
            ensure!(tensor.size() == [samples], "{name} has shape {:?}, expected [{samples}]", tensor.size());
        }
        let terms = Tensor::zeros([samples * TERMS as i64], (Kind::Float, self.x_t.device()));
        let grad_uncond = guided.then(|| self.x_t.zeros_like());
        let grad_cond = self.x_t.zeros_like();
        let stored = DeviceStored {
            x_prev: self.slice(&x_prev)?,
            log_prob_old: self.slice(&log_prob_old)?,
            advantage: self.slice(&advantage)?,
        };
        let out = DeviceGradients {
            terms: self.slice(&terms)?,
            grad_uncond: grad_uncond.as_ref().map(|grad| self.slice(grad)).transpose()?,
            grad_cond: self.slice(&grad_cond)?,
        };
        clipped_surrogate::launch(self.machine.as_ref(), &self.inputs()?, &stored, step, objective, &out)?;
        let values = Vec::<f32>::try_from(&terms.to_device(Device::Cpu))?;
        Ok((clipped_surrogate::terms_from(&values), grad_uncond, grad_cond))
    }
}

fn ensure_f32(tensor: &Tensor, name: &str) -> Result<()> {
    ensure!(tensor.kind() == Kind::Float, "{name} must be f32, it is {:?}", tensor.kind());
    Ok(())
}
