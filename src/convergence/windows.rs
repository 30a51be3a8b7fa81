//! A curve cut into windows of iterations, and how two of them compare.

use super::Point;

/// The median of |z| of a normal z.
const NORMAL_MEDIAN: f64 = 0.674_489_750_196_081_7;

/// The complete windows of a curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Windows {
    /// None where less than two values are finite.
    all: Vec<Option<Window>>,
    /// s, of one value.
    noise: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    /// First and last iteration, counted from 1.
    pub from: u64,
    pub to: u64,
    pub mean: f64,
    /// Values that are finite.
    count: usize,
}

/// A window beside the best one before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    pub newer: Window,
    pub best: Window,
    /// Of the difference of their means.
    pub standard_error: f64,
}

impl Difference {
    pub fn gain(&self) -> f64 {
        self.newer.mean - self.best.mean
    }

    pub fn in_standard_errors(&self) -> f64 {
        match self.gain() {
            0.0 => 0.0,
            gain => gain / self.standard_error,
        }
    }
}

impl Windows {
    /// Of the values up to iteration `done`; what is beyond the last complete window is left out.
    pub(super) fn of(points: &[Point], window: u64, done: u64) -> Self {
        let (mut all, mut changes) = (Vec::new(), Vec::new());
        let mut points = points.iter().filter(|point| point.0 > 0).peekable();
        for k in 0..done / window {
            let (from, to) = (k * window + 1, (k + 1) * window);
            let mut inside = Vec::new();
            while let Some(Point(_, value)) = points.next_if(|point| point.0 <= to) {
                if value.is_finite() {
                    inside.push(*value);
                }
            }
            changes.extend(inside.windows(2).map(|pair| (pair[1] - pair[0]).abs()));
            let mean = inside.iter().sum::<f64>() / inside.len() as f64;
            all.push((inside.len() > 1).then_some(Window { from, to, mean, count: inside.len() }));
        }
        Windows { all, noise: median(changes) / (2.0f64.sqrt() * NORMAL_MEDIAN) }
    }

    pub fn first(&self) -> Option<Window> {
        self.all.iter().flatten().next().copied()
    }

    /// The newest one.
    pub fn last(&self) -> Option<Window> {
        *self.all.last()?
    }

    /// The best of the newest `patience` windows beside the best of those before.
    pub fn rise(&self, patience: usize) -> Option<Difference> {
        let (before, newest) = self.all.split_at(self.all.len().checked_sub(patience)?);
        let newest: Vec<Window> = newest.iter().copied().collect::<Option<_>>()?;
        self.difference(best(newest)?, best(before.iter().flatten().copied())?)
    }

    /// The newest window beside the best of those before.
    pub fn fall(&self) -> Option<Difference> {
        let (newest, before) = self.all.split_last()?;
        self.difference((*newest)?, best(before.iter().flatten().copied())?)
    }

    fn difference(&self, newer: Window, best: Window) -> Option<Difference> {
        let standard_error = self.noise * (1.0 / newer.count as f64 + 1.0 / best.count as f64).sqrt();
        Some(Difference { newer, best, standard_error })
    }
}

/// NaN of nothing.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The window with the highest mean; of equal ones the first.
fn best(windows: impl IntoIterator<Item = Window>) -> Option<Window> {
    windows.into_iter().reduce(|best, other| if other.mean > best.mean { other } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: &[f64]) -> Vec<Point> {
        values.iter().enumerate().map(|(i, &value)| Point(i as u64 + 1, value)).collect()
    }

    #[test]
    fn the_numbers_of_a_small_example() {
        // windows (1, 3), (2, 4), (6, 6), the last value is of none; changes 2, 2, 0
        let windows = Windows::of(&points(&[1.0, 3.0, 2.0, 4.0, 6.0, 6.0, 9.0]), 2, 7);
        let noise = 2.0 / 2.0f64.sqrt() / 0.6744897501960817;
        let rise = windows.rise(1).unwrap();
        assert_eq!((rise.newer.mean, rise.best.mean, rise.best.from, rise.best.to), (6.0, 3.0, 3, 4));
        assert!((rise.standard_error - noise).abs() < 1e-15, "√(1/2 + 1/2) = 1");
        assert_eq!(windows.fall(), windows.rise(1));
        let both = windows.rise(2).unwrap();
        assert_eq!((both.newer.mean, both.best.mean, both.gain()), (6.0, 2.0, 4.0));
        assert!((both.in_standard_errors() - 4.0 / noise).abs() < 1e-14);
        assert_eq!((windows.rise(3), windows.rise(4)), (None, None));
        assert_eq!((windows.first().unwrap().mean, windows.last().unwrap().to), (2.0, 6));
    }

    #[test]
    fn a_trend_is_no_noise() {
        let windows = Windows::of(&points(&(0..40).map(f64::from).collect::<Vec<_>>()), 10, 40);
        // a step of 1 each where the deviation within a window is 3
        assert!((windows.noise - 1.0483).abs() < 1e-4);
        assert!(windows.rise(2).unwrap().in_standard_errors() > 40.0);
    }

    /// A collapse within a window is a fall and not noise: 0.35, 0.15, 0.05 and then next to nothing.
    #[test]
    fn a_sudden_fall_is_no_noise() {
        let values = [
            0.355, 0.153, 0.046, 0.035, 0.055, 0.022, 0.018, 0.024, 0.041, 0.068, 0.016, 0.008, 0.016, 0.026, 0.030,
            0.011,
        ];
        let fall = Windows::of(&points(&values), 4, 16).fall().unwrap();
        assert!(fall.in_standard_errors() < -8.0, "{fall:?}");
    }

    /// Of normal noise it is the deviation.
    #[test]
    fn the_noise_is_that_of_normal_values() {
        let mut values = vec![0f32; 4000];
        crate::random::Coordinates::new(3, crate::random::Purpose::Sample).stream().fill_normal(&mut values);
        let values: Vec<f64> = values.into_iter().map(|z| 0.2 * f64::from(z)).collect();
        let noise = Windows::of(&points(&values), 50, 4000).noise;
        // its own error is about 2 %
        assert!((noise - 0.2).abs() < 0.015, "{noise}");
    }

    #[test]
    fn sparse_values_fall_into_their_windows() {
        let evaluations: Vec<Point> = [0, 4, 8, 12, 16, 20].map(|done| Point(done, done as f64)).to_vec();
        let windows = Windows::of(&evaluations, 8, 20);
        // the model before training is of no window
        assert_eq!((windows.first().unwrap().mean, windows.last().unwrap().mean), (6.0, 14.0));
        assert!(Windows::of(&evaluations, 4, 20).fall().is_none(), "one value a window");
    }
}
