//! NCCL among real GPUs, a rank each: gradients that travel during the backward pass, and a rank that stays behind. `make
//! test-gpu` runs it. With fewer than two GPUs every test says so and passes; with RLDIFF_REQUIRE_GPU=2 that is a failure.
//!
//! Not run yet: no machine with two GPUs was at hand. `tests/nccl.rs` runs our part of it over doubles.

mod common;

use std::time::Duration;

use common::{
    network::{bits, summed, Network, BUCKETS, LANES},
    ranks::{launch, rank, succeeds},
    say,
};
use rldiff::{
    comm::{nccl::Nccl, tree_sum, Communicator, DeviceVector, Wire},
    device::{self, Wanted},
    kernels::cuda::Gpu,
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
    },
};
use tch::{Device, Kind, Tensor};

/// Long enough for NCCL's set-up.
const LONG: Option<Duration> = Some(Duration::from_secs(120));

/// As many ranks as there are GPUs, 2, 4 or 8.
fn ranks() -> Option<usize> {
    let count = Gpu::count().unwrap_or_else(|e| panic!("{e:#}"));
    let required = std::env::var("RLDIFF_REQUIRE_GPU").ok().and_then(|value| value.parse().ok()).unwrap_or(0);
    assert!(count >= required, "RLDIFF_REQUIRE_GPU asks for {required} GPUs, there are {count}");
    if count < 2 {
        say(&format!("SKIPPED, nothing was tested: ranks need a GPU each, there are {count}"));
        return None;
    }
    Some(1 << count.min(LANES).ilog2())
}

/// Not a test of its own: the body of each rank that the tests below start.
#[test]
#[ignore = "run by mpirun from the other tests"]
fn rank_body() {
    rank(|case, comm| {
        let device = device::choose(Wanted::Cuda, comm).unwrap();
        match case {
            "sums" => sums(comm, device),
            "gradients" => gradients(comm, device),
            "one sum too few" => one_sum_too_few(comm, device),
            other => panic!("unknown case {other}"),
        }
    });
}

fn nccl_on(comm: &dyn Communicator, device: Device, patience: Option<Duration>) -> (Nccl<'_>, usize) {
    let Device::Cuda(index) = device else { panic!("{device:?}") };
    (Nccl::start(comm, index, patience).unwrap(), index)
}

/// Small whole numbers, which every order of additions sums exactly, in bf16 too; still being made when the sum starts.
fn sums(comm: &dyn Communicator, device: Device) {
    let (nccl, index) = nccl_on(comm, device, LONG);
    let length = (1 << 22) + 3;
    for (wire, kind) in [(Wire::F32, Kind::Float), (Wire::Bf16, Kind::BFloat16)] {
        let pattern = Tensor::arange(length, (Kind::Int64, device)).remainder(7).to_kind(kind);
        let mut values = &pattern + (comm.rank() + 1) as f64;
        for _ in 0..50 {
            values = (values * 2.0) / 2.0;
        }
        let stream = device::current_stream(index).unwrap();
        let address = values.data_ptr() as u64;
        nccl.start_device_sum(DeviceVector { address, length: length as usize, wire, stream }).unwrap();
        nccl.finish_device_sums(stream).unwrap();
        let ranks = comm.size() as f64;
        let wrong = (values - (pattern * ranks + ranks * (ranks + 1.0) / 2.0)).abs().max().double_value(&[]);
        assert_eq!(wrong, 0.0, "{wire:?}");
    }
    nccl.close();
}

/// NCCL chooses its own order of additions: with two ranks there is one only, with more the sums differ by rounding.
fn gradients(comm: &dyn Communicator, device: Device) {
    let network = Network::new(device);
    let lanes = Lanes::new(LANES, comm).unwrap();
    let of_lanes: Vec<Vec<f32>> = (0..LANES).map(|lane| network.gradient(lane)).collect();
    let expected = tree_sum(&of_lanes);
    let distance = |values: &[f32]| {
        let norm = |of: &mut dyn Iterator<Item = f64>| of.map(|v| v * v).sum::<f64>().sqrt();
        let mut gaps = values.iter().zip(&expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
        norm(&mut gaps) / norm(&mut expected.iter().map(|v| f64::from(*v)))
    };
    let (nccl, _) = nccl_on(comm, device, LONG);
    for bucket_bytes in BUCKETS {
        // f32: a few roundings of 2^-24; bf16: of a share and of the partial sums, 2^-9 each, on up to 8 ranks
        for (wire, bound) in [(Wire::F32, 1e-6), (Wire::Bf16, 8.0 / 512.0)] {
            let sum = GradientSum::new(&network.params, Transport { bucket_bytes, wire }).unwrap();
            let total = summed(&network, sum, &lanes, &nccl);
            let all = comm.all_gather_bytes(bytemuck::cast_slice(&total)).unwrap();
            assert!(all.iter().all(|other| *other == all[0]), "ranks have different sums");
            if comm.size() == 2 && wire == Wire::F32 {
                assert_eq!(bits(&total), bits(&expected), "buckets of {bucket_bytes} bytes");
            }
            let error = distance(&total);
            assert!(error < bound, "{wire:?}, buckets of {bucket_bytes} bytes: {error:.1e}");
        }
    }
    nccl.close();
}

/// The last rank does not start the sum that the others wait in.
fn one_sum_too_few(comm: &dyn Communicator, device: Device) {
    let (nccl, index) = nccl_on(comm, device, Some(Duration::from_secs(20)));
    let values = Tensor::ones([1000], (Kind::Float, device));
    if comm.rank() + 1 < comm.size() {
        let stream = device::current_stream(index).unwrap();
        let address = values.data_ptr() as u64;
        nccl.start_device_sum(DeviceVector { address, length: 1000, wire: Wire::F32, stream }).unwrap();
    }
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn sums_are_exact_and_in_the_order_of_the_streams() {
    let Some(ranks) = ranks() else { return };
    succeeds(ranks, "sums", &[]);
}

#[test]
fn gradients_in_buckets_are_the_sum_over_lanes_and_ranks() {
    let Some(ranks) = ranks() else { return };
    succeeds(ranks, "gradients", &[]);
}

#[test]
fn a_rank_that_stays_behind_ends_all_with_a_message() {
    let Some(ranks) = ranks() else { return };
    let done = launch(ranks, "one sum too few", &[]);
    assert!(!done.status.success(), "{}\n{}", done.stdout, done.stderr);
    assert!(done.stderr.contains("NCCL: a sum of gradients did not end within 20 s"), "{}", done.stderr);
}
