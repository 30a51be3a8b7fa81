//! The ends of intervals that come from draws with replacement.

/// The values at 2.5 % and 97.5 % of the sorted `values`: the 95 % interval of what was drawn. NaNs where there are none.
pub fn of_95(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| match values.len() {
        0 => f64::NAN,
        n => values[((n - 1) as f64 * share).round() as usize],
    };
    (at(0.025), at(0.975))
}

#[cfg(test)]
mod tests {
    use super::of_95;

    #[test]
    fn the_ends_of_the_middle() {
        assert_eq!(of_95((0..=1000).rev().map(f64::from).collect()), (25.0, 975.0));
        assert_eq!(of_95(vec![3.0]), (3.0, 3.0));
        assert!(of_95(Vec::new()).0.is_nan());
    }
}
