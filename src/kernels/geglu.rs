//! The gated activation of the U-Net's transformers (Shazeer's GEGLU), forward and backward: of rows \[a | b\]
//!
//! ```text
//! y = a·g(b),   g(b) = b·Φ(b)      da = dy·g(b),   db = dy·a·(Φ(b) + b·φ(b))
//! ```
//!
//! with Φ and φ the standard normal distribution and density. libtorch needs two passes over memory forward and five
//! backward, the kernel one each.

use std::ffi::{c_char, c_void};

use anyhow::{ensure, Result};
use tch::Tensor;
use torch_sys::C_tensor;

use super::cuda::{arguments, ensure_apart, Machine, Slice};
use super::operation::{machine_for, made, Place};

/// `Call` of `csrc/geglu.cpp`.
#[repr(C)]
struct Call {
    place: Place,
    h: *const c_void,
    dy: *const c_void,
    out: *mut c_void,
    rows: i64,
    width: i64,
}

extern "C" {
    fn geglu_last_error() -> *const c_char;
    fn geglu_register(launcher: extern "C" fn(*mut Call) -> i32);
    fn geglu_apply(h: *const C_tensor) -> *mut C_tensor;
}

pub(super) fn register() {
    // SAFETY: the function has the type the C++ side declares
    unsafe { geglu_register(pass) };
}

/// y `[…, W]` of h `[…, 2W]`, differentiable once; f32, bf16 or f16, on the device of the machine that was installed.
///
/// # Errors
/// An odd last dimension, no machine is installed, a launch that fails.
pub fn geglu(h: &Tensor) -> Result<Tensor> {
    let width = h.size().last().copied().unwrap_or(1);
    ensure!(width % 2 == 0, "geglu splits its last dimension in two, h has shape {:?}", h.size());
    machine_for("geglu", &[h])?;
    // SAFETY: a live tensor; the result is a new one
    unsafe { made(geglu_apply(h.as_ptr()), geglu_last_error) }
}

extern "C" fn pass(call: *mut Call) -> i32 {
    // SAFETY: the C++ side gives a live call that nobody else uses
    let call = unsafe { &*call };
    call.place.report("geglu", || {
        let (rows, width, element) = (call.rows as usize, call.width as usize, call.place.element());
        // SAFETY: libtorch's tensors of these sizes, alive through the call and then kept in stream order
        let slice = |address: u64, columns: usize| unsafe { Slice::from_raw(address, rows * columns, element) };
        let (h, machine) = (slice(call.h as u64, 2 * width), call.place.machine()?);
        if call.dy.is_null() {
            launch_forward(&*machine, h, slice(call.out as u64, width), width)
        } else {
            launch_backward(&*machine, h, slice(call.dy as u64, width), slice(call.out as u64, 2 * width), width)
        }
    })
}

/// Blocks for `rows` of `width` elements, as in `cuda/geglu.cu`, and the number of rows.
fn grid(h: &Slice, width: usize) -> Result<(u32, u32)> {
    const PACKS_OF_BLOCK: usize = 1024;
    ensure!(width > 0 && h.len() % (2 * width) == 0, "{} elements are no rows of 2·{width}", h.len());
    let rows = h.len() / (2 * width);
    let packs = rows * width.div_ceil(16 / h.element().bytes());
    ensure!(packs + PACKS_OF_BLOCK < 1 << 32, "{rows} rows of {width} elements are too many for a launch");
    Ok((packs.div_ceil(PACKS_OF_BLOCK) as u32, rows as u32))
}

/// Writes y (rows·width) of h (rows·2·width), one number type.
///
/// # Errors
/// Slices that do not fit together or overlap; a launch that fails.
pub fn launch_forward(machine: &dyn Machine, h: Slice, y: Slice, width: usize) -> Result<()> {
    let kernel = ["geglu_forward_f32", "geglu_forward_bf16", "geglu_forward_f16"][h.element().variant("h")?];
    if h.is_empty() && y.is_empty() {
        return Ok(());
    }
    let (blocks, rows) = grid(&h, width)?;
    y.expect(h.len() / 2, h.element(), "y")?;
    ensure_apart(&[y], &[h])?;
    let (h, y, width) = (h.address(), y.address(), width as u32);
    // SAFETY: types and order as in cuda/geglu.cu; lengths checked above
    unsafe { machine.launch(kernel, [blocks, 1], 256, arguments![h, y, rows, width]) }
}

/// Writes dh (rows·2·width) of h and dy (rows·width), one number type.
///
/// # Errors
/// As [`launch_forward`].
pub fn launch_backward(machine: &dyn Machine, h: Slice, dy: Slice, dh: Slice, width: usize) -> Result<()> {
    let kernel = ["geglu_backward_f32", "geglu_backward_bf16", "geglu_backward_f16"][h.element().variant("h")?];
    if h.is_empty() && dy.is_empty() && dh.is_empty() {
        return Ok(());
    }
    let (blocks, rows) = grid(&h, width)?;
    dy.expect(h.len() / 2, h.element(), "dy")?;
    dh.expect(h.len(), h.element(), "dh")?;
    ensure_apart(&[dh], &[h, dy])?;
    let (h, dy, dh, width) = (h.address(), dy.address(), dh.address(), width as u32);
    // SAFETY: types and order as in cuda/geglu.cu; lengths checked above
    unsafe { machine.launch(kernel, [blocks, 1], 256, arguments![h, dy, dh, rows, width]) }
}
