//! Layer normalisation (Ba et al.) of rows, forward and backward.
//!
//! ```text
//! forward   x̂ = (x − mean)·rstd,   y = x̂·weight + bias
//! backward  dx = rstd·(dy·weight − mean(dy·weight) − x̂·mean(dy·weight·x̂)),   dweight = Σ dy·x̂,   dbias = Σ dy
//! ```
//!
//! mean and rstd = 1/√(variance + ε) are of a row, the sums over the rows. libtorch's own takes two to three times as long
//! as the memory needs for rows of a few hundred elements.

use std::ffi::{c_char, c_void};

use anyhow::{ensure, Result};
use tch::Tensor;
use torch_sys::C_tensor;

use super::cuda::{arguments, ensure_apart, Element, Machine, Slice};
use super::operation::{element, machine_for, made, Place};

/// `Call` of `csrc/layer_norm.cpp`.
#[repr(C)]
struct Call {
    place: Place,
    x: *const c_void,
    weight: *const c_void,
    bias: *const c_void,
    dy: *const c_void,
    y: *mut c_void,
    dx: *mut c_void,
    mean: *mut f32,
    rstd: *mut f32,
    grad_weight: *mut f32,
    grad_bias: *mut f32,
    workspace: *mut c_void,
    workspace_bytes: i64,
    rows: i64,
    width: i64,
    parameter_element: i32,
    epsilon: f64,
}

extern "C" {
    fn layer_norm_last_error() -> *const c_char;
    fn layer_norm_register(launcher: extern "C" fn(*mut Call) -> i32, workspace: extern "C" fn(*const Call) -> i64);
    fn layer_norm_apply(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        epsilon: f64,
    ) -> *mut C_tensor;
}

pub(super) fn register() {
    // SAFETY: the functions have the types the C++ side declares
    unsafe { layer_norm_register(pass, workspace) };
}

/// Packs of 16 bytes that a row may have.
const MOST_PACKS: usize = 256;

/// Whether rows like those of x `[…, C]` fit the kernel: at most 4,096 bytes.
pub fn fits(x: &Tensor) -> bool {
    let width = x.size().last().copied().unwrap_or(0) as usize;
    width > 0 && width * x.kind().elt_size_in_bytes() <= 16 * MOST_PACKS
}

/// y of x `[…, C]`, weight and bias `[C]`, differentiable once; each f32, bf16 or f16 (weight and bias alike), on the
/// device of the machine that was installed. y has x's shape and number type.
///
/// # Errors
/// No machine is installed, tensors on another device, rows that do not [fit](fits), a launch that fails.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    machine_for("layer_norm", &[x, weight, bias])?;
    ensure!(fits(x), "rows of x {:?} are too long for the kernel", x.size());
    for (parameter, name) in [(weight, "weight"), (bias, "bias")] {
        ensure!(
            parameter.size() == x.size()[x.dim() - 1..]
                && parameter.is_contiguous()
                && parameter.kind() == weight.kind(),
            "{name} is {:?} {:?} for x {:?}",
            parameter.kind(),
            parameter.size(),
            x.size()
        );
    }
    // SAFETY: live tensors; the result is a new one
    unsafe { made(layer_norm_apply(x.as_ptr(), weight.as_ptr(), bias.as_ptr(), epsilon), layer_norm_last_error) }
}

impl Call {
    fn shape(&self) -> Shape {
        Shape { rows: self.rows as usize, width: self.width as usize, epsilon: self.epsilon }
    }
}

extern "C" fn workspace(call: *const Call) -> i64 {
    // SAFETY: the C++ side gives a live call
    unsafe { &*call }.shape().workspace_bytes() as i64
}

