//! The clipped objective of one denoising step (Eq. 7), its diagnostics and its gradient in closed form.
//!
//! ```text
//! w  = exp(log_prob − log_prob_old)
//! L  = weight/N · Σ max(−Â·w, −Â·clip(w, 1−ε, 1+ε))  =  −weight/N · Σ min(Â·w, g(ε, Â))
//! ∂L/∂log_prob     = −weight/N·Â·w  where the unclipped branch is active, else 0
//! ∂log_prob/∂μ     = (x_prev − μ)/(σ²·D)
//! ∂μ/∂eps          = c_eps,   ∂eps/∂eps_cond = g,   ∂eps/∂eps_uncond = 1 − g
//! ```
//!
//! N counts the samples of the whole batch of all ranks, so that gradients of parts of it just add up.
//! A sample whose advantage is NaN is excluded: no loss, and a gradient of exactly 0 whatever its other inputs hold.
//! A log-probability that is NaN is not hidden by the clipping: it gives a NaN loss and NaN gradients.

use super::cuda::{arguments, ensure_apart, Element, Machine, Slice};
use super::ddim_step::{ensure_density, row_length, DeviceInputs, DeviceStep, Inputs, StepScalars, ROW_THREADS};
use anyhow::{ensure, Result};

/// What Eq. 7 is scaled and clipped with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// ε; 1e-4 belongs to log-probabilities that are means over the elements.
    pub clip_range: f64,
    /// Factor of this task's loss.
    pub weight: f64,
    /// N: usable samples in the whole batch, over all ranks.
    pub samples: usize,
}

/// Loss and diagnostics of one sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SampleTerms {
    /// Nats per element.
    pub log_prob: f32,
    /// w.
    pub ratio: f32,
    /// max(−Â·w, −Â·clip(w)), neither weighted nor divided by N.
    pub loss: f32,
    /// ½(log_prob − log_prob_old)², the estimate DDPO logs; its mean over the samples is the approximate KL
    /// divergence, in the (mean over elements) convention of the log-probabilities.
    pub approx_kl: f32,
    /// |w − 1| > ε, whether or not that stops the gradient.
    pub clipped: bool,
    /// False for a sample that is excluded; all else is then 0.
    pub used: bool,
}

/// Eq. 7 for one sample: its terms and −Â·w, or 0 where the clipped branch is active (∂loss/∂log_prob).
pub fn surrogate(log_prob: f32, log_prob_old: f32, advantage: f32, clip_range: f64) -> (SampleTerms, f64) {
    if advantage.is_nan() {
        return (SampleTerms::default(), 0.0);
    }
    let log_ratio = f64::from(log_prob - log_prob_old);
    let (ratio, advantage) = (log_ratio.exp(), f64::from(advantage));
    let unclipped = -advantage * ratio;
    let clipped = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range);
    // written so that NaN takes the unclipped branch and stays visible
    let (loss, slope) = if clipped > unclipped { (clipped, 0.0) } else { (unclipped, unclipped) };
    let terms = SampleTerms {
        log_prob,
        ratio: ratio as f32,
        loss: loss as f32,
        approx_kl: (0.5 * log_ratio * log_ratio) as f32,
        clipped: (ratio - 1.0).abs() > clip_range,
        used: true,
    };
    (terms, slope)
}

