//! Numbers of the command line with their bounds, so that what cannot be meant is refused with its option.

use std::{fmt::Display, str::FromStr};

use crate::config::bounds::Bound;

/// A parser of whole numbers in `low..=high`.
pub fn whole<T>(low: T, high: T) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr + Display + PartialOrd + Copy,
{
    move |text| {
        let wanted = || format!("a whole number in {low}..={high} is wanted");
        let number: T = text.parse().map_err(|_| wanted())?;
        if low <= number && number <= high {
            Ok(number)
        } else {
            Err(wanted())
        }
    }
}

/// A parser of numbers in `low..=high`.
pub fn number(low: f64, high: f64) -> impl Fn(&str) -> Result<f64, String> + Clone {
    within(Bound::new(low, high))
}

/// A parser of numbers within a setting's bounds.
pub fn within(bound: Bound) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| {
        let number: Option<f64> = text.parse().ok();
        number.filter(|number| bound.allows(*number)).ok_or_else(|| format!("a number {bound} is wanted"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_outside_is_refused() {
        let count = whole(1usize, 1000);
        assert_eq!((count("1"), count("1000")), (Ok(1), Ok(1000)));
        for text in ["0", "1001", "-1", "1.5", "inf", "18446744073709551616", ""] {
            assert_eq!(count(text), Err("a whole number in 1..=1000 is wanted".to_string()), "{text}");
        }
        let share = number(0.0, 1.0);
        assert_eq!(share("0.5"), Ok(0.5));
        for text in ["inf", "-inf", "nan", "1e300", "-1", "x"] {
            assert_eq!(share(text), Err("a number in 0..=1 is wanted".to_string()), "{text}");
        }
    }
}
