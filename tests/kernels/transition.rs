//! The cases of the transition and of the clipped surrogate; see `cases.rs`.

use std::sync::Arc;

use rldiff::kernels::clipped_surrogate::{self, DeviceGradients, DeviceStored, Objective, SampleTerms, TERMS};
use rldiff::kernels::cuda::{Element, Machine, Slice};
use rldiff::kernels::ddim_step::{self, DeviceInputs, Given, StepScalars};
use rldiff::kernels::normal_rows::Rows;

use super::cases::{f32_bits, largest, largest_gap, noise, normals, on_all, rounded, stream, values};
use super::cases::{Buffer, Machines, Observed, Placed, Real};

/// Row lengths: one element, less than four, not a multiple of four, around the block's 4096 elements, the paper's, and
/// more than the surrogate keeps in registers.
const LENGTHS: [usize; 10] = [1, 3, 6, 256, 1023, 1025, 4096, 4099, 16_384, 16_390];
const STEP: StepScalars = StepScalars { c_x: 1.013, c_eps: -0.0831, sigma: 0.112, guidance_scale: 7.0 };

/// The inputs of a transition for `samples` rows, as the host and the device see them.
struct Transition<T> {
    eps_uncond: Vec<T>,
    eps_cond: Vec<T>,
    x_t: Vec<f32>,
}

impl<T: Real> Transition<T> {
    fn new(samples: usize, length: usize) -> Self {
        let [uncond, cond, x_t] = [0, 1, 2].map(|i| normals(samples * length, i));
        Transition { eps_uncond: rounded(&uncond), eps_cond: rounded(&cond), x_t }
    }

    fn place(&self, machine: &Arc<dyn Machine>, offset: usize) -> [Placed; 3] {
        [
            Placed::new(machine, &self.eps_uncond, offset),
            Placed::new(machine, &self.eps_cond, offset),
            Placed::new(machine, &self.x_t, offset),
        ]
    }

    fn reference(&self, given: Given<&[f32]>, step: &StepScalars, samples: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut x_prev, mut log_prob) = (vec![0.0; self.x_t.len()], vec![0.0; samples]);
        let (uncond, cond) = (values(&self.eps_uncond), values(&self.eps_cond));
        ddim_step::reference(&uncond, &cond, &self.x_t, given, step, &mut x_prev, &mut log_prob).unwrap();
        (x_prev, log_prob)
    }

    /// x_prev and log_prob as drawn on the device, and its score of that x_prev.
    fn draw(&self, machine: &Arc<dyn Machine>, step: &StepScalars, samples: usize, offset: usize) -> [Vec<f32>; 3] {
        let placed = self.place(machine, offset);
        let inputs = device_inputs(&placed);
        let x_prev = Placed::empty(machine, self.x_t.len(), Element::F32, offset);
        let [log_prob, score] = [0, 1].map(|_| Placed::empty(machine, samples, Element::F32, 0));
        let rows = Rows { first: stream() };
        ddim_step::launch_draw(&**machine, &inputs, rows, step, x_prev.slice(), log_prob.slice()).unwrap();
        if step.sigma > 0.0 {
            ddim_step::launch_score(&**machine, &inputs, x_prev.slice(), step, score.slice()).unwrap();
            [x_prev.download(), log_prob.download(), score.download()]
        } else {
            [x_prev.download(), log_prob.download(), log_prob.download()]
        }
    }
}

fn device_inputs(placed: &[Placed; 3]) -> DeviceInputs<'_> {
    let [eps_uncond, eps_cond, x_t] = placed.each_ref().map(Placed::slice);
    DeviceInputs { eps_uncond, eps_cond, x_t }
}

pub fn draws_and_scores<T: Real>(machines: &Machines, seen: &mut Observed) {
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let (samples, offset) = (1 + i % 3, usize::from(i % 4 == 3));
        let case = Transition::<T>::new(samples, length);
        let [x_prev, log_prob, score] =
            on_all(machines, |r: &[Vec<f32>; 3]| f32_bits(&r.concat()), |m| case.draw(m, &STEP, samples, offset));
        // the score of what was drawn: the same bits
        assert_eq!(f32_bits(&log_prob), f32_bits(&score), "length {length}");
        let (drawn, _) = case.reference(Given::Draw(&noise(samples, length)), &STEP, samples);
        // sigma times the noise's 2e-6, and the rounding of a number below 16; emulation: observed 0
        seen.check("x_prev", largest_gap(&x_prev, &drawn), 1.3e-6);
        let (_, of_stored) = case.reference(Given::Score(&x_prev), &STEP, samples);
        // f32 sum of 16,384 squares in 10 + 4 levels: some units in the last place of a number near 1; observed 6e-8
        seen.check("log_prob", largest_gap(&log_prob, &of_stored), 6e-7);
    }
    let case = Transition::<T>::new(0, 5);
    case.draw(&machines[0], &STEP, 0, 0);
    let quiet = StepScalars { sigma: 0.0, ..STEP };
    let case = Transition::<T>::new(2, 77);
    let [x_prev, log_prob, _] = case.draw(&machines[0], &quiet, 2, 0);
    assert_eq!(x_prev, case.reference(Given::Draw(&[0.0; 154]), &quiet, 2).0);
    assert!(log_prob.iter().all(|p| p.is_nan()));
}

