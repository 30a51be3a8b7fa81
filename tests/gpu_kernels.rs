//! The CUDA kernels on a GPU, `make test-gpu`: the cases of tests/kernels.rs on the device. Skips, and says why, where
//! there is none; with RLDIFF_REQUIRE_GPU=1 that is a failure.

#[path = "kernels/adamw.rs"]
mod adamw;
#[path = "kernels/cases.rs"]
mod cases;
#[path = "kernels/geglu.rs"]
mod geglu;
#[path = "kernels/group_norm.rs"]
mod group_norm;
#[path = "kernels/layer_norm.rs"]
mod layer_norm;
#[path = "kernels/transition.rs"]
mod transition;

use std::sync::{Arc, OnceLock};

use cases::{Machines, Observed};
use half::{bf16, f16};
use rldiff::comm::Local;
use rldiff::device::{self, Wanted};
use rldiff::kernels::cuda::{Gpu, Machine};

/// The first GPU, twice: two runs must give the same bits.
fn machines() -> Option<Machines> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| {
        let required = std::env::var_os("RLDIFF_REQUIRE_GPU").is_some_and(|value| value != "0");
        match Gpu::count() {
            Ok(count) if count > 0 => {
                // from here on a failure is a failure; libtorch is asked before its first tensor
                device::choose(Wanted::Cuda, &Local).unwrap_or_else(|error| panic!("{error:#}"));
                let gpu = Gpu::open(0).unwrap_or_else(|error| panic!("{error:#}"));
                println!("device: {}, {:?}", gpu.name().unwrap(), gpu.architecture());
                Some(gpu)
            }
            absent => {
                let reason = match absent {
                    Ok(_) => "no NVIDIA driver or no device".to_string(),
                    Err(error) => format!("{error:#}"),
                };
                assert!(!required, "RLDIFF_REQUIRE_GPU is set, but there is no GPU: {reason}");
                eprintln!("SKIPPED: kernels on a GPU: {reason}");
                None
            }
        }
    });
    gpu.as_ref().map(|gpu| [0, 1].map(|_| Arc::new(gpu.clone()) as Arc<dyn Machine>))
}

#[test]
fn philox_gives_the_published_words() {
    let Some(machines) = machines() else { return };
    cases::philox_known_answers(&machines);
}

#[test]
fn kernels_agree_with_their_references() {
    let Some(machines) = machines() else { return };
    let mut seen = Observed::default();
    cases::normal_numbers(&machines, &mut seen);
    transition::draws_and_scores::<f32>(&machines, &mut seen);
    transition::draws_and_scores::<bf16>(&machines, &mut seen);
    transition::draws_and_scores::<f16>(&machines, &mut seen);
    transition::surrogate::<f32>(&machines, &mut seen);
    transition::surrogate::<bf16>(&machines, &mut seen);
    transition::surrogate::<f16>(&machines, &mut seen);
    adamw::steps::<f32>(&machines, &mut seen);
    adamw::steps::<bf16>(&machines, &mut seen);
    adamw::steps::<f16>(&machines, &mut seen);
    geglu::both_passes::<f32>(&machines, 0.0, &mut seen);
    geglu::both_passes::<bf16>(&machines, 3.9e-3, &mut seen);
    geglu::both_passes::<f16>(&machines, 4.9e-4, &mut seen);
    layer_norm::both_passes::<f32, f32>(&machines, 0.5, 0.0, &mut seen);
    layer_norm::both_passes::<f32, f32>(&machines, 100.0, 0.0, &mut seen);
    layer_norm::both_passes::<bf16, bf16>(&machines, 0.5, 3.9e-3, &mut seen);
    layer_norm::both_passes::<f16, f16>(&machines, 0.5, 4.9e-4, &mut seen);
    group_norm::both_passes::<f32, f32>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<f32, f32>(&machines, 100.0, &mut seen);
    group_norm::both_passes::<bf16, bf16>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<f16, f16>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<bf16, f32>(&machines, 0.5, &mut seen);
    seen.print();
}

#[test]
fn the_first_ratio_is_exactly_one() {
    let Some(machines) = machines() else { return };
    transition::first_ratio::<f32>(&machines);
    transition::first_ratio::<bf16>(&machines);
    transition::first_ratio::<f16>(&machines);
}

#[test]
fn what_is_not_finite_and_what_does_not_fit_is_seen() {
    let Some(machines) = machines() else { return };
    adamw::norm_shows_what_is_not_finite(&machines);
    transition::misfits_are_refused(&machines);
}

#[test]
fn a_network_follows_the_step_of_its_parameters() {
    let Some(machines) = machines() else { return };
    adamw::the_network_follows(&machines, tch::Device::Cuda(0));
}

#[test]
fn operations_are_differentiable_in_libtorch() {
    let Some([machine, _]) = machines() else { return };
    let mut seen = Observed::default();
    group_norm::autograd(machine.clone(), tch::Device::Cuda(0), &mut seen);
    geglu::autograd(machine.clone(), tch::Device::Cuda(0), &mut seen);
    layer_norm::autograd(machine, tch::Device::Cuda(0), &mut seen);
    seen.print();
}
