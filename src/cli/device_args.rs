//! The argument by which commands that compute take a device.

use anyhow::Result;
use tch::Device;

use crate::{
    comm::Communicator,
    device::{self, Wanted},
};

#[derive(clap::Args, Clone, Copy, Debug)]
pub struct DeviceArgs {
    /// Where to compute; every rank takes a GPU of its own.
    #[arg(long, value_enum, default_value_t = Wanted::Auto)]
    device: Wanted,
}

impl DeviceArgs {
    /// The device of this rank; call it before the first tensor. A collective call, the error is the same on all ranks.
    pub fn choose(self, comm: &dyn Communicator) -> Result<Device> {
        device::choose(self.device, comm)
    }
}
