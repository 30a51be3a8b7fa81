//! `rldiff doctor`: what is in use, and does it work?

use anyhow::{anyhow, ensure, Context, Result};
use tch::{Device, Kind, Tensor};

use super::Failure;
use crate::{
    comm::{agree, Communicator},
    store,
};

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let mut report = Report { first: comm.rank() == 0, failed: Vec::new() };
    report.line("rldiff", env!("CARGO_PKG_VERSION"));
    report.line("libtorch", &loaded_library("libtorch_cpu"));
    report.line("devices", &format!("{} CUDA devices", tch::Cuda::device_count()));
    report.line("MPI", &crate::comm::library_version());
    report.line("MPI library", &loaded_library("libmpi"));
    let (local, here) = comm.local_rank();
    report.line(
        "ranks",
        &format!("{} in all; this is {}, number {local} of {here} on its host", comm.size(), comm.rank()),
    );
    report.line("HDF5", &store::hdf5_version());
    report.line("cores", &std::thread::available_parallelism().map_or("unknown".into(), |n| n.to_string()));
    let mut slurm: Vec<String> =
        std::env::vars().filter(|(k, _)| k.starts_with("SLURM_")).map(|(k, v)| format!("{k}={v}")).collect();
    slurm.sort();
    report.line("Slurm", if slurm.is_empty() { "not inside a job" } else { "" });
    slurm.iter().for_each(|v| report.line("", v));

    report.check("libtorch works", agree(comm, torch_works()));
    report.check("MPI works", mpi_works(comm));
    report.check("HDF5 works", agree(comm, hdf5_works()));
    if !report.failed.is_empty() {
        return Err(anyhow!("not in order: {}", report.failed.join(", ")).into());
    }
    Ok(())
}

struct Report {
    first: bool,
    failed: Vec<String>,
}

impl Report {
    fn line(&self, name: &str, value: &str) {
        if self.first {
            println!("{name:<16} {value}");
        }
    }

    fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => self.line(name, "yes"),
            Err(e) => {
                self.line(name, &format!("NO: {e:#}"));
                self.failed.push(name.to_string());
            }
        }
    }
}

/// Path of a library that this process has loaded.
fn loaded_library(stem: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
    let named = |p: &&str| p.rsplit('/').next().is_some_and(|file| file.starts_with(stem));
    paths.into_iter().find(named).unwrap_or("not loaded").to_string()
}

fn torch_works() -> Result<()> {
    let x = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]);
    let product = x.matmul(&x.transpose(0, 1)).sum(Kind::Float).double_value(&[]);
    ensure!(product == 83.0, "a matrix product gave {product}, expected 83");
    Ok(())
}

fn mpi_works(comm: &dyn Communicator) -> Result<()> {
    let mut sum = [comm.rank() as f32 + 1.0];
    comm.all_reduce_sum_f32(&mut sum)?;
    let n = comm.size() as f32;
    ensure!(sum[0] == n * (n + 1.0) / 2.0, "a sum over {n} ranks gave {}", sum[0]);
    Ok(())
}

fn hdf5_works() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("rldiff-doctor-{}", std::process::id()));
    let worked = store::round_trip(&folder).with_context(|| format!("in {}", folder.display()));
    // best effort: the folder is temporary
    let _ = std::fs::remove_dir_all(&folder);
    worked
}