/// Advantages and log-ratios of seven samples: inside the clip range, outside it on the side that clips or does not,
/// excluded, of no advantage.
const ADVANTAGE: [f32; 7] = [1.3, 0.7, -0.9, 0.8, -1.1, f32::NAN, 0.0];
const LOG_RATIO: [f32; 7] = [3e-5, 8e-4, 9e-4, -7e-4, -6e-4, 0.0, 4e-5];
const OBJECTIVE: Objective = Objective { clip_range: 1e-4, weight: 0.5, samples: 24 };

/// Terms and both gradients.
type Outcome = (Vec<SampleTerms>, Vec<f32>, Vec<f32>);

fn outcome_bits((terms, grad_uncond, grad_cond): &Outcome) -> Vec<u32> {
    let mut bits: Vec<u32> =
        terms.iter().flat_map(|t| [t.log_prob, t.ratio, t.loss, t.approx_kl]).map(f32::to_bits).collect();
    bits.extend(terms.iter().flat_map(|t| [u32::from(t.clipped), u32::from(t.used)]));
    bits.extend(f32_bits(grad_uncond).into_iter().chain(f32_bits(grad_cond)));
    bits
}

struct Stored<'a> {
    x_prev: &'a [f32],
    log_prob_old: &'a [f32],
    advantage: &'a [f32],
    step: StepScalars,
}

fn surrogate_on<T: Real>(
    machine: &Arc<dyn Machine>,
    case: &Transition<T>,
    stored: &Stored,
    offset: usize,
    both: bool,
) -> Outcome {
    let placed = case.place(machine, offset);
    let mut inputs = device_inputs(&placed);
    let of_stored = [stored.x_prev, stored.log_prob_old, stored.advantage];
    let of_stored = of_stored.map(|values| Placed::new(machine, values, offset));
    let [x_prev, log_prob_old, advantage] = of_stored.each_ref().map(Placed::slice);
    let terms = Placed::empty(machine, stored.advantage.len() * TERMS, Element::F32, 0);
    let [grad_uncond, grad_cond] = [0, 1].map(|_| Placed::empty(machine, case.x_t.len(), Element::F32, offset));
    if !both {
        inputs.eps_uncond = inputs.eps_cond;
    }
    let out = DeviceGradients {
        terms: terms.slice(),
        grad_uncond: both.then(|| grad_uncond.slice()),
        grad_cond: grad_cond.slice(),
    };
    let stored_on = DeviceStored { x_prev, log_prob_old, advantage };
    clipped_surrogate::launch(&**machine, &inputs, &stored_on, &stored.step, &OBJECTIVE, &out).unwrap();
    let grad_uncond = if both { grad_uncond.download() } else { Vec::new() };
    (clipped_surrogate::terms_from(&terms.download::<f32>()), grad_uncond, grad_cond.download())
}

fn surrogate_reference<T: Real>(case: &Transition<T>, stored: &Stored, both: bool) -> Outcome {
    let eps_cond = values(&case.eps_cond);
    let eps_uncond = if both { values(&case.eps_uncond) } else { eps_cond.clone() };
    let (mut grad_uncond, mut grad_cond) = (vec![0.0; case.x_t.len()], vec![0.0; case.x_t.len()]);
    let terms = clipped_surrogate::reference(
        &eps_uncond,
        &eps_cond,
        &case.x_t,
        stored.x_prev,
        stored.log_prob_old,
        stored.advantage,
        &stored.step,
        &OBJECTIVE,
        &mut grad_uncond,
        &mut grad_cond,
    )
    .unwrap();
    (terms, grad_uncond, grad_cond)
}

fn compare_outcomes(ours: &Outcome, expected: &Outcome, seen: &mut Observed) {
    for (a, b) in ours.0.iter().zip(&expected.0) {
        assert_eq!((a.clipped, a.used), (b.clipped, b.used));
        // as in `draws_and_scores`: observed 1.2e-7
        seen.check("log_prob", largest_gap(&[a.log_prob], &[b.log_prob]), 6e-7);
        // the log-probability's error, and one unit in the last place of 1: observed 1.2e-7, so too the loss
        seen.check("ratio", largest_gap(&[a.ratio], &[b.ratio]), 7e-7);
        seen.check("loss", largest_gap(&[a.loss], &[b.loss]), 1.2e-6);
        // log_ratio times the log-probability's error: observed 7e-11
        seen.check("approx_kl", largest_gap(&[a.approx_kl], &[b.approx_kl]), 6e-10);
    }
    for (a, b) in [(&ours.1, &expected.1), (&ours.2, &expected.2)] {
        // the ratio's error, and rounding: observed 1.6e-7
        seen.check("gradient, relative", largest_gap(a, &b[..a.len()]) / largest(b).max(1e-30), 1e-6);
    }
}

