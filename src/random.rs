//! All randomness of rldiff: the counter-based generator Philox4x32-10 (Salmon et al., SC 2011).
//!
//! A number is a pure function of (seed, purpose, iteration, task, global sample, step, position), never of the
//! rank, so the same run on another number of ranks draws the same numbers.
//!
//! Counter layout (four 32-bit words): `[position / 4, sample, iteration, purpose << 24 | task << 16 | step]`;
//! the key is the 64-bit seed. `cuda/` uses the same layout.

use tch::{Device, Kind, Tensor};

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32-10: four words of counter and two of key to four random words.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let product0 = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let product1 = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (product1 >> 32) as u32 ^ counter[1] ^ key[0],
            product1 as u32,
            (product0 >> 32) as u32 ^ counter[3] ^ key[1],
            product0 as u32,
        ];
    }
    counter
}

/// What a stream of random numbers is for; two purposes never share a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// x_T of a roll-out.
    InitialLatent = 1,
    /// z of one DDIM transition (`step` = index of the denoising step).
    TransitionNoise = 2,
    /// Which prompt a group of samples gets.
    Prompt = 3,
    /// Which denoising steps are trained on in an iteration.
    TimestepChoice = 4,
    /// Which (image, caption) pair a pretraining sample is.
    PretrainPair = 5,
    /// Noise and timestep of a pretraining sample.
    PretrainNoise = 6,
    /// Initial weights of a model built without a checkpoint.
    WeightInit = 7,
    /// A procedural picture of the miniature world.
    Scene = 8,
    /// Prompts and noise of evaluations; independent of the iteration.
    Evaluation = 9,
    /// Held-out split of a prompt set.
    Split = 10,
    /// Sampling from the VAE's posterior when it is trained.
    Posterior = 11,
    /// Pictures asked for by hand (`rldiff sample`).
    Sample = 12,
    /// The control reward that is pure noise.
    RandomReward = 13,
    /// Noise and timestep at which a method denoises its own samples (`step` = number of the update).
    MethodNoise = 14,
    /// Noise by which DRaFT-LV takes a final sample back (`step` = number of the time).
    Renoising = 15,
    /// Draws behind confidence intervals.
    Resampling = 16,
    /// Which model stands on the left in a query of a human evaluation, and which rater gets it.
    StudySides = 20,
}

/// Coordinates of a stream; see the module's counter layout.
#[derive(Clone, Copy, Debug)]
pub struct Coordinates {
    pub seed: u64,
    pub purpose: Purpose,
    /// Iteration of training, or any other 32-bit number that tells streams apart.
    pub iteration: u32,
    /// Index of the task, 0 where there is none.
    pub task: u8,
    /// Global sample index, the same whatever the number of ranks.
    pub sample: u32,
    /// Index of the denoising step, 0 where there is none.
    pub step: u16,
}

impl Coordinates {
    pub fn new(seed: u64, purpose: Purpose) -> Self {
        Coordinates { seed, purpose, iteration: 0, task: 0, sample: 0, step: 0 }
    }

    /// The last word of the counter.
    pub(crate) fn tail(&self) -> u32 {
        u32::from(self.purpose as u8) << 24 | u32::from(self.task) << 16 | u32::from(self.step)
    }

    pub fn stream(self) -> Stream {
        Stream { coordinates: self, block: 0, buffer: [0; 4], used: 4 }
    }
}

/// The numbers of one stream, in order.
pub struct Stream {
    coordinates: Coordinates,
    block: u32,
    buffer: [u32; 4],
    used: usize,
}

impl Stream {
    /// The stream from word `4·block` on.
    pub fn from_block(mut self, block: u32) -> Self {
        (self.block, self.used) = (block, 4);
        self
    }

