//! The argument by which commands that compute take a device.

use anyhow::{Context, Result};
use tch::Device;

use crate::{
    comm::Communicator,
    device::{self, parts, Wanted},
    kernels::{self, cuda::Architecture},
};

#[derive(clap::Args, Clone, Copy, Debug)]
pub struct DeviceArgs {
    /// Where to compute; every rank takes a GPU of its own.
    #[arg(long, value_enum, default_value_t = Wanted::Auto)]
    device: Wanted,
}

impl DeviceArgs {
    /// The device of this rank, with the kernels for it on all ranks; call it before the first tensor. A collective call,
    /// the error is the same on all ranks.
    pub fn choose(self, comm: &dyn Communicator) -> Result<Device> {
        let device = device::choose(self.device, comm)?;
        if let Device::Cuda(index) = device {
            kernels::cuda::share(architecture(index)?, comm)?;
        }
        Ok(device)
    }
}

fn architecture(index: usize) -> Result<Architecture> {
    let gpu = parts::gpus()?.into_iter().nth(index).context("a GPU that has gone")?;
    let (major, minor) = gpu.compute_capability;
    Ok(Architecture { major: major.try_into()?, minor: minor.try_into()? })
}
