//! What a device can do at most: a large matrix product that goes on for a while and a large copy, measured, and its
//! maker's figure. Percentages are of these.

use anyhow::Result;
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

use super::median;
use crate::device::{parts, stopwatch};

/// Measured rates of a device.
#[derive(Clone, Debug)]
pub struct Rates {
    /// Operations per second of a square matrix product of random numbers.
    pub matrix: f64,
    /// Bytes per second of a copy within the memory, read and written bytes both counted.
    pub copy: f64,
    /// The GPU's name, and the operations per second in bf16 that its maker states.
    pub gpu: Option<(String, Option<f64>)>,
}

impl Rates {
    /// Products in `kind`; sizes that fill a GPU, or that a host does in a moment.
    pub fn measure(device: Device, kind: Kind) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let on_host = device == Device::Cpu;
        // a GPU lowers its clocks within this time, if it is going to
        let matrix = Product::new(device, kind, None).sustained(if on_host { 0.05 } else { 1.0 })?.mean();
        let elements = if on_host { 1i64 << 24 } else { 1 << 29 };
        let from = Tensor::ones([elements], (Kind::Float, device));
        let mut to = from.zeros_like();
        let copy = median_seconds(device, || {
            to.copy_(&from);
            Ok(())
        })?;
        Ok(Rates { matrix, copy: 8.0 * elements as f64 / copy, gpu: gpu(device)? })
    }

    pub fn to_json(&self) -> Value {
        let mut all = json!({
            "matrix_tflops": self.matrix / 1e12, "copy_gigabytes_per_second": self.copy / 1e9,
        });
        if let Some((name, nominal)) = &self.gpu {
            all["gpu"] = json!(name);
            all["nominal_tflops"] = json!(nominal.map(|n| n / 1e12));
        }
        all
    }

    pub fn describe(&self) -> String {
        let gpu = match &self.gpu {
            Some((name, Some(nominal))) => format!("{name}, nominal {:.0} TFLOP/s in bf16; ", nominal / 1e12),
            Some((name, None)) => format!("{name}; "),
            None => String::new(),
        };
        format!(
            "{gpu}measured rates: matrix product {:.3} TFLOP/s, copy {:.1} GB/s",
            self.matrix / 1e12,
            self.copy / 1e9
        )
    }

    /// What `flops_per_second` is of the nominal rate and of the product.
    pub fn shares(&self, flops_per_second: f64) -> String {
        let nominal = self.gpu.as_ref().and_then(|gpu| gpu.1);
        let nominal = nominal.map_or(String::new(), |n| format!("{:.1} % of nominal, ", 100.0 * flops_per_second / n));
        format!("{nominal}{:.1} % of the matrix product", 100.0 * flops_per_second / self.matrix)
    }
}

/// The GPU's name and its nominal operations per second in bf16, where it is in the list.
pub fn gpu(device: Device) -> Result<Option<(String, Option<f64>)>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    Ok(parts::gpus()?.into_iter().nth(index).map(|gpu| {
        let nominal = nominal(&gpu.name);
        (gpu.name, nominal)
    }))
}

/// Dense operations per second in bf16 on tensor cores, by NVIDIA's data sheets (half of the figure with sparsity).
fn nominal(name: &str) -> Option<f64> {
    // the first that a name holds
    let known = [
        ("H100 PCIe", 756e12),
        ("H100 NVL", 835e12),
        ("H100", 989.4e12),
        ("H200", 989.4e12),
        ("B200", 2250e12),
        ("A100", 311.9e12),
        ("L40S", 362e12),
    ];
    known.iter().find(|(part, _)| name.contains(part)).map(|(_, rate)| *rate)
}

/// A square matrix product of random numbers.
pub struct Product {
    device: Device,
    side: i64,
    factors: [Tensor; 2],
    out: Tensor,
}

/// A product that went on for a while.
pub struct Sustained {
    /// Operations of one product.
    pub flop: f64,
    /// Seconds and products of every piece, about a tenth of a second each.
    pub pieces: Vec<(f64, usize)>,
}

impl Product {
    /// `side`³ multiplications; None: as many as fill the device.
    pub fn new(device: Device, kind: Kind, side: Option<i64>) -> Self {
        let side = side.unwrap_or(if device == Device::Cpu { 1024 } else { 8192 });
        let factors = [0, 1].map(|_| Tensor::randn([side, side], (Kind::Float, device)).to_kind(kind));
        Product { device, side, out: factors[0].zeros_like(), factors }
    }

