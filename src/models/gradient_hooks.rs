//! Gradients as they come: a call for each parameter as soon as its gradient is complete, in the middle of the backward
//! pass. `csrc/gradient_hooks.cpp` is the other side.

use std::{
    ffi::{c_char, c_int, c_void, CStr},
    sync::Arc,
};

use anyhow::{bail, Result};
use tch::Tensor;
use torch_sys::C_tensor;

type Ready = unsafe extern "C" fn(user: *mut c_void, gradient: *const C_tensor);

extern "C" {
    fn gradient_hooks_last_error() -> *const c_char;
    fn gradient_hooks_set(leaf: *const C_tensor, ready: Ready, user: *mut c_void) -> c_int;
    fn gradient_hooks_remove(leaf: *const C_tensor) -> c_int;
}

/// Takes the gradient of leaf number `index`. Called by the thread that runs the backward pass: for tensors on the CPU
/// the one that called `backward`, for those on a GPU one of libtorch's while the caller waits.
pub trait GradientSink: Send + Sync {
    fn take(&self, index: usize, gradient: &Tensor);
}

struct Hook {
    index: usize,
    sink: Arc<dyn GradientSink>,
}

/// The hooks of some leaves; dropping it removes them.
pub struct GradientHooks {
    leaves: Vec<Tensor>,
    /// What libtorch has pointers to: boxed, so that it stays where it is.
    #[allow(clippy::vec_box)]
    _hooks: Vec<Box<Hook>>,
}

unsafe extern "C" fn ready(user: *mut c_void, gradient: *const C_tensor) {
    // SAFETY: `user` is a Hook that GradientHooks keeps alive as long as libtorch may call, `gradient` a tensor that is
    // borrowed for this call; the copy shares its memory.
    let (hook, gradient) = unsafe { (&*(user as *const Hook), Tensor::clone_from_ptr(gradient as *mut C_tensor)) };
    hook.sink.take(hook.index, &gradient);
}

impl GradientHooks {
    /// From now on `sink` gets the gradients of `leaves`, which no longer gather in `.grad`.
    pub fn new(leaves: &[Tensor], sink: Arc<dyn GradientSink>) -> Result<Self> {
        let mut all = GradientHooks { leaves: Vec::new(), _hooks: Vec::new() };
        for (index, leaf) in leaves.iter().enumerate() {
            let hook = Box::new(Hook { index, sink: sink.clone() });
            let user = &*hook as *const Hook as *mut c_void;
            // SAFETY: `leaf` is a live tensor; the hook outlives its registration, which Drop ends.
            if unsafe { gradient_hooks_set(leaf.as_ptr(), ready, user) } != 0 {
                // SAFETY: a string of this thread that lives until the next call.
                bail!("{}", unsafe { CStr::from_ptr(gradient_hooks_last_error()) }.to_string_lossy());
            }
            all.leaves.push(leaf.shallow_clone());
            all._hooks.push(hook);
        }
        Ok(all)
    }
}

impl Drop for GradientHooks {
    fn drop(&mut self) {
        for leaf in &self.leaves {
            // SAFETY: a live tensor. It fails only for one that has no autograd state, and then has no hook either.
            unsafe { gradient_hooks_remove(leaf.as_ptr()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tch::Kind;

    #[derive(Default)]
    struct Seen(Mutex<Vec<(usize, Vec<f32>)>>);

    impl GradientSink for Seen {
        fn take(&self, index: usize, gradient: &Tensor) {
            self.0.lock().unwrap().push((index, Vec::try_from(gradient).unwrap()));
        }
    }

    #[test]
    fn gradients_come_last_layer_first_and_are_not_kept() {
        let leaf = |v: f32| Tensor::from_slice(&[v]).set_requires_grad(true);
        let leaves = [leaf(2.0), leaf(3.0), leaf(5.0)];
        let seen = Arc::new(Seen::default());
        let hooks = GradientHooks::new(&leaves, seen.clone()).unwrap();
        let x = Tensor::from_slice(&[1.0f32]);
        // leaf 0 is used twice: one call, with the whole gradient
        let loss = || (((&x * &leaves[0] + &leaves[0]) * &leaves[1]) * 1.0).sum(Kind::Float);
        for _ in 0..2 {
            loss().backward();
        }
        let once = [(1, vec![4.0]), (0, vec![6.0])];
        assert_eq!(*seen.0.lock().unwrap(), [once.clone(), once].concat());
        assert!(leaves.iter().all(|leaf| !leaf.grad().defined()));
        drop(hooks);
        loss().backward();
        assert_eq!(leaves[0].grad().double_value(&[0]), 6.0);
        assert_eq!(seen.0.lock().unwrap().len(), 4);
    }
}
