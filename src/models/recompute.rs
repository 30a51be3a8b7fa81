//! Gradient checkpointing (Chen et al., arXiv 1604.06174): y = f(inputs), where f's activations are computed again in
//! the backward pass instead of kept. Costs one more forward pass of f, saves all of its activations but the inputs.
//!
//! The second run does the same operations on the same numbers, so outputs and gradients are those of a plain call.

use std::{
    ffi::{c_char, c_void, CStr},
    panic::{catch_unwind, AssertUnwindSafe},
    sync::atomic::{AtomicBool, Ordering},
};

use tch::Tensor;
use torch_sys::C_tensor;

use super::flops;

/// Which parts of a U-Net are run so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recomputed {
    #[default]
    Nothing,
    /// Those at the full resolution of the latents, which hold most of the activations: half of the operations of
    /// [`Recomputed::Everything`] at most for most of the memory.
    Level0,
    Everything,
}

impl From<bool> for Recomputed {
    fn from(everything: bool) -> Self {
        if everything {
            Recomputed::Everything
        } else {
            Recomputed::Nothing
        }
    }
}

type Function = dyn Fn(&[Tensor]) -> Tensor;

/// f, called once more for the backward pass, on the thread that runs that pass.
struct Piece {
    f: Box<Function>,
    /// It has run once.
    ran: AtomicBool,
}

impl Piece {
    fn run(&self, inputs: &[Tensor]) -> Tensor {
        match self.ran.swap(true, Ordering::Relaxed) {
            false => (self.f)(inputs),
            true => flops::uncounted(|| (self.f)(inputs)),
        }
    }
}

type RunPiece = unsafe extern "C" fn(*mut c_void, *const *mut C_tensor, usize, *mut c_char, usize) -> *mut C_tensor;
type DropPiece = unsafe extern "C" fn(*mut c_void);

extern "C" {
    fn recompute_last_error() -> *const c_char;
    fn recompute_run(
        inputs: *const *mut C_tensor,
        input_count: usize,
        parameters: *const *mut C_tensor,
        parameter_count: usize,
        closure: *mut c_void,
        run: RunPiece,
        drop: DropPiece,
    ) -> *mut C_tensor;
}

/// f(inputs). `parameters` are the leaves that f uses besides: only those get a gradient through this call. What f
/// owns must be shareable (an `Arc` of a block): the autograd graph keeps it until its backward pass is over, and
/// runs it on a thread of its own while the caller of that pass waits.
///
/// # Panics
/// As f does.
pub fn recompute(inputs: &[&Tensor], parameters: &[Tensor], f: impl Fn(&[Tensor]) -> Tensor + 'static) -> Tensor {
    let inputs: Vec<_> = inputs.iter().map(|t| t.as_ptr().cast_mut()).collect();
    let parameters: Vec<_> = parameters.iter().map(|t| t.as_ptr().cast_mut()).collect();
    let closure = Box::new(Piece { f: Box::new(f), ran: AtomicBool::new(false) });
    // SAFETY: the tensors outlive the call, which copies their handles; it takes over the closure and gives it back to
    // `drop_piece` once, also after a failure.
    unsafe {
        let output = recompute_run(
            inputs.as_ptr(),
            inputs.len(),
            parameters.as_ptr(),
            parameters.len(),
            Box::into_raw(closure).cast(),
            run_piece,
            drop_piece,
        );
        if output.is_null() {
            panic!("{}", CStr::from_ptr(recompute_last_error()).to_string_lossy());
        }
        Tensor::from_ptr(output)
    }
}

