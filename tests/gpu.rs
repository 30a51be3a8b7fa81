//! On a GPU: what the CPU does, within stated bounds; the ratio starts at 1; graphs and buckets change nothing. Without a
//! GPU every test says so and passes; with RLDIFF_REQUIRE_GPU=1 that is a failure. `make test-gpu` runs them.
//!
//! Observed on an H100 and an H200: bench/runs/2026-11-26-gpu.

mod common;

use std::sync::{Mutex, MutexGuard, OnceLock};

use common::{empty_folder, reward_files};
use rldiff::{
    comm::{
        nccl::{Nccl, PATIENCE},
        Communicator as _, DeviceVector, Local, Wire,
    },
    config::{load, Config},
    device::{self, numerics, Wanted},
    diffusion::{
        recorded::RecordedUNet,
        sampler::Trajectory,
        schedule::{Schedule, Step},
    },
    models::{flat_parameters::FlatParameters, pipeline::Pipeline},
    policy::{
        gradient_sum::{GradientSum, Transport},
        surrogate::Objective,
        update::{lane_objective, LaneBatch},
    },
    prompts::Prompt,
    rewards::registry::{build, Place},
    run::load_for_training,
    task::{NoiseOf, Roller},
    telemetry::names,
    train::Trainer,
};
use tch::{Device, Kind, Tensor};

/// One test at a time: the GPU is shared, and the choice of device comes before the first tensor.
fn gpu() -> Option<(Device, MutexGuard<'static, ()>)> {
    static CHOSEN: OnceLock<Result<Device, String>> = OnceLock::new();
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let chosen = CHOSEN.get_or_init(|| device::choose(Wanted::Cuda, &Local).map_err(|e| format!("{e:#}")));
    match chosen {
        Ok(device) => Some((*device, alone)),
        Err(e) if std::env::var_os("RLDIFF_REQUIRE_GPU").is_some_and(|value| value != "0") => {
            panic!("RLDIFF_REQUIRE_GPU is set, but {e}")
        }
        Err(e) => {
            eprintln!("SKIPPED, nothing was tested: {e}");
            None
        }
    }
}

fn config(settings: &[&str]) -> Config {
    let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
    load::parse(load::EMBEDDED_JOINT, "joint", &settings).unwrap()
}

struct Setting {
    config: Config,
    pipeline: Pipeline,
    steps: Vec<Step>,
}

impl Setting {
    fn new(device: Device, settings: &[&str]) -> Self {
        let config = config(settings);
        let pipeline = load_for_training(&config, &Local, device).unwrap();
        let schedule = Schedule::of_model(&pipeline.scheduler).unwrap();
        let steps = schedule.steps(config.rollout.steps, config.rollout.eta).unwrap();
        Setting { config, pipeline, steps }
    }

    /// A lane of eight samples.
    fn roll_out(&self, recorded: Option<&RecordedUNet>) -> LaneBatch {
        self.roll_out_some(8, recorded)
    }

    /// At most eight.
    fn roll_out_some(&self, samples: usize, recorded: Option<&RecordedUNet>) -> LaneBatch {
        let empty_prompt = self.pipeline.embed(&[""]).unwrap();
        let roller = Roller {
            pipeline: &self.pipeline,
            unet: &self.pipeline.unet,
            steps: &self.steps,
            empty_prompt: &empty_prompt,
            guidance_scale: self.config.rollout.guidance_scale,
            latent_shape: self.pipeline.latent_shape(),
            recorded,
        };
        let texts = ["a carrot next to a book", "a portrait of a nurse", "a kite at the beach", "a red apple"];
        let prompts: Vec<Prompt> =
            (0..samples).map(|i| Prompt { text: texts[i % 4].to_string(), objects: Vec::new() }).collect();
        let conditioning = roller.conditioning(&prompts).unwrap();
        let noise = NoiseOf { seed: 5, iteration: 0, task: 0 };
        let trajectory = roller.roll_out(&conditioning, noise, 0, samples).unwrap();
        let advantage = Tensor::from_slice(&[1.0f32, -1.0, 0.5, 2.0, -0.3, 0.1, -2.0, 0.7][..samples])
            .to_device(self.pipeline.device);
        LaneBatch { conditioning, trajectory, advantage }
    }
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_device(Device::Cpu).to_kind(Kind::Double), b.to_device(Device::Cpu).to_kind(Kind::Double));
    ((&a - &b).norm() / b.norm()).double_value(&[])
}

