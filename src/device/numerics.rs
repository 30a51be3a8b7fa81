//! What libtorch computes in where a network is f32, and whether its kernels repeat. `csrc/numerics.cpp` is the other side.

use serde::{Deserialize, Serialize};
use tch::Device;

extern "C" {
    fn numerics_set_tf32(allow: i32) -> i32;
    fn numerics_begin_bf16(on_gpu: i32) -> i32;
    fn numerics_end_bf16(on_gpu: i32);
    fn numerics_set_deterministic(deterministic: i32);
    fn numerics_is_deterministic() -> i32;
}

/// What the networks that are not trained compute their products and convolutions in. Their weights, inputs and outputs are
/// f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Factors of 10 bits and sums in f32, by the tensor cores of a GPU. A CPU has none: f32 there.
    #[default]
    Tf32,
    F32,
    /// Factors of 7 bits and sums in f32; normalisations and the like stay f32 (libtorch's autocast).
    Bf16,
}

impl Precision {
    /// While what this gives lives, this thread computes so on `device`. A backward pass of what is computed now is to be
    /// within it too.
    pub fn enter(self, device: Device) -> Entered {
        let on_gpu = device != Device::Cpu;
        let undo = match self {
            // SAFETY: flags of libtorch
            Precision::Tf32 if on_gpu => Undo::Tf32(unsafe { numerics_set_tf32(1) }),
            // SAFETY: as above
            Precision::F32 if on_gpu => Undo::Tf32(unsafe { numerics_set_tf32(0) }),
            // SAFETY: as above
            Precision::Bf16 => match unsafe { numerics_begin_bf16(i32::from(on_gpu)) } {
                0 => Undo::Bf16(i32::from(on_gpu)),
                _ => Undo::Nothing,
            },
            Precision::Tf32 | Precision::F32 => Undo::Nothing,
        };
        Entered { undo, _here: std::marker::PhantomData }
    }
}

enum Undo {
    Nothing,
    Tf32(i32),
    Bf16(i32),
}

/// See [`Precision::enter`]. Of the thread that entered.
#[must_use]
pub struct Entered {
    undo: Undo,
    _here: std::marker::PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: flags of libtorch, back to what they were
        unsafe {
            match self.undo {
                Undo::Nothing => {}
                Undo::Tf32(before) => drop(numerics_set_tf32(before)),
                Undo::Bf16(on_gpu) => numerics_end_bf16(on_gpu),
            }
        }
    }
}

/// Whether the process uses kernels alone whose results repeat from run to run; an operation without one is then an error.
/// NCCL is told too, where it has not started yet.
pub fn set_deterministic(deterministic: bool) {
    // SAFETY: flags of libtorch, and an environment variable that its CUDA half reads
    unsafe { numerics_set_deterministic(i32::from(deterministic)) };
}

pub fn is_deterministic() -> bool {
    // SAFETY: reads a flag
    unsafe { numerics_is_deterministic() != 0 }
}

/// What to tell the user in place of `message`, if that is libtorch's way of saying that an operation has no kernel whose
/// results repeat.
pub fn explain(message: &str) -> Option<String> {
    const SIGN: &str = " does not have a deterministic implementation";
    let before = message.split(SIGN).next().filter(|before| before.len() < message.len())?;
    let operation = before.split_whitespace().last()?;
    Some(format!(
        "libtorch's {operation} has no kernel whose results repeat, which run.deterministic = true asks for: set it to false"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    fn product() -> (Tensor, Tensor) {
        let a = (Tensor::arange(64 * 64, (Kind::Float, Device::Cpu)) * 0.37).sin().view([64, 64]);
        let b = (Tensor::arange(64 * 64, (Kind::Float, Device::Cpu)) * 0.73).cos().view([64, 64]);
        (a.matmul(&b), a.to_kind(Kind::BFloat16).matmul(&b.to_kind(Kind::BFloat16)))
    }

    #[test]
    fn a_precision_holds_as_long_as_its_guard() {
        let (before, in_bf16) = product();
        assert_eq!(before.kind(), Kind::Float);
        for precision in [Precision::Tf32, Precision::F32] {
            let _entered = precision.enter(Device::Cpu);
            assert_eq!(product().0, before, "{precision:?} on a CPU");
        }
        {
            let _outer = Precision::Bf16.enter(Device::Cpu);
            {
                let _inner = Precision::Bf16.enter(Device::Cpu);
                assert_eq!(product().0, in_bf16);
            }
            assert_eq!(product().0, in_bf16, "the inner guard ended the outer one");
        }
        assert_eq!(product().0, before);
    }

    /// As libtorch 2.11 words it in Context.cpp.
    #[test]
    fn what_has_no_deterministic_kernel_is_named() {
        let text = "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but you set \
                    'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation";
        let told = explain(text).unwrap();
        assert!(told.contains("libtorch's upsample_bicubic2d_backward_out_cuda has no kernel"), "{told}");
        assert_eq!(explain("mat1 and mat2 shapes cannot be multiplied"), None);
    }
}
