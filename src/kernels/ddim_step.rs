//! One DDIM transition: guidance, mean, then drawing x_{t−1} or scoring a stored one.
//!
//! ```text
//! eps = eps_uncond + g·(eps_cond − eps_uncond)
//! μ   = c_x·x_t + c_eps·eps
//! draw:  x_prev = μ + σ·z
//! both:  log_prob = −mean_D((x_prev − μ)²)/(2σ²) − ln σ − ½ ln 2π
//! ```
//!
//! The log-probability is the MEAN over the D elements of a sample (nats per element), not their sum. That is the
//! convention the clip range 1e-4 belongs to: for a sum the ratio of one update would be about 1.01^16384.
//!
//! Drawing computes the log-probability from the rounded x_prev that it returns, with the function that scores it
//! later; [`clipped_surrogate`](super::clipped_surrogate) calls the same one. Hence exp(log_prob − log_prob_old) is
//! exactly 1 as long as the model's output is the same.

use super::cuda::{arguments, ensure_apart, Element, Machine, Slice};
use super::normal_rows::{DeviceStream, Rows};
use super::ordered_sum;
use anyhow::{ensure, Result};

/// ½ ln 2π.
const HALF_LN_TWO_PI: f64 = 0.918_938_533_204_672_8;

/// Noise to draw with, or a stored x_prev to score.
#[derive(Clone, Copy, Debug)]
pub enum Given<T> {
    /// z ~ N(0, 1), as large as x_t.
    Draw(T),
    /// The x_prev of a trajectory.
    Score(T),
}

/// The numbers of a transition that all samples share; `Step::scalars` makes them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepScalars {
    /// ∂μ/∂x_t.
    pub c_x: f64,
    /// ∂μ/∂eps, where eps is the guided output of the model.
    pub c_eps: f64,
    /// Standard deviation of the transition.
    pub sigma: f64,
    /// g; 1 means no guidance.
    pub guidance_scale: f64,
}

/// What the mean of one sample is made from: three rows of D elements.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub eps_uncond: &'a [f32],
    pub eps_cond: &'a [f32],
    pub x_t: &'a [f32],
}

impl Inputs<'_> {
    /// μ, element by element, in f32.
    pub fn mean<'a>(&'a self, step: &StepScalars) -> impl Iterator<Item = f32> + 'a {
        let (c_x, c_eps, guidance) = (step.c_x as f32, step.c_eps as f32, step.guidance_scale as f32);
        let eps =
            self.eps_uncond.iter().zip(self.eps_cond).map(move |(&uncond, &cond)| uncond + guidance * (cond - uncond));
        self.x_t.iter().zip(eps).map(move |(&x_t, eps)| c_x * x_t + c_eps * eps)
    }

    /// log p(x_prev | x_t), nats per element. The one place where a transition is scored.
    pub fn log_prob(&self, x_prev: &[f32], step: &StepScalars) -> f32 {
        let squares = self.mean(step).zip(x_prev).map(|(mean, &x_prev)| f64::from(x_prev - mean).powi(2));
        let mean_square = ordered_sum(squares) / x_prev.len() as f64;
        (-mean_square / (2.0 * step.sigma * step.sigma) - step.sigma.ln() - HALF_LN_TWO_PI) as f32
    }
}

