//! Group normalisation with SiLU as a differentiable operation on tensors: `csrc/group_norm_silu.cpp` holds the autograd
//! node and calls back here.

use std::ffi::{c_char, c_void};

use anyhow::{ensure, Result};
use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::{backward_workspace, forward_workspace, launch_backward, launch_forward};
use super::{DeviceGradients, DeviceInputs, Shape};
use crate::kernels::cuda::{Element, Slice};
use crate::kernels::operation::{element, machine_for, made, Place};

/// `Call` of `csrc/group_norm_silu.cpp`.
#[repr(C)]
struct Call {
    place: Place,
    x: *const c_void,
    weight: *const c_void,
    bias: *const c_void,
    grad_y: *const c_void,
    shift: *const f32,
    y: *mut c_void,
    grad_x: *mut c_void,
    mean: *mut f32,
    rstd: *mut f32,
    channel_mean: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    grad_shift: *mut f32,
    workspace: *mut c_void,
    samples: i64,
    pixels: i64,
    channels: i64,
    groups: i64,
    workspace_bytes: i64,
    parameter_element: i32,
    silu: i32,
    epsilon: f64,
}

type Launcher = extern "C" fn(*mut Call) -> i32;

extern "C" {
    fn group_norm_silu_last_error() -> *const c_char;
    fn group_norm_silu_register(forward: Launcher, backward: Launcher, workspace: extern "C" fn(*const Call) -> i64);
    fn group_norm_silu_apply(
        x: *const C_tensor,
        shift: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        groups: i64,
        epsilon: f64,
        silu: i32,
    ) -> *mut C_tensor;
}

pub(in crate::kernels) fn register() {
    // SAFETY: the functions have the types the C++ side declares
    unsafe { group_norm_silu_register(forward, backward, workspace) };
}

/// y = GroupNorm(x + shift), then SiLU if asked; differentiable once, with respect to x, shift, weight and bias.
///
/// x is `[N, C, H, W]`, weight and bias `[C]`, each f32, bf16 or f16 (weight and bias alike), shift f32 `[N, C]`, on the
/// device of the machine that was installed. y is channels-last and has x's number type; other layouts of x are converted
/// first.
///
/// # Errors
/// No machine is installed, tensors on another device, shapes that do not fit together, a launch that fails.
pub fn group_norm_silu(
    x: &Tensor,
    shift: Option<&Tensor>,
    weight: &Tensor,
    bias: &Tensor,
    groups: i64,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    machine_for("group_norm_silu", &[x, weight, bias])?;
    let size = x.size();
    ensure!(size.len() == 4, "group_norm_silu takes [N, C, H, W], x has shape {size:?}");
    ensure!(groups > 0 && size[1] % groups == 0, "{} channels cannot be {groups} groups of equal size", size[1]);
    for (parameter, name) in [(weight, "weight"), (bias, "bias")] {
        ensure!(parameter.size() == [size[1]], "{name} has shape {:?}, x has {} channels", parameter.size(), size[1]);
        ensure!(parameter.is_contiguous() && parameter.kind() == weight.kind(), "{name} is not as plain as the weight");
    }
    if let Some(shift) = shift {
        machine_for("group_norm_silu", &[shift])?;
        let fits = shift.size() == size[..2] && shift.is_contiguous() && shift.kind() == Kind::Float;
        ensure!(fits, "the shift is {:?} {:?}, expected f32 {:?}", shift.kind(), shift.size(), &size[..2]);
    }
    // SAFETY: live tensors; the result is a new one
    unsafe {
        let shift = shift.map_or(std::ptr::null(), |shift| shift.as_ptr());
        let y =
            group_norm_silu_apply(x.as_ptr(), shift, weight.as_ptr(), bias.as_ptr(), groups, epsilon, i32::from(silu));
        made(y, group_norm_silu_last_error)
    }
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
    unsafe fn floats(&self, address: *const f32, length: usize) -> Option<Slice<'_>> {
        (!address.is_null()).then(|| Slice::from_raw(address as u64, length, Element::F32))
    }

    /// # Safety
    /// The pointers are what the C++ side makes them.
    unsafe fn inputs(&self) -> DeviceInputs<'_> {
        let shape = self.shape();
        let statistics = shape.samples * shape.groups;
        let (x, parameter) = (self.place.element(), element(self.parameter_element));
        DeviceInputs {
            x: Slice::from_raw(self.x as u64, shape.elements(), x),
            shift: self.floats(self.shift, shape.samples * shape.channels),
            weight: Slice::from_raw(self.weight as u64, shape.channels, parameter),
            bias: Slice::from_raw(self.bias as u64, shape.channels, parameter),
            mean: Slice::from_raw(self.mean as u64, statistics, Element::F32),
            rstd: Slice::from_raw(self.rstd as u64, statistics, Element::F32),
            channel_mean: self.floats(self.channel_mean, shape.samples * shape.channels),
        }
    }
}

extern "C" fn workspace(call: *const Call) -> i64 {
    // SAFETY: the C++ side gives a live call
    let call = unsafe { &*call };
    let bytes = if call.is_backward() { backward_workspace(&call.shape()) } else { forward_workspace(&call.shape()) };
    bytes as i64
}

extern "C" fn forward(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &*call };
    call.place.report("group_norm_silu", || {
        let shape = call.shape();
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let (inputs, y, workspace) = unsafe {
            let y = Slice::from_raw(call.y as u64, shape.elements(), call.place.element());
            let workspace = Slice::from_raw(call.workspace as u64, call.workspace_bytes as usize / 4, Element::F32);
            (call.inputs(), y, workspace)
        };
        launch_forward(&*call.place.machine()?, &inputs, y, workspace, &shape)
    })
}

extern "C" fn backward(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &*call };
    call.place.report("group_norm_silu", || {
        let shape = call.shape();
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let (inputs, gradients) = unsafe {
            let gradients = DeviceGradients {
                grad_y: Slice::from_raw(call.grad_y as u64, shape.elements(), call.place.element()),
                grad_x: Slice::from_raw(call.grad_x as u64, shape.elements(), call.place.element()),
                grad_weight: Slice::from_raw(call.grad_weight as u64, shape.channels, Element::F32),
                grad_bias: Slice::from_raw(call.grad_bias as u64, shape.channels, Element::F32),
                grad_shift: call.floats(call.grad_shift, shape.samples * shape.channels),
                workspace: Slice::from_raw(call.workspace as u64, call.workspace_bytes as usize / 8, Element::F64),
            };
            (call.inputs(), gradients)
        };
        launch_backward(&*call.place.machine()?, &inputs, &gradients, &shape)
    })
}