extern "C" fn pass(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &*call };
    call.place.report("layer_norm", || {
        let (shape, kind) = (call.shape(), call.place.element());
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let slice = |address: *const c_void, length: usize, element: Element| unsafe {
            Slice::from_raw(address as u64, length, element)
        };
        let parameter = element(call.parameter_element);
        let inputs = DeviceInputs {
            x: slice(call.x, shape.elements(), kind),
            weight: slice(call.weight, shape.width, parameter),
            bias: slice(call.bias, shape.width, parameter),
            mean: slice(call.mean.cast(), shape.rows, Element::F32),
            rstd: slice(call.rstd.cast(), shape.rows, Element::F32),
        };
        let machine = call.place.machine()?;
        if call.dx.is_null() {
            return launch_forward(&*machine, &inputs, slice(call.y, shape.elements(), kind), &shape);
        }
        let parameters = (!call.grad_weight.is_null()).then(|| ParameterGradients {
            weight: slice(call.grad_weight.cast(), shape.width, Element::F32),
            bias: slice(call.grad_bias.cast(), shape.width, Element::F32),
            workspace: slice(call.workspace, call.workspace_bytes as usize / 4, Element::F32),
        });
        let (dy, dx) = (slice(call.dy, shape.elements(), kind), slice(call.dx, shape.elements(), kind));
        launch_backward(&*machine, &inputs, dy, dx, parameters.as_ref(), &shape)
    })
}

/// What is normalised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub rows: usize,
    pub width: usize,
    /// ε, inside the square root.
    pub epsilon: f64,
}

impl Shape {
    pub fn elements(&self) -> usize {
        self.rows * self.width
    }

    /// Rows of a block's piece of the parameters' gradients: at least 32, and at most 512 pieces.
    fn rows_per_piece(&self) -> usize {
        self.rows.div_ceil(512).max(32)
    }

    fn pieces(&self) -> usize {
        self.rows.div_ceil(self.rows_per_piece())
    }

    /// Of [`ParameterGradients::workspace`].
    pub fn workspace_bytes(&self) -> usize {
        8 * self.pieces() * self.width
    }

    fn on_device(&self, element: Element, parameter: Element) -> Result<DeviceShape> {
        let packs = self.width.div_ceil(16 / element.bytes());
        ensure!(self.width > 0 && packs <= MOST_PACKS, "rows of {} elements do not fit the kernel", self.width);
        ensure!(self.rows < 1 << 30, "{} rows are too many for a launch", self.rows);
        Ok(DeviceShape {
            rows: self.rows as u32,
            width: self.width as u32,
            // as few as hold a row, 8 packs each
            lanes: packs.div_ceil(8).next_power_of_two().clamp(8, 32) as u32,
            rows_per_piece: self.rows_per_piece() as u32,
            parameter_kind: parameter.variant("weight")? as u32,
            epsilon: self.epsilon as f32,
        })
    }
}

/// `Shape` of `cuda/layer_norm.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DeviceShape {
    rows: u32,
    width: u32,
    lanes: u32,
    rows_per_piece: u32,
    parameter_kind: u32,
    epsilon: f32,
}

/// Input of both passes on the device.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInputs<'a> {
    /// f32, bf16 or f16, `[rows, width]`.
    pub x: Slice<'a>,
    /// f32, bf16 or f16, `[width]`.
    pub weight: Slice<'a>,
    /// As weight.
    pub bias: Slice<'a>,
    /// f32 `[rows]`: written by the forward pass, read by the backward pass.
    pub mean: Slice<'a>,
    /// As mean.
    pub rstd: Slice<'a>,
}

impl DeviceInputs<'_> {
    fn check(&self, shape: &Shape) -> Result<DeviceShape> {
        self.x.element().variant("x")?;
        self.x.expect(shape.elements(), self.x.element(), "x")?;
        self.weight.expect(shape.width, self.weight.element(), "weight")?;
        self.bias.expect(shape.width, self.weight.element(), "bias")?;
        self.mean.expect(shape.rows, Element::F32, "mean")?;
        self.rstd.expect(shape.rows, Element::F32, "rstd")?;
        shape.on_device(self.x.element(), self.weight.element())
    }
}

/// Where the gradients of weight and bias go.
#[derive(Clone, Copy, Debug)]
pub struct ParameterGradients<'a> {
    /// f32 `[width]`.
    pub weight: Slice<'a>,
    /// f32 `[width]`.
    pub bias: Slice<'a>,
    /// [`Shape::workspace_bytes`] bytes, as f32.
    pub workspace: Slice<'a>,
}