/// Loss terms of B samples of D elements and the gradients of L with respect to both outputs of the model.
///
/// B is the length of `log_prob_old` and of `advantage` (NaN = excluded); all other slices hold B·D. Writes
/// ∂L/∂eps_uncond and ∂L/∂eps_cond, weight and 1/N included.
///
/// # Errors
/// Slices whose lengths do not fit together; σ = 0; N = 0.
pub fn reference(
    eps_uncond: &[f32],
    eps_cond: &[f32],
    x_t: &[f32],
    x_prev: &[f32],
    log_prob_old: &[f32],
    advantage: &[f32],
    step: &StepScalars,
    objective: &Objective,
    grad_uncond: &mut [f32],
    grad_cond: &mut [f32],
) -> Result<Vec<SampleTerms>> {
    let samples = log_prob_old.len();
    ensure!(advantage.len() == samples, "{} advantages for {samples} log-probabilities", advantage.len());
    let row = row_length(samples, &[eps_uncond, eps_cond, x_t, x_prev, grad_uncond, grad_cond])?;
    ensure_density(step)?;
    ensure!(objective.samples > 0, "the batch has no usable sample");
    let scale = objective.weight / objective.samples as f64;
    let guidance = step.guidance_scale as f32;
    let mut terms = Vec::with_capacity(samples);
    for sample in 0..samples {
        let range = sample * row..(sample + 1) * row;
        let inputs = Inputs {
            eps_uncond: &eps_uncond[range.clone()],
            eps_cond: &eps_cond[range.clone()],
            x_t: &x_t[range.clone()],
        };
        let x_prev = &x_prev[range.clone()];
        let log_prob = inputs.log_prob(x_prev, step);
        let (of_sample, slope) = surrogate(log_prob, log_prob_old[sample], advantage[sample], objective.clip_range);
        terms.push(of_sample);
        let (grad_uncond, grad_cond) = (&mut grad_uncond[range.clone()], &mut grad_cond[range]);
        if slope == 0.0 {
            grad_uncond.fill(0.0);
            grad_cond.fill(0.0);
            continue;
        }
        let factor = (slope * scale * step.c_eps / (step.sigma * step.sigma * row as f64)) as f32;
        let gradients = grad_uncond.iter_mut().zip(grad_cond);
        for ((mean, &x_prev), (grad_uncond, grad_cond)) in inputs.mean(step).zip(x_prev).zip(gradients) {
            let grad_eps = factor * (x_prev - mean);
            *grad_uncond = (1.0 - guidance) * grad_eps;
            *grad_cond = guidance * grad_eps;
        }
    }
    Ok(terms)
}

/// Numbers per sample that the device writes: the fields of [`SampleTerms`] in their order, flags as 0 or 1.
pub const TERMS: usize = 6;

/// The terms of each sample, from what [`launch`] wrote.
pub fn terms_from(values: &[f32]) -> Vec<SampleTerms> {
    let term = |v: &[f32]| SampleTerms {
        log_prob: v[0],
        ratio: v[1],
        loss: v[2],
        approx_kl: v[3],
        clipped: v[4] != 0.0,
        used: v[5] != 0.0,
    };
    values.chunks_exact(TERMS).map(term).collect()
}

/// `Objective` of `cuda/clipped_surrogate.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct DeviceObjective {
    clip_range: f64,
    scale: f64,
    c_eps: f64,
    sigma: f64,
}

/// The stored transitions of B samples on the device, all f32.
#[derive(Clone, Copy, Debug)]
pub struct DeviceStored<'a> {
    /// B·D.
    pub x_prev: Slice<'a>,
    /// B.
    pub log_prob_old: Slice<'a>,
    /// B; NaN excludes the sample.
    pub advantage: Slice<'a>,
}

/// Where the device writes, all f32.
#[derive(Clone, Copy, Debug)]
pub struct DeviceGradients<'a> {
    /// B·[`TERMS`].
    pub terms: Slice<'a>,
    /// B·D; None without guidance.
    pub grad_uncond: Option<Slice<'a>>,
    /// B·D.
    pub grad_cond: Slice<'a>,
}

