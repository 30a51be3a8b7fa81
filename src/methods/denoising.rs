//! The denoising loss of a model on samples of its own, as RAFT and the reward-weighted method train on.

use anyhow::Result;
use tch::{Kind, Tensor};

use crate::{
    iteration_log::IterationLog,
    policy::pretraining::{sample_losses, Corruption},
    random::{Coordinates, Purpose},
    train::{LaneWork, Trainer, Update},
};

/// A lane's samples to train on.
pub(super) struct LaneSamples {
    /// Number of the first one in the order of all lanes.
    pub first: usize,
    /// Latents, f32 [n, C, H, W].
    pub x_0: Tensor,
    /// Embeddings of their prompts, f32 [n, tokens, width].
    pub text: Tensor,
    /// A weight for each, f32 `[n]`.
    pub weights: Tensor,
}

/// Which noise and timesteps the samples get, by number of the first one in the order of all lanes.
pub(super) struct NoiseAt {
    pub seed: u64,
    pub iteration: u64,
    pub pass: usize,
    pub first: usize,
}

/// factor · Σ_i weight_i · ‖ε − ε_θ(√ᾱ_t·x_0 + √(1−ᾱ_t)·ε, t, prompt)‖²_mean over a lane's samples; ε and t are functions of
/// `at` alone. Logs the plain losses as `<task>/loss`.
pub(super) fn lane_value(work: &mut LaneWork, samples: &LaneSamples, factor: f64, at: &NoiseAt) -> Result<Tensor> {
    let size = samples.x_0.size();
    let first = Coordinates {
        iteration: at.iteration as u32,
        task: work.task.index,
        step: at.pass as u16,
        sample: at.first as u32,
        ..Coordinates::new(at.seed, Purpose::MethodNoise)
    };
    let noise = Corruption::draw(first, size[0] as usize, &size[1..], work.schedule.alpha_bar().len());
    let losses = sample_losses(&work.pipeline.unet, work.schedule, &samples.x_0, &samples.text, &noise);
    let seen = losses.detach().sum(Kind::Double).double_value(&[]);
    work.log.task_mean(&work.task.config.name, "loss", work.lane, seen, size[0] as usize);
    Ok((losses * &samples.weights).sum(Kind::Float) * factor)
}

/// `updates` optimizer steps of a task on samples of its lanes, this rank's in order, `per_lane` each at most, with new noise
/// for every step. A collective call.
pub(super) fn train(
    trainer: &mut Trainer,
    (task, iteration): (usize, u64),
    log: &mut IterationLog,
    samples: &[LaneSamples],
    per_lane: usize,
    factor: f64,
    updates: usize,
) -> Result<()> {
    let (seed, first_lane) = (trainer.config.run.seed, trainer.lanes.mine().start);
    for pass in 0..updates {
        let at = Update { task, iteration, pass, per_lane, what: format!("update {pass}") };
        let norm = trainer.optimize(&at, log, |work| {
            let of_lane = &samples[work.lane - first_lane];
            let noise = NoiseAt { seed, iteration, pass, first: of_lane.first };
            lane_value(work, of_lane, factor, &noise)
        })?;
        log.norm(norm);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::testing::{config, errors_along_directions, gradient, in_lane, piece, trainer};

    #[test]
    fn it_is_the_weighted_loss_and_its_gradient_that_of_finite_differences() {
        let config = config("raft", &[]);
        let mut trainer = trainer(&config);
        let piece = piece(&mut trainer, 6, 3.0);
        let samples = |weights: &[f32]| LaneSamples {
            first: 0,
            x_0: piece.trajectory.x_0().narrow(0, 0, 3),
            text: piece.conditioning.prompts().narrow(0, 0, 3),
            weights: Tensor::from_slice(weights),
        };
        let at = NoiseAt { seed: 1, iteration: 0, pass: 0, first: 0 };
        let value_of = |trainer: &mut Trainer, weights: &[f32]| {
            in_lane(trainer, |work| lane_value(work, &samples(weights), 0.5, &at)).unwrap()
        };
        // linear in the weights
        let parts: Vec<f64> = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
            .map(|weights| value_of(&mut trainer, &weights).double_value(&[]))
            .to_vec();
        let weights = [0.25f32, 1.0, 0.0];
        let value = value_of(&mut trainer, &weights);
        assert!(
            (value.double_value(&[]) - (0.25 * parts[0] + parts[1])).abs() < 1e-7 * parts.iter().sum::<f64>().max(1.0)
        );
        assert!(parts.iter().all(|&p| p > 0.0) && parts[0] != parts[1]);
        let gradient = gradient(&trainer, &value);
        let errors = errors_along_directions(&mut trainer, &gradient, 2e-2, |trainer| {
            value_of(trainer, &weights).double_value(&[])
        });
        println!("relative errors {errors:?}");
        // observed 3e-3
        assert!(errors.iter().all(|&e| e < 1e-2), "{errors:?}");
    }
}