/// Writes y (number type of x), mean and rstd.
///
/// # Errors
/// Slices that do not fit the shape or overlap; a launch that fails.
pub fn launch_forward(machine: &dyn Machine, inputs: &DeviceInputs, y: Slice, shape: &Shape) -> Result<()> {
    let device_shape = inputs.check(shape)?;
    y.expect(shape.elements(), inputs.x.element(), "y")?;
    ensure_apart(&[y, inputs.mean, inputs.rstd], &[inputs.x, inputs.weight, inputs.bias])?;
    if shape.rows == 0 {
        return Ok(());
    }
    let kernel = ["layer_norm_forward_f32", "layer_norm_forward_bf16", "layer_norm_forward_f16"]
        [inputs.x.element().variant("x")?];
    let DeviceInputs { x, weight, bias, mean, rstd } = inputs;
    let [x, weight, bias, mean, rstd, y] = [x, weight, bias, mean, rstd, &y].map(Slice::address);
    let blocks = device_shape.rows.div_ceil(256 / device_shape.lanes);
    // SAFETY: types and order as in cuda/layer_norm.cu; lengths checked above
    unsafe { machine.launch(kernel, [blocks, 1], 256, arguments![x, weight, bias, y, mean, rstd, device_shape]) }
}

/// Writes dx (number type of x) and, where wanted, the parameters' gradients, with mean and rstd of [`launch_forward`].
///
/// # Errors
/// As [`launch_forward`].
pub fn launch_backward(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    dy: Slice,
    dx: Slice,
    parameters: Option<&ParameterGradients>,
    shape: &Shape,
) -> Result<()> {
    let device_shape = inputs.check(shape)?;
    dy.expect(shape.elements(), inputs.x.element(), "dy")?;
    dx.expect(shape.elements(), inputs.x.element(), "dx")?;
    let mut written = vec![dx];
    if let Some(ParameterGradients { weight, bias, workspace }) = parameters {
        weight.expect(shape.width, Element::F32, "grad_weight")?;
        bias.expect(shape.width, Element::F32, "grad_bias")?;
        workspace.expect(shape.workspace_bytes() / 4, Element::F32, "workspace")?;
        written.extend([*weight, *bias, *workspace]);
    }
    let &DeviceInputs { x, weight, mean, rstd, .. } = inputs;
    ensure_apart(&written, &[x, dy, weight, mean, rstd])?;
    let variant = x.element().variant("x")?;
    let [x, dy, weight, mean, rstd, dx] = [x, dy, weight, mean, rstd, dx].map(|slice| slice.address());
    let kernel = ["layer_norm_backward_f32", "layer_norm_backward_bf16", "layer_norm_backward_f16"][variant];
    let sums =
        ["layer_norm_backward_sums_f32", "layer_norm_backward_sums_bf16", "layer_norm_backward_sums_f16"][variant];
    let blocks = device_shape.rows.div_ceil(256 / device_shape.lanes);
    // SAFETY: types and order as in cuda/layer_norm.cu; lengths checked above
    unsafe {
        if shape.rows > 0 {
            machine.launch(kernel, [blocks, 1], 256, arguments![x, dy, weight, mean, rstd, dx, device_shape])?;
        }
        let Some(parameters) = parameters else { return Ok(()) };
        let (partial, pieces) = (parameters.workspace.address(), shape.pieces() as u32);
        if pieces > 0 {
            machine.launch(sums, [pieces, 1], 256, arguments![x, dy, mean, rstd, partial, device_shape])?;
        }
        // without rows the gradients of the parameters are 0
        let (grad_weight, grad_bias) = (parameters.weight.address(), parameters.bias.address());
        let arguments = arguments![partial, grad_weight, grad_bias, pieces, device_shape.width];
        machine.launch("layer_norm_backward_parameters", [device_shape.width.div_ceil(8), 1], 256, arguments)
    }
}
