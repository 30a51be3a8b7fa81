//! Confidence intervals of shares of votes.
//!
//! The votes on one query resemble each other, so they are not n independent ones. Over Q queries with y_q of m_q votes
//! counted, p = Σy/Σm, and the variance between queries of this ratio is v = Q/(Q − 1) · Σ(y_q − p m_q)² / (Σm)².
//! It equals that of p(1 − p)/v independent votes; with this many, at least Q and at most Σm, the interval is Wilson's:
//! (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), z = 1.96 (95 %). It is also right where all agree.

use serde::Serialize;

const Z: f64 = 1.959_963_984_540_054;

/// A share with its 95 % confidence interval, all in [0, 1].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    pub share: f64,
    pub low: f64,
    pub high: f64,
    /// Votes that are counted here, and all that could have been.
    pub counted: usize,
    pub votes: usize,
}

impl Share {
    /// Of (counted, all) votes of each query; queries without votes are left out. `None` without any vote.
    pub fn of(queries: &[(usize, usize)]) -> Option<Self> {
        let queries: Vec<_> = queries.iter().copied().filter(|(_, votes)| *votes > 0).collect();
        let counted: usize = queries.iter().map(|(counted, _)| counted).sum();
        let votes: usize = queries.iter().map(|(_, votes)| votes).sum();
        if votes == 0 {
            return None;
        }
        let (n, q) = (votes as f64, queries.len() as f64);
        let p = counted as f64 / n;
        let squares: f64 = queries.iter().map(|&(y, m)| (y as f64 - p * m as f64).powi(2)).sum();
        let variance = q / (q - 1.0) * squares / (n * n);
        // 0/0 where there is one query or all agree: then a query counts as one vote
        let independent = match p * (1.0 - p) / variance {
            x if x.is_nan() || p == 0.0 || p == 1.0 => q,
            x => x.clamp(q, n),
        };
        let (low, high) = wilson(p, independent);
        Some(Share { share: p, low, high, counted, votes })
    }
}

fn wilson(p: f64, n: f64) -> (f64, f64) {
    let z2 = Z * Z / n;
    let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n)).sqrt();
    let middle = p + z2 / 2.0;
    (((middle - half) / (1.0 + z2)).max(0.0), ((middle + half) / (1.0 + z2)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Coordinates, Purpose};

    #[test]
    fn one_vote_a_query_is_wilsons_interval() {
        // Wilson's 95 % interval of 8 in 10, from any table
        let queries: Vec<_> = (0..10).map(|i| (usize::from(i < 8), 1)).collect();
        let share = Share::of(&queries).unwrap();
        assert_eq!((share.share, share.counted, share.votes), (0.8, 8, 10));
        assert!((share.low - 0.4902).abs() < 5e-5 && (share.high - 0.9433).abs() < 5e-5, "{share:?}");
        // none of 10: the upper end is z²/(n + z²)
        let none = Share::of(&[(0, 1); 10]).unwrap();
        assert!(none.low == 0.0 && (none.high - Z * Z / (10.0 + Z * Z)).abs() < 1e-12, "{none:?}");
        assert_eq!(Share::of(&[(0, 0)]), None);
    }

    #[test]
    fn five_equal_votes_on_a_query_count_as_one() {
        let single: Vec<_> = (0..20).map(|i| (usize::from(i < 14), 1)).collect();
        let fivefold: Vec<_> = single.iter().map(|(y, m)| (5 * y, 5 * m)).collect();
        let (single, fivefold) = (Share::of(&single).unwrap(), Share::of(&fivefold).unwrap());
        assert!((single.low - fivefold.low).abs() < 1e-12 && (single.high - fivefold.high).abs() < 1e-12);
        // votes that split alike on every query count one by one
        let split = Share::of(&[(3, 5); 20]).unwrap();
        assert_eq!((split.low, split.high), wilson(0.6, 100.0));
    }

    /// 2,000 studies of 40 queries with 5 votes each, whose true share differs from query to query (uniform in
    /// [0.2, 1]): the interval must hold the truth, 0.6, in about 95 % of them. Observed: 94.6 %; the standard error of
    /// that is 0.5 %. Votes taken for independent give 85.2 %.
    #[test]
    fn the_interval_holds_the_truth_as_often_as_it_says() {
        let mut stream = Coordinates::new(1, Purpose::Sample).stream();
        let (mut held, mut held_if_independent) = (0, 0);
        for _ in 0..2000 {
            let queries: Vec<_> = (0..40)
                .map(|_| {
                    let p = stream.between(0.2, 1.0);
                    ((0..5).filter(|_| stream.uniform() < p).count(), 5)
                })
                .collect();
            let share = Share::of(&queries).unwrap();
            held += usize::from(share.low <= 0.6 && 0.6 <= share.high);
            let (low, high) = wilson(share.share, 200.0);
            held_if_independent += usize::from(low <= 0.6 && 0.6 <= high);
        }
        assert!((1870..=1930).contains(&held), "{held} of 2000");
        assert!(held_if_independent < 1870, "{held_if_independent}");
    }
}
