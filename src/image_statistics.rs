//! Two numbers that show when a reward is gained by a trick: noise in fine detail, and pictures that are all alike
//! (Fig. 4 and 28 of the paper). Neither needs a model.

use anyhow::{ensure, Result};
use tch::{Device, Kind, Tensor};

/// Radial frequency in cycles per pixel above which detail counts as fine; 0.5 is Nyquist's along a row.
pub const FINE: f64 = 0.25;

/// Share of each picture's spectral energy above [`FINE`].
///
/// `images` is f32 \[n, 3, H, W\] in \[0, 1\]. With luma Y = 0.299 R + 0.587 G + 0.114 B, F the two-dimensional Fourier
/// transform of Y − mean(Y), and f = √(f_x² + f_y²) with f_x, f_y in \[−½, ½) cycles per pixel:
/// Σ_{f > ¼} |F|² / Σ |F|². A picture of one colour has 0, white noise 1 − π/16 = 0.80; a picture with a value that is not
/// finite has NaN.
pub fn high_frequency_share(images: &Tensor) -> Result<Vec<f64>> {
    let size = images.size();
    ensure!(size.len() == 4 && size[1] == 3, "a spectrum needs pictures [n, 3, H, W], not {size:?}");
    let (height, width) = (size[2], size[3]);
    let fine = above(FINE, height, width);
    let weights = Tensor::from_slice(&[0.299_f64, 0.587, 0.114]).view([3, 1, 1]);
    let images = images.to_device(Device::Cpu).to_kind(Kind::Double);
    // one by one: the last bits must not depend on what else is in the batch
    let share = |i: i64| -> f64 {
        let luma = (images.get(i) * &weights).sum_dim_intlist([0_i64].as_slice(), false, Kind::Double);
        if !bool::try_from(luma.isfinite().all()).unwrap_or(false) {
            return f64::NAN;
        }
        let energy = (&luma - luma.mean(Kind::Double)).fft_fft2(None::<i64>, [-2_i64, -1], "backward").abs().square();
        let total = energy.sum(Kind::Double).double_value(&[]);
        // what rounding leaves of a flat picture: (2^-52)² per value before the transform, whose energy is n times that
        let nothing = (height * width).pow(2) as f64 * 1e-30;
        if total <= nothing {
            0.0
        } else {
            (energy * &fine).sum(Kind::Double).double_value(&[]) / total
        }
    };
    Ok((0..size[0]).map(share).collect())
}

/// f64 \[height, width\], 1 where the frequency of a Fourier coefficient is above `cutoff`, else 0.
fn above(cutoff: f64, height: i64, width: i64) -> Tensor {
    let frequency = |k: i64, n: i64| (if 2 * k < n { k } else { k - n }) as f64 / n as f64;
    let radius = |k: i64| frequency(k / width, height).hypot(frequency(k % width, width));
    let values: Vec<f64> = (0..height * width).map(|k| f64::from(u8::from(radius(k) > cutoff))).collect();
    Tensor::from_slice(&values).view([height, width])
}

