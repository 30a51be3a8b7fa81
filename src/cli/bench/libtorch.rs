//! What measurements ask of libtorch beyond tch (`csrc/bench.cpp`), and of the kernel: the peak of memory, and a backward
//! pass from a given gradient.

use std::ffi::{c_char, c_int, CStr};

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use tch::{Device, Tensor};
use torch_sys::C_tensor;

extern "C" {
    fn bench_last_error() -> *const c_char;
    fn bench_gpu_memory(index: c_int, figures: *mut i64) -> c_int;
    fn bench_backward(y: *mut C_tensor, dy: *mut C_tensor) -> c_int;
}

fn checked(code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: the last error of this thread, a C string that lives until the next one.
    bail!("{}", unsafe { CStr::from_ptr(bench_last_error()) }.to_string_lossy())
}

/// Memory of this process until now, in GB: the most on the host; on a GPU the most that tensors held
/// (`peak_allocated_gb`), that libtorch's allocator held for them (`peak_reserved_gb`, graphs included), and what is taken
/// of the whole card at this moment, CUDA's context and the libraries' buffers included (`card_used_gb`).
pub fn memory(device: Device) -> Result<Value> {
    let mut report = json!({"host_peak_gb": host_gb("VmHWM")?});
    if let Device::Cuda(index) = device {
        let mut figures = [0i64; 4];
        // SAFETY: room for the four numbers that are written.
        checked(unsafe { bench_gpu_memory(index as c_int, figures.as_mut_ptr()) })?;
        let [allocated, reserved, free, total] = figures.map(|bytes| bytes as f64 / 1e9);
        report["peak_allocated_gb"] = json!(allocated);
        report["peak_reserved_gb"] = json!(reserved);
        report["card_used_gb"] = json!(total - free);
        report["card_gb"] = json!(total);
    }
    Ok(report)
}

/// One line of [`memory`].
pub fn describe(memory: &Value) -> String {
    let gb = |key: &str| memory[key].as_f64().unwrap_or(f64::NAN);
    match memory.get("peak_allocated_gb") {
        Some(_) => format!(
            "memory: tensors {:.2} GB at most, libtorch's allocator {:.2} GB, {:.2} of the card's {:.1} GB taken",
            gb("peak_allocated_gb"),
            gb("peak_reserved_gb"),
            gb("card_used_gb"),
            gb("card_gb")
        ),
        None => format!("memory: {:.2} GB at most", gb("host_peak_gb")),
    }
}

/// A figure of this process's memory, in GB: `VmRSS` now, `VmHWM` at most (mapped files included).
pub fn host_gb(figure: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(figure)?.strip_prefix(':'));
    let kb: f64 = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).context("no such figure")?;
    Ok(kb * 1024.0 / 1e9)
}

/// Adds to the gradients of all leaves that made y, where the gradient by y is `dy`: nothing but that backward pass.
pub fn backward(y: &Tensor, dy: &Tensor) -> Result<()> {
    // SAFETY: two live tensors; libtorch counts its own references to them.
    checked(unsafe { bench_backward(y.as_ptr().cast_mut(), dy.as_ptr().cast_mut()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn the_gradient_is_that_of_the_given_one() {
        let x = Tensor::from_slice(&[1f32, 2.0, 3.0]).set_requires_grad(true);
        let y = &x * &x;
        backward(&y, &Tensor::from_slice(&[1f32, 10.0, 100.0])).unwrap();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0, 40.0, 600.0]);
        let constant = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        let error = backward(&constant, &constant).unwrap_err().to_string();
        assert!(error.contains("does not require grad"), "{error}");
    }

    #[test]
    fn the_hosts_peak_is_known_everywhere() {
        let seen = memory(Device::Cpu).unwrap();
        assert!(seen["host_peak_gb"].as_f64().unwrap() > 0.01 && seen.get("card_gb").is_none(), "{seen}");
        assert!(describe(&seen).ends_with("GB at most"));
        let gpu = json!({"peak_allocated_gb": 1.0, "peak_reserved_gb": 2.0, "card_used_gb": 3.0, "card_gb": 80.0});
        assert!(describe(&gpu).contains("3.00 of the card's 80.0 GB"));
    }
}