    /// Goes on for `seconds` at least.
    pub fn sustained(&mut self, seconds: f64) -> Result<Sustained> {
        let _no_grad = tch::no_grad_guard();
        let mut piece = |products: usize| {
            stopwatch::seconds(self.device, || {
                for _ in 0..products {
                    self.out = self.factors[0].matmul(&self.factors[1]);
                }
                Ok(())
            })
        };
        piece(3)?;
        let products = ((0.1 / piece(3)?.max(1e-9)) * 3.0).ceil().clamp(1.0, 1e5) as usize;
        let (mut pieces, mut total) = (Vec::new(), 0.0);
        while total < seconds {
            let took = piece(products)?;
            total += took;
            pieces.push((took, products));
        }
        Ok(Sustained { flop: 2.0 * (self.side as f64).powi(3), pieces })
    }
}

impl Sustained {
    /// Operations per second over all of it.
    pub fn mean(&self) -> f64 {
        self.rate(|_| true)
    }

    /// Operations per second of the pieces that begin `from` seconds after the start or later and before `to`.
    pub fn between(&self, from: f64, to: f64) -> f64 {
        self.rate(|begun| begun >= from && begun < to)
    }

    pub fn seconds(&self) -> f64 {
        self.pieces.iter().map(|(seconds, _)| seconds).sum()
    }

    fn rate(&self, counts: impl Fn(f64) -> bool) -> f64 {
        let (mut begun, mut seconds, mut products) = (0.0, 0.0, 0);
        for (took, of_piece) in &self.pieces {
            if counts(begun) {
                seconds += took;
                products += of_piece;
            }
            begun += took;
        }
        self.flop * products as f64 / seconds
    }
}

/// Median seconds of seven runs after three.
fn median_seconds(device: Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..3).try_for_each(|_| work())?;
    let seconds = (0..7).map(|_| stopwatch::seconds(device, &mut work)).collect::<Result<Vec<_>>>()?;
    Ok(median(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_goes_on_as_long_as_it_is_told_to() {
        let mut product = Product::new(Device::Cpu, Kind::Float, Some(64));
        let sustained = product.sustained(0.3).unwrap();
        // on a busy machine one piece may be enough
        assert!(sustained.seconds() >= 0.3 && sustained.pieces.iter().all(|p| p.1 > 0), "{:?}", sustained.pieces);
        assert_eq!(sustained.flop, 2.0 * 64f64.powi(3));
        assert!(sustained.mean() > 1e6);
    }

    #[test]
    fn rates_are_of_the_seconds_they_name() {
        // a card that slows down after a second
        let sustained = Sustained { flop: 10.0, pieces: vec![(0.5, 10), (0.5, 10), (0.5, 5), (0.5, 5)] };
        assert_eq!((sustained.seconds(), sustained.mean()), (2.0, 150.0));
        assert_eq!((sustained.between(0.0, 1.0), sustained.between(1.0, 9.0)), (200.0, 100.0));
    }

    #[test]
    fn nominal_rates_are_those_of_the_data_sheets() {
        let tera = |name: &str| nominal(name).map(|rate| rate / 1e12);
        assert_eq!(tera("NVIDIA H200"), Some(989.4));
        assert_eq!(tera("NVIDIA H100 80GB HBM3"), Some(989.4));
        assert_eq!(tera("NVIDIA H100 PCIe"), Some(756.0));
        assert_eq!(tera("NVIDIA GH200 480GB"), Some(989.4));
        assert_eq!(tera("NVIDIA A100-SXM4-80GB"), Some(311.9));
        assert_eq!((tera("Tesla V100-SXM2-16GB"), tera("some other card")), (None, None));
    }

    #[test]
    fn shares_name_what_they_are_of() {
        let gpu = Some(("NVIDIA H200".to_string(), Some(1000e12)));
        let rates = Rates { matrix: 800e12, copy: 4e12, gpu };
        assert_eq!(rates.shares(400e12), "40.0 % of nominal, 50.0 % of the matrix product");
        assert!(rates.describe().starts_with("NVIDIA H200, nominal 1000 TFLOP/s in bf16; "));
        assert_eq!(Rates { gpu: None, ..rates.clone() }.shares(400e12), "50.0 % of the matrix product");
        assert_eq!(rates.to_json()["nominal_tflops"], 1000.0);
    }
}
