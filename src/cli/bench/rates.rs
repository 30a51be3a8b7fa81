//! What a device can do at most, measured: a large matrix product and a large copy. Percentages are of these.

use anyhow::Result;
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use super::median;
use crate::device::stopwatch;

/// Measured rates of a device.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Operations per second of a square matrix product of random numbers.
    pub matrix: f64,
    /// Bytes per second of a copy within the memory, read and written bytes both counted.
    pub copy: f64,
}

impl Rates {
    /// Products in `kind`; sizes that fill a GPU, or that a host does in a moment.
    pub fn measure(device: Device, kind: Kind) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (side, elements) = if device == Device::Cpu { (1024i64, 1 << 24) } else { (8192, 1 << 29) };
        let [a, b] = [0, 1].map(|_| Tensor::randn([side, side], (Kind::Float, device)).to_kind(kind));
        let mut product = a.zeros_like();
        let matrix = median_seconds(device, || {
            product = a.matmul(&b);
            Ok(())
        })?;
        let from = Tensor::ones([elements], (Kind::Float, device));
        let mut to = from.zeros_like();
        let copy = median_seconds(device, || {
            to.copy_(&from);
            Ok(())
        })?;
        Ok(Rates { matrix: 2.0 * (side as f64).powi(3) / matrix, copy: 8.0 * elements as f64 / copy })
    }

    pub fn to_json(self) -> Value {
        json!({"matrix_tflops": self.matrix / 1e12, "copy_gigabytes_per_second": self.copy / 1e9})
    }

    pub fn describe(&self) -> String {
        format!("measured rates: matrix product {:.3} TFLOP/s, copy {:.1} GB/s", self.matrix / 1e12, self.copy / 1e9)
    }
}

/// Median seconds of seven runs after three.
fn median_seconds(device: Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..3).try_for_each(|_| work())?;
    let seconds = (0..7).map(|_| stopwatch::seconds(device, &mut work)).collect::<Result<Vec<_>>>()?;
    Ok(median(seconds))
}
