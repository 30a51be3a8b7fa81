//! DRaFT-LV (Clark et al., arXiv 2309.17400): the reward's gradient through the last denoising step.
//!
//! The current model denoises deterministically (η = 0), without gradients up to the last K steps (K = 1: the last one) and
//! with gradients through these; the result x_0 is decoded and judged. With K = 1 the last step is then taken n more times,
//! from x_0 noised back to where that step began, x_1 = √ᾱ·x_0 + √(1−ᾱ)·ε_j, each with a gradient of its own:
//!
//! L = −1/N · Σ_i 1/(1+n) · Σ_{j=0..n} r(x_0^{ij}, c_i),
//!
//! j = 0 the roll-out's own last step. The mean of 1+n gradients has a lower variance than one: of what the noise of the
//! repetitions brings, n/(1+n)² of the variance that one of them has. Adapters are trained, not the network.
//! A sample whose reward is not finite adds nothing; N stays all samples of the batch.

use anyhow::{Context, Result};
use tch::Tensor;

use super::{
    through_reward::{self, Course, ThroughReward},
    Method,
};
use crate::{
    config::DraftConfig,
    diffusion::schedule::Step,
    iteration_log::IterationLog,
    random::{normal_rows, Coordinates, Purpose},
    train::{LaneWork, Observe, Piece, RollOut, Trainer},
};

pub struct Draft {
    pub settings: DraftConfig,
    /// g.
    pub guidance_scale: f64,
}

/// A deterministic step: its mean.
fn arrive(step: &Step, x_t: &Tensor, eps: &Tensor) -> Tensor {
    x_t * step.c_x + eps * step.c_eps
}

/// The value whose gradient is that of `factor` times the mean over own last steps and repetitions of what `judge` sums,
/// and what it said of the own ones. `steps` are the last K; `noises` those of the repetitions of the very last one.
fn value_of_last_steps(
    steps: &[Step],
    x_t: &Tensor,
    noises: &[Tensor],
    factor: f64,
    mut eps: impl FnMut(&Tensor, &Step) -> Tensor,
    mut judge: impl FnMut(&Tensor) -> Result<ThroughReward>,
) -> Result<(Tensor, ThroughReward)> {
    let mut x_0 = x_t.shallow_clone();
    for step in steps {
        x_0 = arrive(step, &x_0, &eps(&x_0, step));
    }
    let factor = factor / (1 + noises.len()) as f64;
    let own = judge(&x_0.detach())?;
    let mut value = own.value(&x_0, factor);
    let last = steps.last().context("no step to go through")?;
    for noise in noises {
        let again = x_0.detach() * last.alpha_bar.sqrt() + noise * (1.0 - last.alpha_bar).sqrt();
        let x_0 = arrive(last, &again, &eps(&again, last));
        value += judge(&x_0.detach())?.value(&x_0, factor);
    }
    Ok((value, own))
}

impl Draft {
    /// A lane's objective and its rewards. `piece` was rolled out up to the last K steps.
    fn lane_value(
        &self,
        work: &mut LaneWork,
        piece: &Piece,
        seed: u64,
        iteration: u64,
        factor: f64,
    ) -> Result<(Tensor, Vec<f32>)> {
        let steps = &work.steps[work.steps.len() - self.settings.truncation..];
        let x_t = piece.trajectory.x_0();
        let (pipeline, size) = (work.pipeline, x_t.size());
        let noises: Vec<Tensor> = (0..self.settings.renoisings)
            .map(|repetition| {
                let at = Coordinates {
                    iteration: iteration as u32,
                    task: work.task.index,
                    step: repetition as u16,
                    ..Coordinates::new(seed, Purpose::Renoising)
                };
                normal_rows(at, piece.first as u32, size[0] as usize, &size[1..]).to_device(pipeline.device)
            })
            .collect();
        let eps = |x_t: &Tensor, step: &Step| piece.conditioning.predict(&pipeline.unet, x_t, step.t).guided();
        let at_once = self.settings.decode_batch;
        let task = &mut *work.task;
        let judge = |x_0: &Tensor| {
            through_reward::differentiate(pipeline, task, x_0, &piece.prompts, at_once, |rewards| rewards * -1.0)
        };
        let (value, own) = value_of_last_steps(steps, x_t, &noises, factor, eps, judge)?;
        own.log(work);
        Ok((value, own.rewards))
    }
}