const GUIDANCE_7: [&str; 4] = [
    "rollout.guidance_scale=7.0",
    "rollout.steps=10",
    "method.max_sensitivity=0.0",
    // the text in f32, as on the CPU
    "model.frozen_compute=f32",
];

/// Rounding errors of the U-Net's output are about 1e-6 of it in f32 (2^-24 times the root of the depth of its sums);
/// guidance 7 multiplies those of the difference by up to 13, and the ten steps multiply an error in x_t by at most 2 to
/// 3 together. Derived: 4e-5, observed: 1.1e-5; the bound leaves a factor of 25 for another order of sums in convolutions.
const TRAJECTORY_BOUND: f64 = 1e-3;

#[test]
fn trajectories_agree_with_the_cpu() {
    let Some((device, _alone)) = gpu() else { return };
    let on = |device| Setting::new(device, &GUIDANCE_7).roll_out(None).trajectory;
    let (cpu, gpu): (Trajectory, Trajectory) = (on(Device::Cpu), on(device));
    for (i, (a, b)) in gpu.latents.iter().zip(&cpu.latents).enumerate() {
        let error = relative(a, b);
        println!("x after {i} steps: relative error {error:.2e}");
        assert!(error < TRAJECTORY_BOUND, "x after {i} steps: {error}");
    }
    for (a, b) in gpu.log_probs.iter().zip(&cpu.log_probs) {
        let gap = (a.as_ref().unwrap().to_device(Device::Cpu) - b.as_ref().unwrap()).abs().max().double_value(&[]);
        // mean over D of z²/2: the same noise on both, so only the rounding of x_prev − μ
        assert!(gap < 1e-4, "log-probabilities differ by {gap}");
    }
}

/// Same module, kernels, shapes: 0 where libtorch picks the same algorithm with and without autograd. A drift of the clip
/// range would switch samples off before the first update; a tenth of it is what f32 may show, bf16 (8 bits of mantissa)
/// the whole. Observed: exactly 0 in both.
const DRIFT_BOUND: [(&str, f64); 2] = [("f32", 1e-5), ("bf16", 1e-4)];

#[test]
fn the_ratio_starts_at_one_at_every_timestep() {
    let Some((device, _alone)) = gpu() else { return };
    for (compute, bound) in DRIFT_BOUND {
        let compute_setting = format!("model.compute={compute}");
        let setting = Setting::new(device, &[&GUIDANCE_7[..], &[&compute_setting]].concat());
        let batch = setting.roll_out(None);
        // as in training: the graph is built
        for parameter in &setting.pipeline.unet_parameters.entries {
            let _ = parameter.tensor.shallow_clone().set_requires_grad(true);
        }
        let objective = Objective { clip_range: 1e-4, weight: 1.0, samples: 8 };
        for step in &setting.steps {
            let (_, seen) = lane_objective(&setting.pipeline.unet, step, &batch, &objective).unwrap();
            println!("{compute} t = {}: ratio drift {:.2e}", step.t, seen.ratio_drift);
            assert!(seen.ratio_drift <= bound, "{compute} t = {}: {}", step.t, seen.ratio_drift);
        }
    }
}