/// [`reference()`] on the device, in one launch. The log-probability is summed in f32, in the order in which
/// [`ddim_step::launch_draw`](super::ddim_step::launch_draw) summed it.
///
/// # Errors
/// Slices that do not fit together or overlap; σ = 0; N = 0; a launch that fails.
pub fn launch(
    machine: &dyn Machine,
    inputs: &DeviceInputs,
    stored: &DeviceStored,
    step: &StepScalars,
    objective: &Objective,
    out: &DeviceGradients,
) -> Result<()> {
    let samples = stored.log_prob_old.len();
    let row = inputs.check(samples)?;
    ensure_density(step)?;
    ensure!(objective.samples > 0, "the batch has no usable sample");
    let total = inputs.x_t.len();
    stored.x_prev.expect(total, Element::F32, "x_prev")?;
    stored.log_prob_old.expect(samples, Element::F32, "log_prob_old")?;
    stored.advantage.expect(samples, Element::F32, "advantage")?;
    out.terms.expect(samples * TERMS, Element::F32, "terms")?;
    out.grad_cond.expect(total, Element::F32, "grad_cond")?;
    let mut written = vec![out.terms, out.grad_cond];
    if let Some(grad_uncond) = out.grad_uncond {
        grad_uncond.expect(total, Element::F32, "grad_uncond")?;
        written.push(grad_uncond);
    }
    let [uncond, cond, x_t] = inputs.slices();
    let read = [uncond, cond, x_t, stored.x_prev, stored.log_prob_old, stored.advantage];
    ensure_apart(&written, &read)?;
    if samples == 0 {
        return Ok(());
    }
    let kernel = ["clipped_surrogate_f32", "clipped_surrogate_bf16", "clipped_surrogate_f16"]
        [inputs.eps_cond.element().variant("eps")?];
    let [uncond, cond, x_t, x_prev, log_prob_old, advantage] = read.map(|slice| slice.address());
    let (terms, grad_cond) = (out.terms.address(), out.grad_cond.address());
    let grad_uncond = out.grad_uncond.map_or(0, |slice| slice.address());
    let scale = objective.weight / objective.samples as f64;
    let objective = DeviceObjective { clip_range: objective.clip_range, scale, c_eps: step.c_eps, sigma: step.sigma };
    let step = DeviceStep::from(step);
    let arguments = arguments![
        uncond,
        cond,
        x_t,
        x_prev,
        log_prob_old,
        advantage,
        terms,
        grad_uncond,
        grad_cond,
        row,
        step,
        objective,
    ];
    // SAFETY: types and order as in cuda/clipped_surrogate.cu; lengths checked above; a null grad_uncond is allowed
    unsafe { machine.launch(kernel, [samples as u32, 1], ROW_THREADS, arguments) }
}

#[cfg(test)]
mod tests {
    use super::super::ddim_step::{self, Given};
    use super::*;
    use crate::random::{Coordinates, Purpose};
    use tch::{Kind, Tensor};

    const ROW: usize = 37;
    const STEP: StepScalars = StepScalars { c_x: 1.013, c_eps: -0.0831, sigma: 0.112, guidance_scale: 7.0 };
    const OBJECTIVE: Objective = Objective { clip_range: 1e-4, weight: 0.5, samples: 24 };
    /// One sample of each kind: inside the clip range, outside it on the side that clips or does not, excluded.
    const ADVANTAGE: [f32; 6] = [1.3, 0.7, -0.9, 0.8, -1.1, f32::NAN];
    const LOG_RATIO: [f32; 6] = [3e-5, 8e-4, 9e-4, -7e-4, -6e-4, 0.0];

    struct Case {
        eps_uncond: Vec<f32>,
        eps_cond: Vec<f32>,
        x_t: Vec<f32>,
        x_prev: Vec<f32>,
        log_prob_old: Vec<f32>,
    }

    fn case() -> Case {
        let draw = |sample| {
            let mut stream = Coordinates { sample, ..Coordinates::new(5, Purpose::TransitionNoise) }.stream();
            (0..6 * ROW).map(|_| (0..12).map(|_| stream.uniform()).sum::<f64>() as f32 - 6.0).collect::<Vec<f32>>()
        };
        let [eps_uncond, eps_cond, x_t, noise] = [0, 1, 2, 3].map(draw);
        let (mut x_prev, mut log_prob) = (vec![0.0; 6 * ROW], vec![0.0; 6]);
        ddim_step::reference(&eps_uncond, &eps_cond, &x_t, Given::Draw(&noise), &STEP, &mut x_prev, &mut log_prob)
            .unwrap();
        let log_prob_old = log_prob.iter().zip(LOG_RATIO).map(|(p, r)| p - r).collect();
        Case { eps_uncond, eps_cond, x_t, x_prev, log_prob_old }
    }

