//! `rldiff bench`: measurements, one file each.

mod allreduce;
mod iteration;
mod kernels;
mod libtorch;
mod model;
mod passes;
mod product;
mod rates;
mod scaling;
mod unet_config;

use super::{config_args::ConfigArgs, Failure, OrMistake};
use crate::comm::Communicator;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Whole iterations of a config, stage by stage: median over the measured iterations.
    Iteration(iteration::Args),
    /// Each CUDA kernel at SDv2's sizes; without a GPU the plain references at a small size.
    Kernels(kernels::Args),
    /// The sum of a gradient over the ranks.
    Allreduce(allreduce::Args),
    /// The U-Net's forward pass, both halves of a guided prediction in one call.
    Unet(passes::Args),
    /// Whole roll-outs with their log-probabilities.
    Rollout(passes::Args),
    /// Policy updates: gradient, sum over ranks, optimizer step.
    Update(passes::Args),
    /// A matrix product that goes on for seconds: what the device sustains.
    Product(product::Args),
    /// The measured U-Net's config.json, for another program that is to measure the same network.
    UnetConfig(unet_config::Args),
    /// A full-size model of random weights: build, save, load, one guided step, one training step.
    Model(model::Args),
    /// Weak and strong scaling over ranks: measured on the ranks there are, predicted for more.
    Scaling(scaling::Args),
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    match args.what {
        What::Iteration(args) => iteration::run(args, comm),
        What::Kernels(args) => kernels::run(args, comm),
        What::Allreduce(args) => allreduce::run(args, comm),
        What::Unet(args) => passes::run(passes::Pass::Unet, args, comm),
        What::Rollout(args) => passes::run(passes::Pass::Rollout, args, comm),
        What::Update(args) => passes::run(passes::Pass::Update, args, comm),
        What::Product(args) => product::run(args, comm),
        What::UnetConfig(args) => unet_config::run(args, comm),
        What::Model(args) => model::run(args, comm),
        What::Scaling(args) => scaling::run(args, comm),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}