/// Draws or scores B transitions of D elements; B is the length of `log_prob`, all other slices hold B·D.
///
/// Writes x_prev (in `Score` mode a copy of what is given) and log_prob. With σ = 0 drawing writes x_prev = μ, the
/// plain DDIM sampler whatever the noise, and log_prob = NaN, for the transition has no density.
///
/// # Errors
/// Slices whose lengths do not fit together; scoring with σ = 0.
pub fn reference(
    eps_uncond: &[f32],
    eps_cond: &[f32],
    x_t: &[f32],
    given: Given<&[f32]>,
    step: &StepScalars,
    x_prev: &mut [f32],
    log_prob: &mut [f32],
) -> Result<()> {
    let (Given::Draw(source) | Given::Score(source)) = given;
    let row = row_length(log_prob.len(), &[eps_uncond, eps_cond, x_t, source, x_prev])?;
    if matches!(given, Given::Score(_)) {
        ensure_density(step)?;
    }
    for (sample, log_prob) in log_prob.iter_mut().enumerate() {
        let range = sample * row..(sample + 1) * row;
        let inputs = Inputs {
            eps_uncond: &eps_uncond[range.clone()],
            eps_cond: &eps_cond[range.clone()],
            x_t: &x_t[range.clone()],
        };
        let (source, x_prev) = (&source[range.clone()], &mut x_prev[range]);
        match given {
            Given::Score(_) => x_prev.copy_from_slice(source),
            Given::Draw(_) => draw(&inputs, source, step, x_prev),
        }
        *log_prob = if step.sigma > 0.0 { inputs.log_prob(x_prev, step) } else { f32::NAN };
    }
    Ok(())
}

fn draw(inputs: &Inputs, noise: &[f32], step: &StepScalars, x_prev: &mut [f32]) {
    let sigma = step.sigma as f32;
    for ((x_prev, mean), &noise) in x_prev.iter_mut().zip(inputs.mean(step)).zip(noise) {
        *x_prev = if sigma > 0.0 { mean + sigma * noise } else { mean };
    }
}

/// D, the length of a row, where every slice holds `samples` rows.
pub(super) fn row_length(samples: usize, slices: &[&[f32]]) -> Result<usize> {
    let total = slices[0].len();
    for (i, slice) in slices.iter().enumerate() {
        ensure!(
            slice.len() == total,
            "argument {i} of a transition has {} elements, the first has {total}",
            slice.len()
        );
    }
    if samples == 0 {
        ensure!(total == 0, "{total} elements for 0 samples");
        return Ok(0);
    }
    ensure!(total > 0 && total % samples == 0, "{total} elements cannot be {samples} samples of equal size");
    Ok(total / samples)
}

/// Refuses a transition without a density.
pub(super) fn ensure_density(step: &StepScalars) -> Result<()> {
    ensure!(
        step.sigma > 0.0,
        "the transition has sigma = {}: it is deterministic and has no log-probability (use eta > 0)",
        step.sigma
    );
    Ok(())
}

/// Threads of a block in `cuda/transition.cuh`; one block has one sample.
pub(super) const ROW_THREADS: u32 = 1024;

/// `Step` of `cuda/transition.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceStep {
    c_x: f32,
    c_eps: f32,
    guidance_scale: f32,
    sigma: f32,
    two_variance: f64,
    log_sigma: f64,
}

impl From<&StepScalars> for DeviceStep {
    fn from(step: &StepScalars) -> Self {
        DeviceStep {
            c_x: step.c_x as f32,
            c_eps: step.c_eps as f32,
            guidance_scale: step.guidance_scale as f32,
            sigma: step.sigma as f32,
            two_variance: 2.0 * step.sigma * step.sigma,
            log_sigma: step.sigma.ln(),
        }
    }
}

/// B rows of D elements on the device: the outputs of the model (f32, bf16 or f16, both the same) and x_t (f32).
/// Without guidance give `eps_cond` twice and a guidance scale of 1.
#[derive(Clone, Copy, Debug)]
pub struct DeviceInputs<'a> {
    pub eps_uncond: Slice<'a>,
    pub eps_cond: Slice<'a>,
    pub x_t: Slice<'a>,
}