    fn evaluate(case: &Case, advantage: &[f32]) -> (Vec<SampleTerms>, Vec<f32>, Vec<f32>) {
        let (mut grad_uncond, mut grad_cond) = (vec![9.0; 6 * ROW], vec![9.0; 6 * ROW]);
        let Case { eps_uncond, eps_cond, x_t, x_prev, log_prob_old } = case;
        let terms = reference(
            eps_uncond,
            eps_cond,
            x_t,
            x_prev,
            log_prob_old,
            advantage,
            &STEP,
            &OBJECTIVE,
            &mut grad_uncond,
            &mut grad_cond,
        )
        .unwrap();
        (terms, grad_uncond, grad_cond)
    }

    /// L of the usable samples in f64 on tensors, written from the paper's formulas and not from the kernel.
    fn loss(eps_uncond: &Tensor, eps_cond: &Tensor, case: &Case) -> Tensor {
        let rows = |v: &[f32]| Tensor::from_slice(v).to_kind(Kind::Double).reshape([6, -1]);
        let eps = eps_uncond + (eps_cond - eps_uncond) * STEP.guidance_scale;
        let mean = rows(&case.x_t) * STEP.c_x + eps * STEP.c_eps;
        let z = (rows(&case.x_prev) - mean) / STEP.sigma;
        let density = z.square() * -0.5 - STEP.sigma.ln() - 0.5 * (2.0 * std::f64::consts::PI).ln();
        let log_prob = density.mean_dim(1, false, Kind::Double);
        let ratio = (log_prob - rows(&case.log_prob_old).reshape([6])).exp();
        let advantage = rows(&ADVANTAGE).reshape([6]).nan_to_num(0.0, 0.0, 0.0);
        let kept = ratio.clamp(1.0 - OBJECTIVE.clip_range, 1.0 + OBJECTIVE.clip_range);
        let worst = (-&advantage * &ratio).maximum(&(-&advantage * kept));
        worst.narrow(0, 0, 5).sum(Kind::Double) * (OBJECTIVE.weight / OBJECTIVE.samples as f64)
    }