/// How different the pictures of one prompt are: the mean over all pairs of the root of the mean squared difference over
/// pixels and channels. `images` is f32 \[n, 3, H, W\] in \[0, 1\] with n ≥ 2; so is the result, 0 where all are the same.
pub fn diversity(images: &Tensor) -> Result<f64> {
    let n = images.size()[0];
    ensure!(n >= 2, "diversity needs two pictures of a prompt or more");
    let images = images.to_device(Device::Cpu).to_kind(Kind::Double).flatten(1, -1);
    let (mut sum, mut pairs) = (0.0, 0);
    for i in 0..n {
        for j in i + 1..n {
            sum += (images.get(i) - images.get(j)).square().mean(Kind::Double).sqrt().double_value(&[]);
            pairs += 1;
        }
    }
    Ok(sum / f64::from(pairs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{normal_rows, Coordinates, Purpose};

    /// A picture [1, 3, h, w] of y(x, y) in all channels.
    fn grey(height: i64, width: i64, value: impl Fn(f64, f64) -> f64) -> Tensor {
        let values: Vec<f32> =
            (0..height * width).map(|k| value((k % width) as f64, (k / width) as f64) as f32).collect();
        Tensor::from_slice(&values).view([1, 1, height, width]).repeat([1, 3, 1, 1])
    }

    fn wave(frequency_x: f64, frequency_y: f64, x: f64, y: f64) -> f64 {
        (std::f64::consts::TAU * (frequency_x * x + frequency_y * y)).cos()
    }

    #[test]
    fn waves_have_their_energy_at_their_frequency() {
        let share = |image: &Tensor| high_frequency_share(image).unwrap()[0];
        // 4 and 12 cycles over 32 pixels: 0.125 and 0.375 per pixel; (6, 6) has √2 · 0.1875 = 0.265
        let low = grey(32, 32, |x, y| 0.5 + 0.2 * wave(0.125, 0.0, x, y));
        let high = grey(32, 32, |x, y| 0.5 + 0.2 * wave(0.0, 0.375, x, y));
        let diagonal = grey(32, 32, |x, y| 0.5 + 0.2 * wave(0.1875, 0.1875, x, y));
        // f32 pixels: an error of 2^-25 each is 1e-13 of the energy; observed 6e-15
        assert!(share(&low) < 1e-12 && share(&high) > 1.0 - 1e-12 && share(&diagonal) > 1.0 - 1e-12);
        // amplitudes a and b: b²/(a² + b²); not square, so that x and y could be mixed up
        let both = grey(24, 40, |x, y| 0.5 + 0.2 * wave(0.1, 0.0, x, y) + 0.1 * wave(0.0, 0.375, x, y));
        assert!((share(&both) - 0.01 / 0.05).abs() < 1e-6, "{}", share(&both));
        // exactly the cutoff is not above it
        assert!(share(&grey(32, 32, |x, y| 0.5 + 0.2 * wave(0.25, 0.0, x, y))) < 1e-12);
        assert_eq!(share(&grey(32, 32, |_, _| 0.3)), 0.0);
        assert!(share(&grey(8, 8, |x, _| if x == 3.0 { f64::NAN } else { 0.5 })).is_nan());
    }

    /// Against the definition: a plain double sum in f64 of Fourier's formula, on noise.
    #[test]
    fn the_transform_is_fouriers() {
        let (height, width) = (10_i64, 7_i64);
        let image = normal_rows(Coordinates::new(3, Purpose::Sample), 0, 2, &[3, height, width]);
        let shares = high_frequency_share(&image).unwrap();
        for (n, share) in shares.iter().enumerate() {
            let value = |c: i64, y: i64, x: i64| image.double_value(&[n as i64, c, y, x]);
            let luma: Vec<f64> = (0..height * width)
                .map(|k| (k / width, k % width))
                .map(|(y, x)| 0.299 * value(0, y, x) + 0.587 * value(1, y, x) + 0.114 * value(2, y, x))
                .collect();
            let mean = luma.iter().sum::<f64>() / luma.len() as f64;
            let (mut fine, mut total) = (0.0, 0.0);
            for ky in 0..height {
                for kx in 0..width {
                    let (mut re, mut im) = (0.0, 0.0);
                    for (k, y) in luma.iter().enumerate() {
                        let (py, px) = (k as i64 / width, k as i64 % width);
                        let angle = std::f64::consts::TAU
                            * ((ky * py) as f64 / height as f64 + (kx * px) as f64 / width as f64);
                        re += (y - mean) * angle.cos();
                        im -= (y - mean) * angle.sin();
                    }
                    let wrapped = |k: i64, n: i64| (k as f64 / n as f64).min(1.0 - k as f64 / n as f64);
                    let energy = re * re + im * im;
                    total += energy;
                    if wrapped(ky, height).hypot(wrapped(kx, width)) > 0.25 {
                        fine += energy;
                    }
                }
            }
            // observed 4e-16
            assert!((share - fine / total).abs() < 1e-13, "{share} {}", fine / total);
        }
    }

    /// White noise has the same energy everywhere: the share is that of the coefficients beyond the circle, 1 − π/16 but
    /// for the raggedness of the circle; the mean of 16 pictures of 64² scatters by 0.0016;
    /// observed 0.0001.
    #[test]
    fn white_noise_has_the_share_of_the_area() {
        let noise = normal_rows(Coordinates::new(5, Purpose::Sample), 0, 16, &[3, 64, 64]) * 0.1 + 0.5;
        let shares = high_frequency_share(&noise).unwrap();
        let mean = shares.iter().sum::<f64>() / 16.0;
        assert!((mean - (1.0 - std::f64::consts::PI / 16.0)).abs() < 0.005, "{mean}");
    }

    #[test]
    fn diversity_is_the_mean_distance_of_pairs() {
        let flat = |values: &[f32]| Tensor::from_slice(values).view([-1, 1, 1, 1]).expand([-1, 3, 4, 5], false);
        // distances 0.25, 0.75, 0.5
        assert!((diversity(&flat(&[0.0, 0.25, 0.75])).unwrap() - 0.5).abs() < 1e-12);
        assert_eq!(diversity(&flat(&[0.3, 0.3])).unwrap(), 0.0);
        // black against white is 1; half of the pixels different by 1 is √½
        assert_eq!(diversity(&flat(&[0.0, 1.0])).unwrap(), 1.0);
        let half = grey(2, 2, |x, _| x);
        let both = Tensor::cat(&[&half, &half.zeros_like()], 0);
        assert!((diversity(&both).unwrap() - 0.5_f64.sqrt()).abs() < 1e-12);
        assert!(diversity(&flat(&[0.5])).is_err());
    }
}
