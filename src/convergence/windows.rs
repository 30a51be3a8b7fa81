//! A curve cut into windows of iterations, and how two of them compare.

use super::Point;

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
        let (mut all, mut squares, mut pairs) = (Vec::new(), 0.0, 0usize);
        let mut points = points.iter().filter(|point| point.0 > 0).peekable();
        for k in 0..done / window {
            let (from, to) = (k * window + 1, (k + 1) * window);
            let mut inside = Vec::new();
            while let Some(Point(_, value)) = points.next_if(|point| point.0 <= to) {
                if value.is_finite() {
                    inside.push(*value);
                }
            }
            squares += inside.windows(2).map(|pair| (pair[1] - pair[0]).powi(2) / 2.0).sum::<f64>();
            pairs += inside.len().saturating_sub(1);
            let mean = inside.iter().sum::<f64>() / inside.len() as f64;
            all.push((inside.len() > 1).then_some(Window { from, to, mean, count: inside.len() }));
        }
        Windows { all, noise: (squares / pairs as f64).sqrt() }
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
        // windows (1, 3), (2, 4), (6, 6), the last value is of none; differences 2, 2, 0
        let windows = Windows::of(&points(&[1.0, 3.0, 2.0, 4.0, 6.0, 6.0, 9.0]), 2, 7);
        let noise = ((2.0 + 2.0 + 0.0) / 3.0f64).sqrt();
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
        // a step of 1 each: s = 1/√2 where the deviation within a window is 3
        assert!((windows.noise - 0.5f64.sqrt()).abs() < 1e-15);
        assert!(windows.rise(2).unwrap().in_standard_errors() > 60.0);
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