pub fn surrogate<T: Real>(machines: &Machines, seen: &mut Observed) {
    let no_guidance = StepScalars { guidance_scale: 1.0, ..STEP };
    for (i, length) in LENGTHS.into_iter().enumerate() {
        let (samples, offset, both) = (ADVANTAGE.len(), usize::from(i % 4 == 3), i % 3 != 1);
        let step = if both { STEP } else { no_guidance };
        let mut case = Transition::<T>::new(samples, length);
        if !both {
            case.eps_uncond = case.eps_cond.clone();
        }
        let (x_prev, log_prob) = case.reference(Given::Draw(&noise(samples, length)), &step, samples);
        let log_prob_old: Vec<f32> = log_prob.iter().zip(LOG_RATIO).map(|(p, r)| p - r).collect();
        let mut stored = Stored { x_prev: &x_prev, log_prob_old: &log_prob_old, advantage: &ADVANTAGE, step };
        let ours = on_all(machines, outcome_bits, |m| surrogate_on(m, &case, &stored, offset, both));
        compare_outcomes(&ours, &surrogate_reference(&case, &stored, both), seen);

        // an excluded sample and one without advantage are still whatever they hold, a broken one is seen, the others
        // do not change
        let mut broken = x_prev.clone();
        broken[5 * length] = f32::NAN;
        broken[length] = f32::NAN;
        broken[6 * length] = f32::INFINITY;
        stored.x_prev = &broken;
        let (terms, _, grad_cond) = surrogate_on(&machines[0], &case, &stored, offset, both);
        assert_eq!(terms[5], SampleTerms::default());
        assert!(grad_cond[5 * length..].iter().all(|&g| g == 0.0));
        assert!(terms[1].loss.is_nan() && grad_cond[length].is_nan());
        assert_eq!(terms[0], ours.0[0]);
    }
    let none = Stored { x_prev: &[], log_prob_old: &[], advantage: &[], step: STEP };
    surrogate_on(&machines[0], &Transition::<T>::new(0, 3), &none, 0, true);
}

/// Before the first update: w is exactly 1 where the device drew and scores the same outputs.
pub fn first_ratio<T: Real>(machines: &Machines) {
    for length in LENGTHS {
        let case = Transition::<T>::new(3, length);
        let [x_prev, log_prob_old, _] = case.draw(&machines[0], &STEP, 3, 0);
        let stored = Stored { x_prev: &x_prev, log_prob_old: &log_prob_old, advantage: &[1.0, -2.0, 0.5], step: STEP };
        let (terms, ..) = surrogate_on(&machines[1], &case, &stored, 0, true);
        assert!(terms.iter().all(|t| t.ratio == 1.0 && t.approx_kl == 0.0 && !t.clipped), "{length}: {terms:?}");
    }
}

/// Launchers refuse what does not fit before anything is launched.
pub fn misfits_are_refused(machines: &Machines) {
    let machine = &machines[0];
    let case = Transition::<f32>::new(2, 8);
    let placed = case.place(machine, 0);
    let inputs = device_inputs(&placed);
    let [x_prev, short] = [16, 15].map(|length| Placed::empty(machine, length, Element::F32, 0));
    let log_prob = Placed::empty(machine, 2, Element::F32, 0);
    let rows = Rows { first: stream() };
    let draw = |inputs: &DeviceInputs, x_prev: Slice| {
        ddim_step::launch_draw(&**machine, inputs, rows, &STEP, x_prev, log_prob.slice())
    };
    draw(&inputs, x_prev.slice()).unwrap();
    assert!(draw(&inputs, short.slice()).unwrap_err().to_string().contains("x_prev"));
    assert!(draw(&inputs, inputs.x_t).unwrap_err().to_string().contains("overlaps"));
    let doubles = Buffer::new(machine, 16, Element::F64).unwrap();
    assert!(draw(&DeviceInputs { eps_cond: doubles.slice(), ..inputs }, x_prev.slice()).is_err());
    let halves = Buffer::new(machine, 16, Element::F16).unwrap();
    assert!(draw(&DeviceInputs { eps_cond: halves.slice(), ..inputs }, x_prev.slice()).is_err());
    let quiet = StepScalars { sigma: 0.0, ..STEP };
    let score = ddim_step::launch_score(&**machine, &inputs, x_prev.slice(), &quiet, log_prob.slice());
    assert!(score.unwrap_err().to_string().contains("sigma = 0"));
}
