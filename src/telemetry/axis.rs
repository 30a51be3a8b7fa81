//! What an axis of a plot spans, and the round numbers written on it.

use super::text::Style;

/// The looks of those numbers.
pub(super) fn tick_style() -> Style {
    Style::grey(17.0)
}

/// What an axis spans, and the numbers written on it: (value, text).
pub(crate) struct Axis {
    pub range: std::ops::Range<f64>,
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From the lowest to the highest of finite `values`, widened by `padding` of that on either side, with at most
    /// about `count` ticks at multiples of 1, 2 or 5 · 10^k. Never empty. Whole values get whole ticks.
    pub fn new(values: impl Iterator<Item = f64> + Clone, padding: f64, count: usize) -> Self {
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.clone().fold(f64::NEG_INFINITY, f64::max);
        let range = match high - low {
            extent if !extent.is_finite() => 0.0..1.0,
            // nearer to each other than labels can tell
            extent if extent < 1e-6 * low.abs().max(high.abs()).max(1e-6) => {
                let around = 0.05 * low.abs().max(high.abs());
                let around = if around > 0.0 { around } else { 1.0 };
                low - around..high + around
            }
            extent => low - padding * extent..high + padding * extent,
        };
        let mut step = nice_step((range.end - range.start) / count as f64);
        if values.clone().all(|value| value.fract() == 0.0) {
            step = step.max(1.0);
        }
        let multiples = (range.start / step).ceil() as i64..=(range.end / step).floor() as i64;
        // + 0.0 turns −0 into 0
        let ticks = multiples.map(|multiple| multiple as f64 * step + 0.0).map(|tick| (tick, tick_label(tick, step)));
        Axis { ticks: ticks.collect(), range }
    }

    pub(super) fn label_width(&self) -> usize {
        self.ticks.iter().map(|(_, text)| tick_style().width(text)).max().unwrap_or(0)
    }
}

/// The smallest of 1, 2, 5 · 10^k that is not below `least` (> 0).
fn nice_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    // a hair below, so that rounding does not skip a step that fits exactly
    let wanted = least / power * (1.0 - 1e-9);
    [1.0, 2.0, 5.0].into_iter().find(|factor| *factor >= wanted).unwrap_or(10.0) * power
}

/// As many decimals as multiples of `step` need; powers of ten where that grows long. With a minus sign, not a hyphen.
fn tick_label(tick: f64, step: f64) -> String {
    let decimals = (-(step * 1.000001).log10().floor()).max(0.0) as usize;
    let label = match decimals > 5 || tick.abs() >= 1e7 {
        true => format!("{tick:.2e}"),
        false => format!("{tick:.decimals$}"),
    };
    label.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_say_what_differs() {
        let ticks = |values: &[f64], padding| {
            let axis = Axis::new(values.iter().copied(), padding, 6);
            axis.ticks.into_iter().map(|(_, text)| text).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(ticks(&[-0.47, -0.40], 0.06), "−0.46 −0.44 −0.42 −0.40");
        assert_eq!(ticks(&[0.0, 60.0], 0.0), "0 10 20 30 40 50 60");
        assert_eq!(ticks(&[1.0, 3.0], 0.0), "1 2 3");
        assert_eq!(ticks(&[-0.25, 0.35], 0.0), "−0.2 −0.1 0.0 0.1 0.2 0.3");
        assert_eq!(ticks(&[2e-9, 6e-9], 0.0), "2.00e−9 3.00e−9 4.00e−9 5.00e−9 6.00e−9");
        assert_eq!(ticks(&[2.5, 2.5], 0.06), "2.40 2.45 2.50 2.55 2.60");
        assert_eq!(ticks(&[], 0.06), "0 1");
        assert_eq!([nice_step(0.1), nice_step(0.11), nice_step(3.0), nice_step(700.0)], [0.1, 0.2, 5.0, 1000.0]);
    }
}
