//! Pillow's way of changing a picture's size, to the bit: what reward networks were trained and are published with.
//!
//! Every output pixel is a weighted mean of input pixels under a filter that is stretched where the picture shrinks.
//! Rows first, then columns; the weights are integers of 22 fractional bits and each pass rounds to whole grey levels.

/// Resampling filters by Pillow's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// A triangle of radius 1.
    Bilinear,
    /// Keys' cubic of radius 2 with a = −0.5.
    Bicubic,
}

impl Filter {
    fn radius(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        let x = x.abs();
        match self {
            Filter::Bilinear => (1.0 - x).max(0.0),
            Filter::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Filter::Bicubic => 0.0,
        }
    }
}

/// Which input pixels an output pixel is made of.
pub struct Taps {
    pub first: usize,
    /// Sum 1.
    pub weights: Vec<f64>,
}

/// The taps of every output pixel of a line of `from` pixels that becomes `to` pixels long.
pub fn taps(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let reach = filter.radius() * stretch;
    let of_pixel = |pixel: usize| {
        let center = (pixel as f64 + 0.5) * scale;
        // truncation towards zero, as in C
        let first = ((center - reach + 0.5) as i64).max(0) as usize;
        let end = ((center + reach + 0.5) as i64).clamp(0, from as i64) as usize;
        let inverse = 1.0 / stretch;
        let mut weights: Vec<f64> = (first..end).map(|i| filter.weight((i as f64 - center + 0.5) * inverse)).collect();
        let sum: f64 = weights.iter().sum();
        if sum != 0.0 {
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        Taps { first, weights }
    };
    (0..to).map(of_pixel).collect()
}

/// As [`taps`] without a stretched filter: torch's `interpolate` with `antialias=False`. Two pixels, or four with a = −0.75,
/// around the place in the line of `from`; beyond the ends the last pixel counts again.
pub fn taps_without_antialias(from: usize, to: usize, filter: Filter) -> Vec<Taps> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| (((x - 5.0) * x + 8.0) * x - 4.0) * A;
    let scale = from as f64 / to as f64;
    let of_pixel = |pixel: usize| {
        let place = (pixel as f64 + 0.5) * scale - 0.5;
        let place = if filter == Filter::Bilinear { place.max(0.0) } else { place };
        let (below, t) = (place.floor(), place - place.floor());
        let around = match filter {
            Filter::Bilinear => vec![(0.0, 1.0 - t), (1.0, t)],
            Filter::Bicubic => vec![(-1.0, far(t + 1.0)), (0.0, near(t)), (1.0, near(1.0 - t)), (2.0, far(2.0 - t))],
        };
        let last = from as f64 - 1.0;
        let at = |step: f64| (below + step).clamp(0.0, last) as usize;
        let first = at(around[0].0);
        let mut weights = vec![0.0; at(around[around.len() - 1].0) - first + 1];
        for (step, weight) in around {
            weights[at(step) - first] += weight;
        }
        Taps { first, weights }
    };
    (0..to).map(of_pixel).collect()
}

/// Fractional bits of the weights.
const BITS: u32 = 22;

/// `rgb`, rows of `from` = \[width, height\] pixels of three bytes, in the size `to`. Panics where the lengths disagree
/// or a side is 0.
pub fn resize(rgb: &[u8], from: [usize; 2], to: [usize; 2], filter: Filter) -> Vec<u8> {
    assert_eq!(rgb.len(), 3 * from[0] * from[1], "bytes of a picture of {from:?}");
    assert!(from.iter().chain(&to).all(|&side| side > 0), "{from:?} to {to:?}");
    let mut picture = rgb.to_vec();
    if to[0] != from[0] {
        let taps = fixed(&taps(from[0], to[0], filter));
        let rows = picture.chunks_exact(3 * from[0]);
        picture = rows.flat_map(|row| taps.iter().flat_map(move |tap| pixel(row, 3, tap))).collect();
    }
    if to[1] != from[1] {
        let (taps, stride) = (fixed(&taps(from[1], to[1], filter)), 3 * to[0]);
        let mut out = Vec::with_capacity(stride * to[1]);
        for tap in &taps {
            for column in 0..to[0] {
                out.extend(pixel(&picture[3 * column..], stride, tap));
            }
        }
        picture = out;
    }
    picture
}

struct FixedTaps {
    first: usize,
    weights: Vec<i64>,
}

fn fixed(taps: &[Taps]) -> Vec<FixedTaps> {
    // half away from zero, as Pillow rounds
    let whole = |w: &f64| (w * f64::from(1u32 << BITS)).round() as i64;
    taps.iter().map(|t| FixedTaps { first: t.first, weights: t.weights.iter().map(whole).collect() }).collect()
}

/// The three channels of one output pixel; `stride` bytes lie between neighbours along the line.
fn pixel(line: &[u8], stride: usize, tap: &FixedTaps) -> [u8; 3] {
    let mut sums = [1i64 << (BITS - 1); 3];
    for (i, weight) in tap.weights.iter().enumerate() {
        let at = (tap.first + i) * stride;
        for (sum, &value) in sums.iter_mut().zip(&line[at..at + 3]) {
            *sum += weight * i64::from(value);
        }
    }
    sums.map(|sum| (sum >> BITS).clamp(0, 255) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_picture_stays_plain() {
        for (from, to) in [([7, 5], [3, 11]), ([4, 4], [4, 9]), ([512, 300], [224, 131]), ([1, 1], [6, 6])] {
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let plain: Vec<u8> = [10u8, 200, 77].repeat(from[0] * from[1]);
                let out = resize(&plain, from, to, filter);
                assert_eq!(out, [10u8, 200, 77].repeat(to[0] * to[1]), "{from:?} {to:?}");
            }
        }
    }

    /// Half the size by a triangle: weights 1, 3, 3, 1 of 8.
    #[test]
    fn known_weights() {
        let inner = &taps(8, 4, Filter::Bilinear)[1];
        assert_eq!((inner.first, inner.weights.as_slice()), (1, &[0.125, 0.375, 0.375, 0.125][..]));
        // at the double size a cubic gives the neighbours at 1/4 and 3/4 the weights of Keys' polynomial
        let cubic = &taps(4, 8, Filter::Bicubic)[3];
        let keys = [-0.0234375, 0.2265625, 0.8671875, -0.0703125];
        assert_eq!(cubic.first, 0);
        let expected: Vec<f64> = keys.iter().rev().copied().collect();
        let gap = cubic.weights.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(cubic.weights.len() == 4 && gap < 1e-12, "{:?}", cubic.weights);
    }
}
