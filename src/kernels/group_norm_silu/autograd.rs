//! Group normalisation with SiLU as a differentiable operation on tensors: `csrc/group_norm_silu.cpp` holds the autograd
//! node and calls back here.

use std::ffi::{c_char, c_void, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, RwLock};

use anyhow::{anyhow, ensure, Context, Result};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::{backward_workspace, forward_workspace, launch_backward, launch_forward};
use super::{DeviceGradients, DeviceInputs, Shape};
use crate::kernels::cuda::{Element, Machine, Slice};

/// `Call` of `csrc/group_norm_silu.cpp`.
#[repr(C)]
struct Call {
    x: *const c_void,
    weight: *const c_void,
    bias: *const c_void,
    grad_y: *const c_void,
    y: *mut c_void,
    grad_x: *mut c_void,
    mean: *mut f32,
    rstd: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    workspace: *mut c_void,
    samples: i64,
    pixels: i64,
    channels: i64,
    groups: i64,
    workspace_bytes: i64,
    element: i32,
    parameter_element: i32,
    silu: i32,
    device: i32,
    epsilon: f64,
    stream: u64,
    message: *mut c_char,
    message_bytes: i64,
}

type Launcher = extern "C" fn(*mut Call) -> i32;

extern "C" {
    fn group_norm_silu_last_error() -> *const c_char;
    fn group_norm_silu_register(forward: Launcher, backward: Launcher, workspace: extern "C" fn(*const Call) -> i64);
    fn group_norm_silu_apply(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        groups: i64,
        epsilon: f64,
        silu: i32,
    ) -> *mut C_tensor;
}

static MACHINE: RwLock<Option<Arc<dyn Machine>>> = RwLock::new(None);

/// Makes `machine` do the work of [`group_norm_silu`] from now on.
pub fn install(machine: Arc<dyn Machine>) {
    *MACHINE.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(machine);
    // SAFETY: the functions have the types the C++ side declares
    unsafe { group_norm_silu_register(forward, backward, workspace) };
}

fn machine() -> Option<Arc<dyn Machine>> {
    MACHINE.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
}

/// y = GroupNorm(x), then SiLU if asked; differentiable once, with respect to x, weight and bias.
///
/// x is `[N, C, H, W]`, weight and bias `[C]`, each f32, bf16 or f16 (weight and bias alike) on the device of the
/// machine that was installed. y is channels-last and has x's number type; other layouts of x are converted first.
///
/// # Errors
/// No machine is [`install`]ed, tensors on another device, shapes that do not fit together, a launch that fails.
pub fn group_norm_silu(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: i64,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let machine = machine().context("group_norm_silu is used without a GPU: no launcher is installed")?;
    let size = x.size();
    ensure!(size.len() == 4, "group_norm_silu takes [N, C, H, W], x has shape {size:?}");
    ensure!(groups > 0 && size[1] % groups == 0, "{} channels cannot be {groups} groups of equal size", size[1]);
    for (parameter, name) in [(weight, "weight"), (bias, "bias")] {
        ensure!(parameter.size() == [size[1]], "{name} has shape {:?}, x has {} channels", parameter.size(), size[1]);
        ensure!(parameter.is_contiguous() && parameter.kind() == weight.kind(), "{name} is not as plain as the weight");
    }
    for tensor in [x, weight, bias] {
        ensure!(machine.owns(tensor.device()), "a tensor lies on {:?}, not on the kernels' device", tensor.device());
        Element::of(tensor.kind())?.variant("a tensor of group_norm_silu")?;
    }
    // SAFETY: three live tensors; the result is a new tensor that we own
    let y = unsafe {
        let y = group_norm_silu_apply(x.as_ptr(), weight.as_ptr(), bias.as_ptr(), groups, epsilon, i32::from(silu));
        if y.is_null() {
            return Err(anyhow!(CStr::from_ptr(group_norm_silu_last_error()).to_string_lossy().into_owned()));
        }
        Tensor::from_ptr(y)
    };
    Ok(y)
}