    fn next_block(&mut self) -> [u32; 4] {
        let c = &self.coordinates;
        let counter = [self.block, c.sample, c.iteration, c.tail()];
        let words = philox4x32_10(counter, [c.seed as u32, (c.seed >> 32) as u32]);
        self.block = self.block.wrapping_add(1);
        words
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.buffer = self.next_block();
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// Uniform in [0, 1), 32 bits fine.
    pub fn uniform(&mut self) -> f64 {
        f64::from(self.next_u32()) * (1.0 / 4_294_967_296.0)
    }

    /// Uniform in [low, high).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform integer in 0..n without modulo bias (multiply-shift with rejection). `n` must be positive.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "below(0)");
        if n <= u64::from(u32::MAX) {
            let threshold = (n as u32).wrapping_neg() % n as u32;
            loop {
                let product = u64::from(self.next_u32()) * n;
                if product as u32 >= threshold {
                    return product >> 32;
                }
            }
        }
        let threshold = n.wrapping_neg() % n;
        loop {
            let word = u64::from(self.next_u32()) << 32 | u64::from(self.next_u32());
            let product = u128::from(word) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// `count` different indices out of 0..n in random order (partial Fisher–Yates).
    pub fn choose(&mut self, n: usize, count: usize) -> Vec<usize> {
        assert!(count <= n, "cannot choose {count} of {n}");
        let mut all: Vec<usize> = (0..n).collect();
        for i in 0..count {
            let j = i + self.below((n - i) as u64) as usize;
            all.swap(i, j);
        }
        all.truncate(count);
        all
    }

    /// Index drawn with probabilities proportional to `weights`.
    pub fn weighted(&mut self, weights: &[f64]) -> usize {
        let mut point = self.uniform() * weights.iter().sum::<f64>();
        for (i, w) in weights.iter().enumerate() {
            point -= w;
            if point < 0.0 {
                return i;
            }
        }
        weights.len() - 1
    }

    /// Fills `out` with N(0, 1) in f32 by Box–Muller, four numbers per Philox block. Starts at a fresh block.
    pub fn fill_normal(&mut self, out: &mut [f32]) {
        self.used = 4;
        for chunk in out.chunks_mut(4) {
            let words = self.next_block();
            let (a, b) = box_muller(words[0], words[1]);
            let (c, d) = box_muller(words[2], words[3]);
            for (slot, value) in chunk.iter_mut().zip([a, b, c, d]) {
                *slot = value;
            }
        }
    }
}

/// Two words to two independent N(0, 1). The radius uses (word + 1) / 2^32 in (0, 1], so the logarithm is finite.
pub fn box_muller(word0: u32, word1: u32) -> (f32, f32) {
    const TO_UNIT: f32 = 1.0 / 4_294_967_296.0;
    let u = (word0 as f32 + 1.0) * TO_UNIT;
    let angle = (word1 as f32) * TO_UNIT * std::f32::consts::TAU;
    let radius = (-2.0 * u.min(1.0).ln()).sqrt();
    let (sin, cos) = angle.sin_cos();
    (radius * cos, radius * sin)
}

/// N(0, 1) latents for the samples `first..first + count`: f32 tensor [count, shape…] on the CPU; row i is the
/// stream of sample `first + i`.
pub fn normal_rows(at: Coordinates, first: u32, count: usize, shape: &[i64]) -> Tensor {
    let row: usize = shape.iter().product::<i64>() as usize;
    let mut values = vec![0f32; row * count];
    for (i, out) in values.chunks_mut(row.max(1)).enumerate() {
        Coordinates { sample: first + i as u32, ..at }.stream().fill_normal(out);
    }
    let mut size = vec![count as i64];
    size.extend_from_slice(shape);
    Tensor::from_slice(&values).to_kind(Kind::Float).to_device(Device::Cpu).view(size.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with Random123 (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn normals_have_unit_moments() {
        let mut values = vec![0f32; 200_000];
        Coordinates::new(3, Purpose::TransitionNoise).stream().fill_normal(&mut values);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let var = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        let fourth = values.iter().map(|&v| f64::from(v).powi(4)).sum::<f64>() / n;
        // five standard errors: 1/sqrt(n), sqrt(2/n), sqrt(96/n)
        assert!(mean.abs() < 5.0 / n.sqrt(), "mean {mean}");
        assert!((var - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "variance {var}");
        assert!((fourth - 3.0).abs() < 5.0 * (96.0 / n).sqrt(), "fourth moment {fourth}");
    }

    #[test]
    fn below_is_in_range_and_even() {
        let mut stream = Coordinates::new(1, Purpose::Prompt).stream();
        let mut counts = [0u32; 7];
        for _ in 0..70_000 {
            counts[stream.below(7) as usize] += 1;
        }
        // binomial standard deviation is 93; six of them
        assert!(counts.iter().all(|&c| (c as i64 - 10_000).abs() < 560), "{counts:?}");
        for _ in 0..100 {
            assert!(stream.below(1 << 40) < 1 << 40);
        }
    }

    #[test]
    fn choose_gives_different_indices() {
        let mut stream = Coordinates::new(1, Purpose::TimestepChoice).stream();
        for _ in 0..50 {
            let mut picked = stream.choose(50, 5);
            picked.sort_unstable();
            picked.dedup();
            assert_eq!(picked.len(), 5);
        }
    }

    #[test]
    fn rows_do_not_depend_on_how_they_are_cut() {
        let at = Coordinates::new(9, Purpose::InitialLatent);
        let whole = normal_rows(at, 0, 8, &[4, 3, 3]);
        let tail = normal_rows(at, 5, 3, &[4, 3, 3]);
        assert_eq!(whole.narrow(0, 5, 3), tail);
    }
}