impl DeviceInputs<'_> {
    /// D, for `samples` rows.
    pub(super) fn check(&self, samples: usize) -> Result<u32> {
        let total = self.x_t.len();
        ensure!(
            if samples == 0 { total == 0 } else { total > 0 && total % samples == 0 },
            "{total} elements cannot be {samples} samples of equal size"
        );
        self.x_t.expect(total, Element::F32, "x_t")?;
        self.eps_cond.element().variant("eps_cond")?;
        self.eps_cond.expect(total, self.eps_cond.element(), "eps_cond")?;
        self.eps_uncond.expect(total, self.eps_cond.element(), "eps_uncond")?;
        let row = total.checked_div(samples).unwrap_or(0);
        ensure!(row < 1 << 31 && samples < 1 << 31, "{samples} rows of {row} elements are too many for a launch");
        Ok(row as u32)
    }

    pub(super) fn slices(&self) -> [Slice<'_>; 3] {
        [self.eps_uncond, self.eps_cond, self.x_t]
    }
}

/// On the device: draws x_prev (f32, B·D) with the noise of `rows`, the numbers of
/// [`random::normal_rows`](crate::random::normal_rows), and writes its log_prob (f32, B); σ = 0 as in [`reference()`].
///
/// The noise can differ from the host's in the last bits, since logarithm and sine do. The log-probability is summed in
/// f32.
///
/// # Errors
/// Slices that do not fit together or overlap; a launch that fails.
pub fn launch_draw(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    rows: Rows,
    step: &StepScalars,
    x_prev: Slice,
    log_prob: Slice,
) -> Result<()> {
    let samples = log_prob.len();
    let row = inputs.check(samples)?;
    x_prev.expect(inputs.x_t.len(), Element::F32, "x_prev")?;
    log_prob.expect(samples, Element::F32, "log_prob")?;
    ensure_apart(&[x_prev, log_prob], &inputs.slices())?;
    if samples == 0 {
        return Ok(());
    }
    let kernel = ["ddim_step_draw_f32", "ddim_step_draw_bf16", "ddim_step_draw_f16"]
        [inputs.eps_cond.element().variant("eps")?];
    let pointers = inputs.slices().map(|slice| slice.address());
    let (x_prev, log_prob) = (x_prev.address(), log_prob.address());
    let (step, stream) = (DeviceStep::from(step), DeviceStream::from(rows));
    let arguments = arguments![pointers[0], pointers[1], pointers[2], x_prev, log_prob, row, step, stream];
    // SAFETY: types and order as in cuda/ddim_step.cu; the slices hold B·D and B elements, checked above
    unsafe { machine.launch(kernel, [samples as u32, 1], ROW_THREADS, arguments) }
}