impl Call {
    fn shape(&self) -> Shape {
        Shape {
            samples: self.samples as usize,
            pixels: self.pixels as usize,
            channels: self.channels as usize,
            groups: self.groups as usize,
            epsilon: self.epsilon,
            silu: self.silu != 0,
        }
    }

    fn is_backward(&self) -> bool {
        !self.grad_x.is_null()
    }

    /// # Safety
    /// The pointers are what the C++ side makes them.
    unsafe fn inputs(&self) -> DeviceInputs<'_> {
        let shape = self.shape();
        let statistics = shape.samples * shape.groups;
        let (x, parameter) = (element(self.element), element(self.parameter_element));
        DeviceInputs {
            x: Slice::from_raw(self.x as u64, shape.elements(), x),
            weight: Slice::from_raw(self.weight as u64, shape.channels, parameter),
            bias: Slice::from_raw(self.bias as u64, shape.channels, parameter),
            mean: Slice::from_raw(self.mean as u64, statistics, Element::F32),
            rstd: Slice::from_raw(self.rstd as u64, statistics, Element::F32),
        }
    }

    fn machine(&self) -> Result<Arc<dyn Machine>> {
        let machine = machine().context("no launcher is installed")?;
        let device = if self.device < 0 { Device::Cpu } else { Device::Cuda(self.device as usize) };
        ensure!(machine.owns(device), "the tensors lie on {device:?}, not on the kernels' device");
        Ok(machine.on_stream(self.stream))
    }

    /// Runs a pass; an error or a panic becomes the message and -1.
    fn report(&mut self, pass: impl FnOnce(&Call) -> Result<()>) -> i32 {
        let outcome = catch_unwind(AssertUnwindSafe(|| pass(self)));
        let message = match outcome {
            Ok(Ok(())) => return 0,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "the launcher panicked".to_string(),
        };
        let room = (self.message_bytes as usize).saturating_sub(1);
        let bytes = &message.as_bytes()[..message.len().min(room)];
        // SAFETY: the C++ side gives message_bytes bytes of room; one is kept for the NUL
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.message.cast::<u8>(), bytes.len());
            *self.message.add(bytes.len()) = 0;
        }
        -1
    }
}

fn element(code: i32) -> Element {
    [Element::F32, Element::Bf16, Element::F16][code as usize]
}

extern "C" fn workspace(call: *const Call) -> i64 {
    // SAFETY: the C++ side gives a live call
    let call = unsafe { &*call };
    let bytes = if call.is_backward() { backward_workspace(&call.shape()) } else { forward_workspace(&call.shape()) };
    bytes as i64
}

extern "C" fn forward(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &mut *call };
    call.report(|call| {
        let shape = call.shape();
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let (inputs, y, workspace) = unsafe {
            let y = Slice::from_raw(call.y as u64, shape.elements(), element(call.element));
            let workspace = Slice::from_raw(call.workspace as u64, call.workspace_bytes as usize / 4, Element::F32);
            (call.inputs(), y, workspace)
        };
        launch_forward(&*call.machine()?, &inputs, y, workspace, &shape)
    })
}

extern "C" fn backward(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &mut *call };
    call.report(|call| {
        let shape = call.shape();
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let (inputs, gradients) = unsafe {
            let gradients = DeviceGradients {
                grad_y: Slice::from_raw(call.grad_y as u64, shape.elements(), element(call.element)),
                grad_x: Slice::from_raw(call.grad_x as u64, shape.elements(), element(call.element)),
                grad_weight: Slice::from_raw(call.grad_weight as u64, shape.channels, Element::F32),
                grad_bias: Slice::from_raw(call.grad_bias as u64, shape.channels, Element::F32),
                workspace: Slice::from_raw(call.workspace as u64, call.workspace_bytes as usize / 8, Element::F64),
            };
            (call.inputs(), gradients)
        };
        launch_backward(&*call.machine()?, &inputs, &gradients, &shape)
    })
}