    fn double(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Double).reshape([6, -1])
    }

    fn relative_gap(ours: &[f32], oracle: &Tensor) -> f64 {
        ((double(ours) - oracle).norm() / oracle.norm()).double_value(&[])
    }

    #[test]
    fn gradients_agree_with_autograd() {
        let case = case();
        let eps_uncond = double(&case.eps_uncond).set_requires_grad(true);
        let eps_cond = double(&case.eps_cond).set_requires_grad(true);
        let oracle = loss(&eps_uncond, &eps_cond, &case);
        oracle.backward();
        let (terms, grad_uncond, grad_cond) = evaluate(&case, &ADVANTAGE);
        // f32 against f64; x_prev − μ cancels to about 0.1 of values near 3: observed 5e-7
        let gaps = [relative_gap(&grad_uncond, &eps_uncond.grad()), relative_gap(&grad_cond, &eps_cond.grad())];
        assert!(gaps.iter().all(|&gap| gap < 5e-6), "{gaps:?}");
        let total: f64 = terms.iter().map(|t| f64::from(t.loss)).sum::<f64>() * OBJECTIVE.weight / 24.0;
        // the sum cancels to a fraction of its terms: observed 2e-9 absolute
        assert!((total - oracle.double_value(&[])).abs() < 2e-8, "{total} {oracle}");
    }

    #[test]
    fn gradients_agree_with_finite_differences() {
        let case = case();
        let (_, grad_uncond, grad_cond) = evaluate(&case, &ADVANTAGE);
        let (eps_uncond, eps_cond) = (double(&case.eps_uncond), double(&case.eps_cond));
        let largest = grad_cond.iter().fold(0f32, |m, g| m.max(g.abs()));
        for sample in 0..5i64 {
            for element in [0, 17, ROW as i64 - 1] {
                let flat = sample as usize * ROW + element as usize;
                for (which, ours) in [(0, grad_uncond[flat]), (1, grad_cond[flat])] {
                    // central difference with h = 1e-6 in f64: truncation 1e-12, rounding 1e-10, both relative to L
                    let h = 1e-6;
                    let at = |offset: f64| {
                        let shift = Tensor::zeros_like(&eps_cond);
                        let _ = shift.get(sample).get(element).fill_(offset);
                        let uncond = if which == 0 { &eps_uncond + &shift } else { eps_uncond.shallow_clone() };
                        let cond = if which == 1 { &eps_cond + &shift } else { eps_cond.shallow_clone() };
                        loss(&uncond, &cond, &case).double_value(&[])
                    };
                    let slope = (at(h) - at(-h)) / (2.0 * h);
                    let gap = (slope - f64::from(ours)).abs();
                    // observed 4e-7 of the largest gradient, from the kernel's f32
                    assert!(gap < 4e-6 * f64::from(largest), "sample {sample} element {element}: {ours} {slope}");
                }
            }
        }
    }

    #[test]
    fn each_branch_is_taken_by_the_sample_made_for_it() {
        let (terms, grad_uncond, grad_cond) = evaluate(&case(), &ADVANTAGE);
        let still: Vec<bool> = grad_cond.chunks(ROW).map(|row| row.iter().all(|&g| g == 0.0)).collect();
        assert_eq!(still, [false, true, false, false, true, true]);
        assert_eq!(grad_uncond.chunks(ROW).map(|row| row.iter().all(|&g| g == 0.0)).collect::<Vec<_>>(), still);
        assert_eq!(terms.iter().map(|t| t.clipped).collect::<Vec<_>>(), [false, true, true, true, true, false]);
        assert_eq!(terms.iter().map(|t| t.used).collect::<Vec<_>>(), [true, true, true, true, true, false]);
        assert_eq!(terms[5], SampleTerms::default());
    }

    #[test]
    fn ratio_is_exactly_one_before_any_update() {
        let mut case = case();
        let mut log_prob = vec![0.0; 6];
        let mut stored = vec![0.0; 6 * ROW];
        let Case { eps_uncond, eps_cond, x_t, x_prev, .. } = &case;
        ddim_step::reference(eps_uncond, eps_cond, x_t, Given::Draw(x_prev), &STEP, &mut stored, &mut log_prob)
            .unwrap();
        (case.x_prev, case.log_prob_old) = (stored, log_prob);
        let (terms, ..) = evaluate(&case, &[1.0, -1.0, 0.5, 2.0, 0.0, -3.0]);
        assert!(terms.iter().all(|t| t.ratio == 1.0 && t.approx_kl == 0.0 && !t.clipped), "{terms:?}");
    }

    #[test]
    fn an_excluded_sample_is_still_whatever_it_holds_and_a_broken_one_is_seen() {
        let mut case = case();
        case.eps_cond[5 * ROW] = f32::NAN;
        case.x_prev[5 * ROW + 1] = f32::INFINITY;
        let (terms, _, grad_cond) = evaluate(&case, &ADVANTAGE);
        assert_eq!(terms[5], SampleTerms::default());
        assert!(grad_cond[5 * ROW..].iter().all(|&g| g == 0.0));
        case.eps_cond[ROW] = f32::NAN;
        let (terms, _, grad_cond) = evaluate(&case, &ADVANTAGE);
        assert!(terms[1].loss.is_nan() && grad_cond[ROW].is_nan());
        assert!(terms[0].loss.is_finite());
    }
}
