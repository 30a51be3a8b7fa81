//! Gradients in buckets among real ranks: the sum that travels during the backward pass is the one tree over all lanes,
//! bit for bit, and a network that breaks on one rank stops all of them in the same step. Each test starts `mpirun` on
//! this very executable, whose ignored test `rank_body` is what a rank does.

mod common;

use common::{
    network::{bits, summed, Network, BUCKETS, LANES},
    ranks::{launch, rank, succeeds, tell},
};
use rldiff::{
    comm::{tree_sum, Communicator, Wire},
    config::{load, Config},
    policy::{
        gradient_sum::{GradientSum, Transport},
        lanes::Lanes,
    },
    run::load_for_training,
    train::Trainer,
};
use std::time::Duration;
use tch::Device;

/// Not a test of its own: the body of each rank that the tests below start.
#[test]
#[ignore = "run by mpirun from the other tests"]
fn rank_body() {
    rank(|case, comm| match case {
        "buckets" => buckets(comm),
        "bf16" => bf16_wire(comm),
        "nan before the roll-out" => nan_weight(comm, false),
        "nan before the update" => nan_weight(comm, true),
        "one rank fails" => one_rank_fails(comm),
        other => panic!("unknown case {other}"),
    });
}

fn buckets(comm: &dyn Communicator) {
    let network = Network::new(Device::Cpu);
    let lanes: Vec<Vec<f32>> = (0..LANES).map(|lane| network.gradient(lane)).collect();
    let expected = tree_sum(&lanes);
    let mut in_order = lanes[0].clone();
    lanes[1..].iter().for_each(|lane| in_order.iter_mut().zip(lane).for_each(|(a, b)| *a += b));
    assert_ne!(bits(&in_order), bits(&expected), "the order of the additions does not show");
    assert!(expected[network.params.layout[2].range()].iter().all(|v| v.to_bits() == 0), "an unused parameter");
    for bucket_bytes in BUCKETS {
        let sum = GradientSum::new(&network.params, Transport { bucket_bytes, wire: Wire::F32 }).unwrap();
        let sum = summed(&network, sum, &Lanes::new(LANES, comm).unwrap(), comm);
        assert_eq!(bits(&sum), bits(&expected), "buckets of {bucket_bytes} bytes on {} ranks", comm.size());
    }
}

fn bf16_wire(comm: &dyn Communicator) {
    let network = Network::new(Device::Cpu);
    let lanes = Lanes::new(LANES, comm).unwrap();
    let by = |bucket_bytes: usize, wire: Wire| {
        let sum = GradientSum::new(&network.params, Transport { bucket_bytes, wire }).unwrap();
        summed(&network, sum, &lanes, comm)
    };
    let exact = by(1, Wire::F32);
    let mut sums = BUCKETS.map(|bucket_bytes| {
        let sum = by(bucket_bytes, Wire::Bf16);
        // every rank has the same bits
        let all = comm.all_gather_bytes(bytemuck::cast_slice(&sum)).unwrap();
        assert!(all.iter().all(|other| *other == all[0]));
        sum
    });
    // the size of the buckets changes nothing here either
    assert!(sums.iter().all(|sum| bits(sum) == bits(&sums[0])));
    if comm.size() == 1 {
        assert_eq!(bits(&sums[0]), bits(&exact), "one rank has no wire");
        return;
    }
    assert_ne!(bits(&sums[0]), bits(&exact), "bf16 rounds");
    // each of at most three roundings (of a share and of two partial sums) is off by up to 2^-9
    let size = |v: &[f32]| v.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    sums[0].iter_mut().zip(&exact).for_each(|(a, b)| *a -= b);
    let error = size(&sums[0]) / size(&exact);
    tell(&format!("relative error {error:.2e}"));
    assert!(error < 3.0 / 512.0, "{error}");
}

