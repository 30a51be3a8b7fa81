//! Krippendorff's alpha for nominal data: how far raters agree beyond chance.
//!
//! α = 1 − D_o/D_e. With o_ck = Σ_u n_u(c,k)/(m_u − 1), where m_u is the number of answers to unit u and n_u(c,k) the
//! number of ordered pairs of its answers that are c and k, n_c = Σ_k o_ck and n = Σ_c n_c:
//! D_o = Σ_{c≠k} o_ck / n and D_e = Σ_{c≠k} n_c n_k / (n (n − 1)). Units with one answer say nothing and are left out.
//! (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.) 1 is perfect agreement, 0 what chance gives.

use std::collections::BTreeMap;

/// Alpha over `units`, each with the answers of its raters in any order; missing answers are just not there. `None`
/// where it is not defined: no unit with two answers, or nothing but one and the same answer.
pub fn krippendorff_alpha<T: Ord + Copy>(units: &[Vec<T>]) -> Option<f64> {
    let mut totals: BTreeMap<T, f64> = BTreeMap::new();
    let (mut n, mut disagreeing) = (0.0, 0.0);
    for unit in units.iter().filter(|unit| unit.len() >= 2) {
        let mut counts: BTreeMap<T, f64> = BTreeMap::new();
        unit.iter().for_each(|answer| *counts.entry(*answer).or_default() += 1.0);
        let m = unit.len() as f64;
        let agreeing: f64 = counts.values().map(|count| count * (count - 1.0)).sum();
        disagreeing += (m * (m - 1.0) - agreeing) / (m - 1.0);
        n += m;
        counts.into_iter().for_each(|(answer, count)| *totals.entry(answer).or_default() += count);
    }
    let expected = (n * n - totals.values().map(|count| count * count).sum::<f64>()) / (n - 1.0);
    (n > 0.0 && totals.len() > 1).then(|| 1.0 - disagreeing / expected)
}

/// The share of pairs of answers to the same unit that are equal; `None` where there is no pair.
pub fn equal_pairs<T: Ord>(units: &[Vec<T>]) -> Option<f64> {
    let (mut equal, mut pairs) = (0, 0);
    for unit in units {
        for (i, answer) in unit.iter().enumerate() {
            equal += unit[..i].iter().filter(|other| *other == answer).count();
            pairs += i;
        }
    }
    (pairs > 0).then(|| equal as f64 / pairs as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of Krippendorff's paper, section C: four observers, twelve units, answers missing; α = 0.743.
    #[test]
    fn meets_the_published_example() {
        let observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."];
        let units: Vec<Vec<char>> = (0..12)
            .map(|unit| observers.iter().filter_map(|o| o.chars().nth(unit)).filter(|c| *c != '.').collect())
            .collect();
        let alpha = krippendorff_alpha(&units).unwrap();
        assert!((alpha - 0.743).abs() < 5e-4, "{alpha}");
    }

    #[test]
    fn pairs_are_counted() {
        // 3 + 1 pairs, of which 1 + 1 are equal
        assert_eq!(equal_pairs(&[vec![1, 2, 1], vec![5, 5], vec![3]]), Some(0.5));
        assert_eq!(equal_pairs(&[vec![1, 1], vec![1, 1]]), Some(1.0));
        assert_eq!(equal_pairs::<u8>(&[vec![1], vec![]]), None);
    }

    #[test]
    fn known_ends() {
        // all agree, on different things
        assert_eq!(krippendorff_alpha(&[vec![1, 1, 1], vec![2, 2, 2]]), Some(1.0));
        // by hand: n = 4, each answer twice, o_12 + o_21 = 4; expected (16 − 8)/3; α = 1 − 4/(8/3) = −½
        assert_eq!(krippendorff_alpha(&[vec![1, 2], vec![2, 1]]), Some(-0.5));
        // nothing to compare, or nothing to disagree about
        assert_eq!(krippendorff_alpha::<u8>(&[]), None);
        assert_eq!(krippendorff_alpha(&[vec![1], vec![2]]), None);
        assert_eq!(krippendorff_alpha(&[vec![1, 1], vec![1, 1]]), None);
        // a unit with a single answer changes nothing
        assert_eq!(krippendorff_alpha(&[vec![1, 2], vec![2, 1], vec![7]]), Some(-0.5));
    }
}
