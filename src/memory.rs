//! Out of memory: libtorch says how much was missing, this says where, with what batch, and what to change.

use std::sync::Mutex;

/// What the process is at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stage {
    name: String,
    samples: usize,
    advice: String,
}

/// Of the whole process: a backward pass on a GPU fails in a thread of libtorch's.
static STAGES: Mutex<Vec<Stage>> = Mutex::new(Vec::new());

/// While it lives, a lack of memory is reported as one of this stage.
#[must_use]
pub struct Guard(());

/// `samples` are computed at once; `advice` says which settings make that less.
pub fn stage(name: impl Into<String>, samples: usize, advice: impl Into<String>) -> Guard {
    lock().push(Stage { name: name.into(), samples, advice: advice.into() });
    Guard(())
}

fn lock() -> std::sync::MutexGuard<'static, Vec<Stage>> {
    // a panic elsewhere must not hide what is known
    STAGES.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Drop for Guard {
    fn drop(&mut self) {
        // where a panic unwinds, its report has already been made
        lock().pop();
    }
}

/// What to tell the user in place of `message`, if that is libtorch's way of saying that there is no memory left.
pub fn explain(message: &str) -> Option<String> {
    // no waiting: this runs in a panic, perhaps one of the thread that holds the lock
    let stage = STAGES.try_lock().ok().and_then(|stages| stages.last().cloned());
    explain_at(stage.as_ref(), message)
}

fn explain_at(stage: Option<&Stage>, message: &str) -> Option<String> {
    const SIGNS: [&str; 6] = [
        "CUDA out of memory",
        "CUDA error: out of memory",
        // the driver's own, of what does not go through libtorch
        "CUDA_ERROR_OUT_OF_MEMORY",
        "can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    ];
    if !SIGNS.iter().any(|sign| message.contains(sign)) {
        return None;
    }
    let kind = if message.contains("can't allocate memory") { "memory" } else { "GPU memory" };
    let (place, advice) = match stage {
        Some(s) => {
            let samples = if s.samples == 1 { "1 sample".to_string() } else { format!("{} samples", s.samples) };
            (format!(" in the {} ({samples} at once)", s.name), s.advice.as_str())
        }
        None => (String::new(), "use a smaller model or a device with more memory"),
    };
    Some(format!("out of {kind}{place}{}: {advice}", missing(message).map(|m| format!(", {m}")).unwrap_or_default()))
}

/// "tried to allocate 2.00 GiB", as libtorch says it on a GPU and on the CPU.
fn missing(message: &str) -> Option<String> {
    let from = message.to_ascii_lowercase().find("tried to allocate")?;
    let rest = &message[from + "tried to allocate".len()..];
    let words: Vec<&str> = rest.split_whitespace().take(2).collect();
    let [amount, unit] = words[..] else { return None };
    Some(format!("tried to allocate {amount} {}", unit.trim_end_matches(['.', ',', '('])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> Stage {
        Stage { name: "update of task parity".into(), samples: 16, advice: "raise run.lanes".into() }
    }

    /// As libtorch 2.11 words it in CUDACachingAllocator.cpp.
    #[test]
    fn a_gpu_without_memory() {
        let text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which \
                    1.20 GiB is free. Process 7 has 77.90 GiB memory in use.";
        assert_eq!(
            explain_at(Some(&at()), text).unwrap(),
            "out of GPU memory in the update of task parity (16 samples at once), tried to allocate 2.50 GiB: raise \
             run.lanes"
        );
        assert!(explain_at(None, "CUDA error: out of memory").unwrap().starts_with("out of GPU memory: "));
        // the driver's word, as cudarc gives it, of an allocation beside libtorch's
        let text = "1769472 bytes of device memory: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        let told = explain_at(Some(&at()), text).expect("known");
        assert_eq!(told, "out of GPU memory in the update of task parity (16 samples at once): raise run.lanes");
        assert!(explain_at(Some(&at()), "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`").is_some());
    }

    /// libtorch's own words on this machine.
    #[test]
    fn a_host_without_memory() {
        let error = tch::Tensor::f_empty([1 << 50], (tch::Kind::Float, tch::Device::Cpu)).unwrap_err().to_string();
        let told = explain_at(Some(&at()), &error).expect(&error);
        let wanted =
            "out of memory in the update of task parity (16 samples at once), tried to allocate 4503599627370496 \
                      bytes: raise run.lanes";
        assert_eq!(told, wanted);
    }

    #[test]
    fn other_failures_stay_what_they_are() {
        assert_eq!(explain_at(Some(&at()), "mat1 and mat2 shapes cannot be multiplied"), None);
    }

    #[test]
    fn the_innermost_stage_is_named() {
        let outer = stage("roll-out", 8, "outer");
        {
            let _inner = stage("reward", 1, "inner");
            assert!(explain("CUDA out of memory.").unwrap().contains("reward (1 sample at once): inner"));
        }
        assert!(explain("CUDA out of memory.").unwrap().contains("roll-out (8 samples at once): outer"));
        drop(outer);
    }
}