/// On the device: writes the log-probability (f32, B) of a stored x_prev (f32, B·D); the bits that [`launch_draw`]
/// wrote when it drew it from the same inputs.
///
/// # Errors
/// Slices that do not fit together or overlap; σ = 0; a launch that fails.
pub fn launch_score(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    x_prev: Slice,
    step: &StepScalars,
    log_prob: Slice,
) -> Result<()> {
    let samples = log_prob.len();
    let row = inputs.check(samples)?;
    ensure_density(step)?;
    x_prev.expect(inputs.x_t.len(), Element::F32, "x_prev")?;
    log_prob.expect(samples, Element::F32, "log_prob")?;
    let [uncond, cond, x_t] = inputs.slices();
    ensure_apart(&[log_prob], &[uncond, cond, x_t, x_prev])?;
    if samples == 0 {
        return Ok(());
    }
    let kernel = ["ddim_step_score_f32", "ddim_step_score_bf16", "ddim_step_score_f16"]
        [inputs.eps_cond.element().variant("eps")?];
    let pointers = [uncond, cond, x_t, x_prev, log_prob].map(|slice| slice.address());
    let step = DeviceStep::from(step);
    let arguments = arguments![pointers[0], pointers[1], pointers[2], pointers[3], pointers[4], row, step];
    // SAFETY: types and order as in cuda/ddim_step.cu; the slices hold B·D and B elements, checked above
    unsafe { machine.launch(kernel, [samples as u32, 1], ROW_THREADS, arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Coordinates, Purpose};

    const STEP: StepScalars = StepScalars { c_x: 1.01, c_eps: -0.08, sigma: 0.11, guidance_scale: 7.0 };

    fn normals(count: usize, sample: u32) -> Vec<f32> {
        let mut stream = Coordinates { sample, ..Coordinates::new(3, Purpose::TransitionNoise) }.stream();
        (0..count).map(|_| (0..12).map(|_| stream.uniform()).sum::<f64>() as f32 - 6.0).collect()
    }

    fn run(given: Given<&[f32]>, step: &StepScalars, samples: usize, row: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let [eps_uncond, eps_cond, x_t] = [1, 2, 3].map(|i| normals(samples * row, i));
        let (mut x_prev, mut log_prob) = (vec![0.0; samples * row], vec![0.0; samples]);
        reference(&eps_uncond, &eps_cond, &x_t, given, step, &mut x_prev, &mut log_prob)?;
        Ok((x_prev, log_prob))
    }

    #[test]
    fn drawing_and_scoring_give_the_same_bits() {
        for (samples, row) in [(1, 1), (3, 5), (4, 256), (2, 1021)] {
            let noise = normals(samples * row, 4);
            let (x_prev, drawn) = run(Given::Draw(&noise), &STEP, samples, row).unwrap();
            let (same, scored) = run(Given::Score(&x_prev), &STEP, samples, row).unwrap();
            assert_eq!(x_prev, same);
            assert!(drawn.iter().zip(&scored).all(|(a, b)| a.to_bits() == b.to_bits()), "{drawn:?} {scored:?}");
        }
    }

    #[test]
    fn log_prob_is_the_mean_of_the_normal_density() {
        let (samples, row) = (2, 1000);
        let noise = normals(samples * row, 4);
        let (_, log_prob) = run(Given::Draw(&noise), &STEP, samples, row).unwrap();
        for (z, log_prob) in noise.chunks(row).zip(log_prob) {
            let mean_square: f64 = z.iter().map(|&z| f64::from(z).powi(2)).sum::<f64>() / row as f64;
            let expected = -0.5 * mean_square - STEP.sigma.ln() - 0.5 * (2.0 * std::f64::consts::PI).ln();
            // x_prev is rounded to f32 (|x| < 8: 2.4e-7, i.e. 2e-6 of sigma, averaged over 1000): observed 3e-8
            assert!((f64::from(log_prob) - expected).abs() < 5e-7, "{log_prob} {expected}");
        }
    }

    #[test]
    fn without_sigma_drawing_ignores_the_noise_and_scoring_is_refused() {
        let step = StepScalars { sigma: 0.0, ..STEP };
        let (quiet, log_prob) = run(Given::Draw(&[0.0; 12]), &step, 3, 4).unwrap();
        let (loud, _) = run(Given::Draw(&[f32::INFINITY; 12]), &step, 3, 4).unwrap();
        assert_eq!(quiet, loud);
        assert!(log_prob.iter().all(|p| p.is_nan()));
        let error = run(Given::Score(&quiet), &step, 3, 4).unwrap_err().to_string();
        assert!(error.contains("sigma = 0") && error.contains("eta"), "{error}");
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors_and_no_samples_are_fine() {
        assert!(run(Given::Draw(&[0.0; 11]), &STEP, 3, 4).is_err());
        assert!(row_length(3, &[&[0.0; 10]]).is_err());
        assert!(row_length(2, &[&[]]).is_err());
        run(Given::Draw(&[]), &STEP, 0, 4).unwrap();
    }

    #[test]
    fn without_guidance_eps_is_the_conditional_output() {
        let step = StepScalars { guidance_scale: 1.0, ..STEP };
        let eps = normals(64, 1);
        let x_t = normals(64, 2);
        let inputs = Inputs { eps_uncond: &eps, eps_cond: &eps, x_t: &x_t };
        let expected: Vec<f32> = x_t.iter().zip(&eps).map(|(x, e)| 1.01f32 * x + -0.08f32 * e).collect();
        assert_eq!(inputs.mean(&step).collect::<Vec<_>>(), expected);
    }
}
