//! What the differentiable operations share: an autograd node of libtorch (`csrc/`) calls back for the work, which the
//! kernels of an installed machine do.

use std::ffi::{c_char, CStr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, RwLock};

use anyhow::{anyhow, ensure, Context, Result};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

use super::cuda::{Element, Machine};

/// `Place` of `csrc/operation.h`.
#[repr(C)]
pub(super) struct Place {
    element: i32,
    device: i32,
    stream: u64,
    message: *mut c_char,
    message_bytes: i64,
}

static MACHINE: RwLock<Option<Arc<dyn Machine>>> = RwLock::new(None);

/// Makes `machine` do the work of all differentiable operations from now on.
pub fn install(machine: Arc<dyn Machine>) {
    *MACHINE.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(machine);
    super::geglu::register();
    super::group_norm_silu::register();
    super::layer_norm::register();
}

/// The installed machine, for `operation`.
///
/// # Errors
/// None is installed; one of the tensors is not on its device or of a type that kernels do not take.
pub(super) fn machine_for(operation: &str, tensors: &[&Tensor]) -> Result<Arc<dyn Machine>> {
    let installed = MACHINE.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    let machine = installed.with_context(|| format!("{operation} is used without a GPU: no kernels are installed"))?;
    for tensor in tensors {
        ensure!(
            tensor.device() == machine.device(),
            "a tensor lies on {:?}, not on the kernels' device",
            tensor.device()
        );
        Element::of(tensor.kind())?.variant(operation)?;
    }
    Ok(machine)
}

/// The tensor that the C++ side made, or its error.
///
/// # Safety
/// `made` is null, or a new tensor that nobody else owns; `last_error` gives a C string of this thread.
pub(super) unsafe fn made(made: *mut C_tensor, last_error: unsafe extern "C" fn() -> *const c_char) -> Result<Tensor> {
    if made.is_null() {
        return Err(anyhow!(CStr::from_ptr(last_error()).to_string_lossy().into_owned()));
    }
    Ok(Tensor::from_ptr(made))
}

/// Number type by its code in `csrc/operation.h`.
pub(super) fn element(code: i32) -> Element {
    [Element::F32, Element::Bf16, Element::F16][code as usize]
}

impl Place {
    pub(super) fn element(&self) -> Element {
        element(self.element)
    }

    pub(super) fn machine(&self) -> Result<Arc<dyn Machine>> {
        let machine = machine_for("an operation", &[])?;
        let device = if self.device < 0 { Device::Cpu } else { Device::Cuda(self.device as usize) };
        ensure!(device == machine.device(), "the tensors lie on {device:?}, not on the kernels' device");
        Ok(machine.on_stream(self.stream))
    }

    /// Runs a pass; an error or a panic becomes the message and -1.
    pub(super) fn report(&self, operation: &str, pass: impl FnOnce() -> Result<()>) -> i32 {
        let message = match catch_unwind(AssertUnwindSafe(pass)) {
            Ok(Ok(())) => return 0,
            Ok(Err(error)) => format!("{operation}: {error:#}"),
            Err(_) => format!("{operation}: the launcher panicked"),
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