/// A panic must not cross the C++ frames: its message goes into `error` instead.
unsafe extern "C" fn run_piece(
    piece: *mut c_void,
    inputs: *const *mut C_tensor,
    count: usize,
    error: *mut c_char,
    capacity: usize,
) -> *mut C_tensor {
    // SAFETY: `piece` is the box made in `recompute`, alive until `drop_piece`; `inputs` are `count` tensors alive
    // during the call, of which new handles are made.
    let (piece, inputs) = unsafe {
        let handles = std::slice::from_raw_parts(inputs, count);
        (&*piece.cast::<Piece>(), handles.iter().map(|&t| Tensor::clone_from_ptr(t)).collect::<Vec<_>>())
    };
    match catch_unwind(AssertUnwindSafe(|| piece.run(&inputs))) {
        Ok(output) => {
            let handle = output.as_ptr().cast_mut();
            std::mem::forget(output);
            handle
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|t| t.to_string())).unwrap_or_default();
            let bytes = &text.as_bytes()[..text.len().min(capacity - 1)];
            // SAFETY: `error` has room for `capacity` bytes, all zero before.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), error.cast(), bytes.len()) };
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn drop_piece(piece: *mut c_void) {
    // SAFETY: the box made in `recompute`, given back once.
    drop(unsafe { Box::from_raw(piece.cast::<Piece>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn field(phase: f64, rows: i64) -> Tensor {
        (Tensor::arange(rows * 6, (Kind::Float, Device::Cpu)) * 0.71 + phase).sin().view([rows, 6])
    }

    /// x·Wᵀ, silu, times W again; the second input is added.
    fn piece(inputs: &[Tensor], w: &Tensor) -> Tensor {
        inputs[0].matmul(&w.transpose(0, 1)).silu().matmul(w) + &inputs[1]
    }

    #[test]
    fn outputs_and_gradients_are_those_of_a_plain_call() {
        let (w, x) = (field(0.3, 4).set_requires_grad(true), field(1.0, 5).set_requires_grad(true));
        let (frozen, other) = (field(2.0, 5), field(3.0, 4).set_requires_grad(true));
        let of = |y: Tensor| {
            let gradients = Tensor::run_backward(&[(&y * &y * 0.5).sum(Kind::Float)], &[&x, &w], false, false);
            (y, gradients)
        };
        let (plain, expected) = of(piece(&[&x * 2.0, frozen.shallow_clone()], &w));
        let shared = w.shallow_clone();
        let again = recompute(&[&(&x * 2.0), &frozen], &[w.shallow_clone(), other], move |i| piece(i, &shared));
        assert!(again.requires_grad());
        let (again, gradients) = of(again);
        assert_eq!(again, plain);
        assert_eq!(gradients[0], expected[0]);
        assert_eq!(gradients[1], expected[1]);
    }

    #[test]
    fn gradients_reach_the_leaves_of_an_ordinary_backward_pass() {
        let w = field(0.3, 4).set_requires_grad(true);
        let (x, zero) = (field(1.0, 5), Tensor::zeros([5, 6], (Kind::Float, Device::Cpu)));
        let shared = w.shallow_clone();
        let y = recompute(&[&x, &zero], &[w.shallow_clone()], move |i| piece(i, &shared));
        y.sum(Kind::Float).backward();
        let expected = w.grad().copy();
        let mut again = w.detach().set_requires_grad(true);
        piece(&[x, zero], &again).sum(Kind::Float).backward();
        assert_eq!(again.grad(), expected);
        again.zero_grad();
    }

    #[test]
    fn without_gradients_nothing_is_kept() {
        let w = field(0.3, 4).set_requires_grad(true);
        let token = std::sync::Arc::new(());
        let held = token.clone();
        let shared = w.shallow_clone();
        let y = tch::no_grad(|| {
            recompute(&[&field(1.0, 5), &field(2.0, 5)], &[w.shallow_clone()], move |i| {
                let _ = &held;
                piece(i, &shared)
            })
        });
        assert!(!y.requires_grad());
        assert_eq!(std::sync::Arc::strong_count(&token), 1);
    }

    #[test]
    fn a_failure_inside_is_the_callers_panic() {
        let message = |f: &dyn Fn()| {
            let panic = catch_unwind(AssertUnwindSafe(f)).unwrap_err();
            panic.downcast_ref::<String>().cloned().unwrap_or_default()
        };
        let text = message(&|| drop(recompute(&[&field(1.0, 5)], &[], |_| panic!("the {}th wheel came off", 5))));
        assert!(text.contains("the 5th wheel came off"), "{text}");
    }
}