impl Method for Draft {
    fn train_on(
        &self,
        trainer: &mut Trainer,
        task: usize,
        iteration: u64,
        log: &mut IterationLog,
        observe: &mut Observe,
    ) -> Result<()> {
        let (seed, steps) = (trainer.config.run.seed, trainer.steps.len());
        let without = steps - self.settings.truncation;
        let course = Course {
            task,
            iteration,
            how: RollOut { unet: None, steps: without, guidance_scale: self.guidance_scale, at_once: usize::MAX },
            chosen: (without..steps).collect(),
            what: "the last steps".to_string(),
            max_bad_fraction: self.settings.max_bad_fraction,
        };
        course.train(trainer, log, observe, |work, piece, factor| self.lane_value(work, piece, seed, iteration, factor))
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::methods::testing::{config, errors_along_directions, gradient, in_lane, piece, trainer};

    const SIZE: [i64; 4] = [1, 1, 8, 8];

    fn field(purpose: Purpose, sample: u32) -> Tensor {
        normal_rows(Coordinates::new(3, purpose), sample, 1, &SIZE[1..])
    }

    /// A step that noises half of the picture away.
    fn step() -> Step {
        let (alpha_bar, alpha_bar_prev) = (0.5f64, 0.9f64);
        let (signal, noise) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
        let direction = (1.0 - alpha_bar_prev).sqrt();
        Step {
            index: 0,
            t: 500,
            t_prev: 1,
            alpha_bar,
            alpha_bar_prev,
            sigma: 0.0,
            c_x: alpha_bar_prev.sqrt() / signal,
            c_eps: direction - alpha_bar_prev.sqrt() * noise / signal,
            x0_x: 1.0 / signal,
            x0_eps: -noise / signal,
        }
    }

    /// d/dθ of the value for the network eps = θ·x and the reward Σ x_0, at θ.
    fn derivative(steps: &[Step], theta: f64, x_t: &Tensor, noises: &[Tensor]) -> f64 {
        let theta = Tensor::from(theta as f32).set_requires_grad(true);
        let judge = |x_0: &Tensor| Ok(ThroughReward { rewards: vec![0.0], loss_sum: 0.0, gradient: x_0.ones_like() });
        let (value, _) = value_of_last_steps(steps, x_t, noises, 1.0, |x, _| x * &theta, judge).unwrap();
        value.backward();
        theta.grad().double_value(&[])
    }

    /// In closed form: every term is c_eps·Σ x where its last step began, and x_0 behind a repetition is held fixed.
    #[test]
    fn the_gradient_of_a_linear_network_is_the_closed_form() {
        let (step, theta) = (step(), 0.3);
        let x_t = field(Purpose::InitialLatent, 0);
        let sum = |x: &Tensor| x.sum(Kind::Double).double_value(&[]);
        let x_0 = sum(&x_t) * (step.c_x + step.c_eps * theta);
        for n in 0..=3 {
            let noises: Vec<Tensor> = (0..n).map(|j| field(Purpose::Renoising, j)).collect();
            let begun = |noise: &Tensor| step.alpha_bar.sqrt() * x_0 + (1.0 - step.alpha_bar).sqrt() * sum(noise);
            let total = step.c_eps * (sum(&x_t) + noises.iter().map(begun).sum::<f64>());
            let expected = total / f64::from(n + 1);
            let found = derivative(&[step], theta, &x_t, &noises);
            // f32 sums of 64 numbers of order 1: observed 1e-6
            assert!((found - expected).abs() < 1e-4, "n = {n}: {found} instead of {expected}");
        }
        // two steps: d/dθ of x·(c_x + c_eps·θ)², through both
        let found = derivative(&[step, step], theta, &x_t, &[]);
        let expected = sum(&x_t) * 2.0 * (step.c_x + step.c_eps * theta) * step.c_eps;
        assert!((found - expected).abs() < 1e-4, "{found} instead of {expected}");
    }

    /// The noise of the repetitions gives the linear network's gradient the variance c_eps²·(1−ᾱ)·D·n/(1+n)²: for n = 2 it
    /// is 8/9 of that for n = 1, and goes to 0 like 1/n.
    #[test]
    fn more_repetitions_lower_the_variance_as_they_should() {
        let (step, draws) = (step(), 3000u32);
        let x_t = field(Purpose::InitialLatent, 0);
        let variance = |n: u32| {
            let values = (0..draws).map(|draw| {
                let noises: Vec<Tensor> = (0..n).map(|j| field(Purpose::Renoising, draw * 8 + j)).collect();
                derivative(&[step], 0.3, &x_t, &noises)
            });
            let values: Vec<f64> = values.collect();
            let mean = values.iter().sum::<f64>() / f64::from(draws);
            values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(draws)
        };
        let of_noise = step.c_eps.powi(2) * (1.0 - step.alpha_bar) * 64.0;
        let [one, two, six] = [1, 2, 6].map(variance);
        for (n, found) in [(1.0, one), (2.0, two), (6.0, six)] {
            let expected = of_noise * n / (1.0 + n) / (1.0 + n);
            println!("n = {n}: variance {found:.4}, expected {expected:.4}");
            // four standard errors of a variance from 3000 draws: 4·√(2/3000)
            assert!((found / expected - 1.0).abs() < 0.104, "n = {n}: {found} instead of {expected}");
        }
        assert!(two < one && six < two, "{one} {two} {six}");
    }

    #[test]
    fn through_the_miniature_it_is_that_of_finite_differences() {
        for settings in
            [["method.truncation=1", "task.preference.samples=4"], ["method.truncation=2", "task.preference.samples=2"]]
        {
            let config = config("draft", &[&settings[..], &["method.renoisings=0"]].concat());
            let crate::config::MethodConfig::Draft(own) = config.method.clone() else { panic!() };
            let draft = Draft { settings: own, guidance_scale: 3.0 };
            let mut trainer = trainer(&config);
            let fixed = piece(&mut trainer, 6 - draft.settings.truncation, 3.0);
            let value_of =
                |trainer: &mut Trainer| in_lane(trainer, |work| draft.lane_value(work, &fixed, 1, 0, 1.0)).unwrap();
            let value = value_of(&mut trainer).0;
            let gradient = gradient(&trainer, &value);
            let errors = errors_along_directions(&mut trainer, &gradient, 2e-2, |trainer| {
                -value_of(trainer).1.iter().map(|&r| f64::from(r)).sum::<f64>()
            });
            println!("{settings:?}: relative errors {errors:?}");
            // observed 3e-4
            assert!(errors.iter().all(|&e| e < 3e-3), "{errors:?}");
        }
    }
}
