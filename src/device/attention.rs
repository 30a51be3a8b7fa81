//! Which attention kernels libtorch takes on a device, and the cuDNN that they and the convolutions come from.

use anyhow::{anyhow, ensure, Result};
use tch::{Device, Kind, Tensor};

use super::torch_cuda::cudnn;

/// cuDNN's newest version whose attention libtorch 2.11 does not prefer.
const PASSED_OVER: i64 = 91_500;

/// The attention kernels that libtorch takes for a U-Net's self-attention in `kind`.
///
/// # Errors
/// libtorch cannot say.
pub fn backend(device: Device, kind: Kind) -> Result<&'static str> {
    // a head of 64 over 16 × 16 places, as in the middle of Stable Diffusion's U-Net
    let query = Tensor::f_zeros([1, 8, 256, 64], (kind, device))?;
    let choice = Tensor::f_internal_fused_sdp_choice::<Tensor>(&query, &query, &query, None, 0.0, false, None, false)?;
    Ok(match choice {
        0 => "plain products",
        1 => "FlashAttention",
        2 => "memory-efficient",
        3 => "cuDNN",
        other => return Err(anyhow!("libtorch chose attention of an unknown kind, {other}")),
    })
}

/// cuDNN's version as it counts itself, 91900 for 9.19.0.
///
/// # Errors
/// libtorch_cuda is not open, or has none.
pub fn cudnn_version() -> Result<i64> {
    let version = cudnn()?;
    ensure!(version > 0, "libtorch_cuda has no cuDNN");
    Ok(version)
}

/// A version as people write it.
pub fn cudnn_in_words(version: i64) -> String {
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}

/// What to say of a version that libtorch passes over for attention.
pub fn cudnn_warning(version: i64) -> Option<String> {
    (version <= PASSED_OVER).then(|| {
        format!(
            "with cuDNN {} (9.15.0 or earlier) libtorch takes slower attention on Hopper; its own is 9.19: is another one on \
             LD_LIBRARY_PATH?",
            cudnn_in_words(version)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cudnn_up_to_9_15_is_warned_of() {
        for (version, words, doubtful) in [
            (91_900, "9.19.0", false),
            (91_600, "9.16.0", false),
            (91_501, "9.15.1", false),
            (91_500, "9.15.0", true),
            (90_100, "9.1.0", true),
        ] {
            assert_eq!(cudnn_in_words(version), words);
            assert_eq!(cudnn_warning(version).is_some(), doubtful, "{words}");
        }
        assert!(cudnn_warning(91_500).unwrap().starts_with("with cuDNN 9.15.0 "));
    }

    #[test]
    fn the_attention_of_this_processor_is_named() {
        let named = backend(Device::Cpu, Kind::Float).unwrap();
        assert!(["plain products", "FlashAttention"].contains(&named), "{named}");
        if !tch::Cuda::is_available() {
            assert!(cudnn_version().is_err());
        }
    }
}