/// The same kernels in the same order: the same bits.
#[test]
fn replayed_graphs_give_the_same_trajectory() {
    let Some((device, _alone)) = gpu() else { return };
    for compute in ["model.compute=f32", "model.compute=bf16"] {
        let setting = Setting::new(device, &[&GUIDANCE_7[..], &[compute]].concat());
        let recorded = RecordedUNet::default();
        let plain = setting.roll_out(None).trajectory;
        for round in 0..2 {
            let replayed = setting.roll_out(Some(&recorded)).trajectory;
            for (i, (a, b)) in replayed.latents.iter().zip(&plain.latents).enumerate() {
                assert!(a.equal(b), "{compute}, round {round}, x after {i} steps: {}", relative(a, b));
            }
        }
    }
}

/// Recordings of other shapes and of another network work in the same pool, in turns.
#[test]
fn recordings_that_share_a_pool_do_not_spoil_each_other() {
    let Some((device, _alone)) = gpu() else { return };
    let settings = [1, 2].map(|_| Setting::new(device, &GUIDANCE_7));
    for parameter in &settings[1].pipeline.unet_parameters.entries {
        let _ = parameter.tensor.shallow_clone().g_mul_scalar_(0.99);
    }
    let recorded = RecordedUNet::default();
    for round in 0..2 {
        for setting in &settings {
            for samples in [8, 3, 5] {
                let plain = setting.roll_out_some(samples, None).trajectory;
                let replayed = setting.roll_out_some(samples, Some(&recorded)).trajectory;
                assert!(replayed.x_0().equal(plain.x_0()), "round {round}, {samples} samples");
            }
        }
    }
}

/// A product in TF32 has factors of 10 bits. Nothing outside the decoder may see it.
#[test]
fn a_vae_in_tf32_draws_nearly_what_it_draws_in_f32() {
    let Some((device, _alone)) = gpu() else { return };
    let drawn = |precision: &str| {
        let setting = Setting::new(device, &[&format!("model.frozen_compute={precision}"), "rollout.steps=2"]);
        let [c, h, w] = setting.pipeline.latent_shape();
        let x_0 = (Tensor::arange(4 * c * h * w, (Kind::Float, device)) * 0.37).sin().view([4, c, h, w]);
        let t = Tensor::from_slice(&[1i64, 200, 500, 901]).to_device(device);
        let text = Tensor::zeros([4, 77, setting.pipeline.embed(&[""]).unwrap().size()[2]], (Kind::Float, device));
        let eps = || tch::no_grad(|| setting.pipeline.unet.forward(&x_0, &t, &text));
        let before = eps();
        let pictures = tch::no_grad(|| setting.pipeline.vae.decode_scaled(&x_0));
        assert!(eps().equal(&before), "the U-Net computes otherwise after decoding in {precision}");
        pictures
    };
    let (exact, tf32, bf16) = (drawn("f32"), drawn("tf32"), drawn("bf16"));
    let gaps = [relative(&tf32, &exact), relative(&bf16, &exact)];
    println!("pictures: {gaps:?} of those in f32");
    assert!(gaps[0] < 5e-3 && gaps[1] < 5e-2, "{gaps:?}");
}

/// The backward pass of attention, which libtorch's choice sums in no fixed order.
#[test]
fn deterministic_kernels_give_the_same_gradient_every_time() {
    let Some((device, _alone)) = gpu() else { return };
    let setting = Setting::new(device, &[&GUIDANCE_7[..], &["model.compute=bf16"]].concat());
    let params = FlatParameters::new(&[setting.pipeline.trainable()]).unwrap();
    let batch = setting.roll_out(None);
    let objective = Objective { clip_range: 1e-4, weight: 1.0, samples: 8 };
    let gradient = || {
        let (value, _) = lane_objective(&setting.pipeline.unet, &setting.steps[4], &batch, &objective).unwrap();
        let gradients = Tensor::run_backward(&[value], params.leaves(), false, false);
        let flat: Vec<Tensor> = gradients.iter().map(|g| g.flatten(0, -1)).collect();
        Tensor::cat(&flat, 0)
    };
    let (first, second) = (gradient(), gradient());
    println!("as libtorch chooses: {:.1e} apart", relative(&first, &second));
    numerics::set_deterministic(true);
    let first = gradient();
    let same = (0..5).all(|_| gradient().equal(&first));
    numerics::set_deterministic(false);
    assert!(same, "gradients differ");
}

