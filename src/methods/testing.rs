//! What the methods' tests share: a trainer of the miniature on the task `preference`, and derivatives along directions in
//! the space of the weights.

use tch::{Device, Tensor};

use crate::{
    comm::Local,
    config::{load, Config},
    iteration_log::IterationLog,
    kernels::FlatBuffer,
    run::load_for_training,
    train::{LaneWork, Piece, RollOut, Trainer},
};

/// Number of the task `preference` in the miniature's experiments.
pub const TASK: usize = 2;

/// `slurm/miniature-<name>.toml` with two lanes, changed by `settings`.
pub fn config(name: &str, settings: &[&str]) -> Config {
    let path = format!("{}/slurm/miniature-{name}.toml", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    let small = ["run.lanes=2", "pretrain.batch_per_lane=2"];
    let settings: Vec<String> = small.iter().chain(settings).map(|s| s.to_string()).collect();
    let config = load::parse(&text, &path, &settings).unwrap();
    config.validate().unwrap();
    config
}

pub fn trainer(config: &Config) -> Trainer<'_> {
    Trainer::new(config, &Local, load_for_training(config, &Local, Device::Cpu).unwrap()).unwrap()
}

/// The samples of lane 0, rolled out over the first `steps` steps.
pub fn piece(trainer: &mut Trainer, steps: usize, guidance_scale: f64) -> Piece {
    let how = RollOut { unet: None, steps, guidance_scale, at_once: usize::MAX };
    let (mut log, mut pieces) = (IterationLog::new(0, Device::Cpu), Vec::new());
    let keep = |_: &mut _, _: &_, _: &mut _, piece| {
        pieces.push(piece);
        Ok(())
    };
    trainer.roll_out(TASK, 0, &how, &mut log, keep).unwrap();
    pieces.remove(0)
}

/// What `work` makes of lane 0.
pub fn in_lane<T>(trainer: &mut Trainer, work: impl FnOnce(&mut LaneWork) -> T) -> T {
    let (mut log, mut broken) = (IterationLog::new(0, Device::Cpu), Vec::new());
    work(&mut LaneWork {
        lane: 0,
        pipeline: &trainer.pipeline,
        schedule: &trainer.schedule,
        steps: &trainer.steps,
        task: &mut trainer.tasks[TASK],
        log: &mut log,
        broken: &mut broken,
    })
}

/// d value / d weights, flat.
pub fn gradient(trainer: &Trainer, value: &Tensor) -> Vec<f32> {
    let params = &trainer.learner.params;
    let out = FlatBuffer::zeros(params.len(), Device::Cpu);
    let gradients = Tensor::run_backward(&[value], params.leaves(), false, false);
    for (entry, gradient) in params.layout.iter().zip(&gradients) {
        entry.put_gradient(gradient, &out);
    }
    out.host().into_owned()
}

/// Relative errors of `gradient` along three directions: itself, and its elements of even and of odd number; against central
/// differences of `loss` with steps of length `step`.
pub fn errors_along_directions(
    trainer: &mut Trainer,
    gradient: &[f32],
    step: f64,
    mut loss: impl FnMut(&mut Trainer) -> f64,
) -> [f64; 3] {
    let of_kind: [fn(usize) -> bool; 3] = [|_| true, |i| i % 2 == 0, |i| i % 2 == 1];
    of_kind.map(|wanted| {
        let masked: Vec<f64> =
            gradient.iter().enumerate().map(|(i, &g)| if wanted(i) { f64::from(g) } else { 0.0 }).collect();
        let norm = masked.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(norm > 0.0 && norm.is_finite(), "the gradient's norm is {norm}");
        let before = trainer.learner.params.buffer().clone();
        let mut at = |sign: f64| {
            let moved = trainer.learner.params.buffer_mut().slice_mut();
            for ((value, old), g) in moved.iter_mut().zip(before.slice()).zip(&masked) {
                *value = (f64::from(*old) + sign * step * g / norm) as f32;
            }
            let loss = loss(trainer);
            trainer.learner.params.buffer_mut().copy_from(&before);
            loss
        };
        let difference = (at(1.0) - at(-1.0)) / (2.0 * step);
        (difference / norm - 1.0).abs()
    })
}