/// A small embedded experiment.
fn small_config() -> Config {
    let settings = common::SMALL.iter().chain(&["comm.bucket_mb=0.5", "task.parity.train=false"]);
    let settings: Vec<String> = settings.map(|s| s.to_string()).collect();
    load::parse(load::EMBEDDED_JOINT, "joint", &settings).unwrap()
}

/// The last rank's U-Net gets a weight that is NaN, before the roll-out or (`late`) between roll-out and update: all ranks
/// must end the iteration with the same error, before any optimizer step.
fn nan_weight(comm: &dyn Communicator, late: bool) {
    let config = small_config();
    let mut trainer = Trainer::new(&config, comm, load_for_training(&config, comm, Device::Cpu).unwrap()).unwrap();
    let break_it = |trainer: &Trainer| {
        if comm.rank() + 1 == comm.size() {
            let mut weight = trainer.learner.params.leaves().last().unwrap().view([-1]).get(0);
            let _ = tch::no_grad(|| weight.fill_(f64::NAN));
        }
    };
    if !late {
        break_it(&trainer);
    }
    let mut before = trainer.learner.params.buffer().clone();
    let observed = trainer.iterate(0, &mut |trainer, _, _, _| {
        if late {
            break_it(trainer);
            before = trainer.learner.params.buffer().clone();
        }
        Ok(())
    });
    let error = format!("{:#}", observed.expect_err("NaN went unnoticed"));
    assert!(error.contains("not finite"), "{error}");
    let all = comm.all_gather_bytes(error.as_bytes()).unwrap();
    assert!(all.iter().all(|other| *other == all[0]), "ranks end with different errors");
    assert_eq!(bits(trainer.learner.params.buffer().slice()), bits(before.slice()), "the weights changed");
    assert_eq!(trainer.learner.optimizer.steps, 0);
    tell(&format!("error: {error}"));
}

/// A loss that cannot be computed on one rank while the others already sum.
fn one_rank_fails(comm: &dyn Communicator) {
    let network = Network::new(Device::Cpu);
    let mut sum = GradientSum::new(&network.params, Transport { bucket_bytes: 1, wire: Wire::F32 }).unwrap();
    let lanes = Lanes::new(LANES, comm).unwrap();
    let total = lanes.sum_gradients(&mut sum, comm, |lane| {
        if lane + 1 == LANES {
            anyhow::bail!("lane {lane} has no loss");
        }
        Ok(network.loss(lane))
    });
    match total {
        // as the program does it: a message, and the end of all ranks
        Err(e) => {
            eprintln!("error: rank {}: {e:#}", comm.rank());
            comm.abort(1);
        }
        Ok(_) => panic!("a sum without rank {}", comm.size() - 1),
    }
}

#[test]
fn sums_in_buckets_are_the_tree_sum_bit_for_bit() {
    for ranks in [1, 2, 4, 8] {
        succeeds(ranks, "buckets", &[]);
    }
}

#[test]
fn bf16_on_the_wire_gives_every_rank_the_same_rounded_sum() {
    for ranks in [1, 2, 4] {
        succeeds(ranks, "bf16", &[]);
    }
}

#[test]
fn a_nan_on_one_rank_stops_all_before_the_optimizer() {
    for ranks in [1, 2] {
        for (case, wanted) in [
            ("nan before the roll-out", "error: task composition"),
            ("nan before the update", "the gradient of optimizer step 1 is not finite"),
        ] {
            let done = succeeds(ranks, case, &[]);
            assert_eq!(done.stdout.matches(wanted).count(), ranks, "{}", done.stdout);
        }
    }
}

#[test]
fn a_rank_that_fails_in_the_backward_pass_ends_all() {
    let done = launch(2, "one rank fails", &[]);
    assert!(!done.status.success() && done.stderr.contains("rank 1: lane 7 has no loss"), "{}", done.stderr);
    // ten seconds is the promise
    assert!(done.took < Duration::from_secs(10), "took {:?}", done.took);
}