/// Sums over lanes on the GPU against the CPU's; the backward pass of f32 rounds as its forward pass does (see above).
/// Observed: 2.3e-7.
#[test]
fn gradients_agree_with_the_cpu() {
    let Some((device, _alone)) = gpu() else { return };
    let gradient = |device: Device, bucket_bytes: usize| {
        let transport = Transport { bucket_bytes, wire: Wire::F32 };
        let setting = Setting::new(device, &GUIDANCE_7);
        let params = FlatParameters::new(&[setting.pipeline.trainable()]).unwrap();
        let mut sum = GradientSum::new(&params, transport).unwrap();
        let [c, h, w] = setting.pipeline.latent_shape();
        for lane in 0..3 {
            let x = (Tensor::arange(4 * c * h * w, (Kind::Float, Device::Cpu)) * 0.37 + lane as f64).sin();
            let x = x.view([4, c, h, w]).to_device(device);
            let text = setting.pipeline.embed(&["a", "b", "c", "d"]).unwrap();
            let t = Tensor::from_slice(&[1i64, 200, 500, 901]).to_device(device);
            let loss = setting.pipeline.unet.forward(&x, &t, &text).square().mean(Kind::Float);
            sum.backward(&loss, lane == 2, &Local).unwrap();
        }
        Tensor::from_slice(&params.row_major(&sum.finish()))
    };
    let cpu = gradient(Device::Cpu, usize::MAX);
    let gpu = gradient(device, usize::MAX);
    let error = relative(&gpu, &cpu);
    println!("gradient: relative error {error:.2e}");
    assert!(error < 1e-3, "{error}");
    // cudnn is set to deterministic algorithms; what is left is attention's backward pass, which may add atomically
    let error = relative(&gradient(device, 1000), &gpu);
    assert!(error < 1e-5, "buckets change the gradient by {error}");
}

#[test]
fn nccl_sums_what_a_stream_is_still_making() {
    let Some((device, _alone)) = gpu() else { return };
    let Device::Cuda(index) = device else { unreachable!() };
    let comm = Nccl::start(&Local, index, Some(PATIENCE)).expect("NCCL");
    let values = Tensor::ones([1 << 20], (Kind::Float, device));
    for _ in 0..20 {
        let mut values = values.shallow_clone();
        let _ = values.g_mul_scalar_(1.5);
        let _ = values.g_div_scalar_(1.5);
    }
    let stream = device::current_stream(index).unwrap();
    let address = values.data_ptr() as u64;
    comm.start_device_sum(DeviceVector { address, length: 1 << 20, wire: Wire::F32, stream }).unwrap();
    comm.finish_device_sums(stream).unwrap();
    let total = (values * 2.0).sum(Kind::Double).double_value(&[]);
    // one rank: the sum is the value
    assert!((total - f64::from(1 << 21)).abs() < 1.0, "{total}");
    comm.close();
}

/// Four iterations of the joint experiment in small: the GPU's rewards follow the CPU's. Both draw the same noise, so a
/// task's mean rewards differ only where rounding tips a picture over; two standard errors of a mean is what independent
/// pictures would differ by.
#[test]
fn a_joint_run_follows_the_reward_curve_of_the_cpu() {
    let Some((device, _alone)) = gpu() else { return };
    let config = config(&["run.iterations=4", "task.parity.samples=128", "model.frozen_compute=f32"]);
    let curve = |device: Device| {
        let pipeline = load_for_training(&config, &Local, device).unwrap();
        let mut trainer = Trainer::new(&config, &Local, pipeline).unwrap();
        (0..4).map(|i| trainer.iterate(i, &mut |_, _, _, _| Ok(())).unwrap()).collect::<Vec<_>>()
    };
    let (cpu, gpu) = (curve(Device::Cpu), curve(device));
    for (i, (on_cpu, on_gpu)) in cpu.iter().zip(&gpu).enumerate() {
        for (_, task) in config.trained_tasks() {
            let mean = |metrics: &rldiff::telemetry::Metrics| metrics.get(&names::reward_mean(&task.name)).unwrap();
            let std = on_cpu.get(&names::reward_std(&task.name)).unwrap();
            let groups = task.samples / task.images_per_prompt;
            let bound = 2.0 * std / (groups as f64).sqrt();
            let (a, b) = (mean(on_gpu), mean(on_cpu));
            println!("iteration {i}, {}: GPU {a:.4}, CPU {b:.4}, bound {bound:.4}", task.name);
            assert!((a - b).abs() <= bound, "iteration {i}, {}: {a} and {b}", task.name);
        }
    }
}

/// The networks of the rewards: scores and gradients of the CPU. All compute in f32.
#[test]
fn reward_networks_say_what_they_say_on_the_cpu() {
    let Some((device, _alone)) = gpu() else { return };
    let folder = empty_folder("gpu-rewards");
    reward_files::write_image_reward(&folder, 31);
    reward_files::write_aesthetic(&folder, 32);
    reward_files::write_unidet(&folder, true, 33);
    let at = |file: &str| folder.join(file).display().to_string();
    let (weights, vocabulary) = (at("image_reward.safetensors"), at("vocab.txt"));
    let preference = format!("{{ name = 'image_reward', weights = '{weights}', vocabulary = '{vocabulary}' }}");
    let beauty =
        format!("{{ name = 'aesthetic', clip = '{}', head = '{}' }}", at("clip.safetensors"), at("head.safetensors"));
    let (weights, labels) = (at("unidet.safetensors"), at("labels.json"));
    let objects = format!(
        "{{ name = 'composition', weights = '{weights}', labels = '{labels}', threshold = 0.0001, top = 0, \
         channel_order = 'as_trained', short_side = 128, long_side = 213 }}"
    );
    let pictures = reward_files::pictures(4, 64, 64);
    let prompts = vec![Prompt { text: "an apple and a book".into(), objects: vec!["apple".into(), "book".into()] }; 4];
    // sums in another order; a detection more or less where two boxes are nearly equal
    for (reward, bound) in [(preference, 1e-3), (beauty, 1e-4), (objects, 1e-2)] {
        let config = config(&[&format!("task.preference.reward={reward}")]).tasks;
        let config = config.into_iter().find(|task| task.name == "preference").unwrap().reward;
        let judge = |device: Device| {
            let place = Place { task: "test", index: 0, seed: 1, device, group: 1 };
            let mut reward = build(&config, place).unwrap();
            let scores = Tensor::from_slice(&reward.score(&pictures, &prompts).unwrap().rewards);
            let gradient = reward.differentiable().map(|reward| {
                let leaf = pictures.to_device(device).set_requires_grad(true);
                reward.rewards(&leaf, &prompts).unwrap().sum(Kind::Float).backward();
                leaf.grad().to_device(Device::Cpu)
            });
            (scores, gradient)
        };
        let ((on_cpu, cpu_gradient), (on_gpu, gpu_gradient)) = (judge(Device::Cpu), judge(device));
        let gap = (&on_gpu - &on_cpu).abs().max().double_value(&[]);
        println!("{reward}: {gap:.1e} apart");
        assert!(gap < bound, "{gap}");
        if let (Some(cpu), Some(gpu)) = (cpu_gradient, gpu_gradient) {
            let error = relative(&gpu, &cpu);
            println!("gradient: relative error {error:.2e}");
            assert!(error < 1e-3, "{error}");
        }
    }
}
