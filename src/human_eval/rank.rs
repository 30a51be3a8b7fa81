//! A rank over models from votes between pairs of them: the Bradley–Terry model.
//!
//! Model i is preferred to j with probability 1/(1 + exp(θ_j − θ_i)), Σθ = 0. A vote for neither is half a vote for each.
//! Each pair of models with votes gets one more of these, so that θ is finite where one of them wins or loses always.
//! With W_i the votes for i and n_ij those between i and j, γ = exp θ is the limit of γ_i ← W_i / Σ_j n_ij/(γ_i + γ_j)
//! (D. R. Hunter, MM algorithms for generalized Bradley–Terry models, 2004). Intervals are percentiles over draws of the
//! prompts with replacement: all votes about a prompt stay together.

use serde::Serialize;

use crate::{
    percentiles,
    random::{Coordinates, Purpose},
};

/// Draws of prompts behind an interval.
const DRAWS: usize = 1000;

/// Votes between two models on one prompt; a vote for neither counts ½ on each side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Meeting {
    pub models: (usize, usize),
    pub votes: (f64, f64),
}

/// A model's place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ranked {
    pub model: String,
    /// 1 is the best; equal models have the same. Below it where 95 % of the draws put it.
    pub rank: usize,
    pub rank_low: usize,
    pub rank_high: usize,
    /// θ with its 95 % confidence interval; a difference of 1 means that 73 % of the votes prefer the stronger.
    pub strength: f64,
    pub low: f64,
    pub high: f64,
}

/// The models, best first; `prompts` hold the votes about each prompt. `None` where no chain of votes connects all models.
pub fn rank(names: &[&str], prompts: &[Vec<Meeting>], seed: u64) -> Option<Vec<Ranked>> {
    let n = names.len();
    let mut undecided = vec![vec![0.0; n]; n];
    for meeting in prompts.iter().flatten().filter(|meeting| meeting.votes.0 + meeting.votes.1 > 0.0) {
        let (i, j) = meeting.models;
        (undecided[i][j], undecided[j][i]) = (0.5, 0.5);
    }
    if !connected(&undecided) {
        return None;
    }
    // wins[i][j]: votes for i against j
    let fit = |drawn: &mut dyn Iterator<Item = usize>| {
        let mut wins = undecided.clone();
        for meeting in drawn.flat_map(|prompt| &prompts[prompt]) {
            let (i, j) = meeting.models;
            wins[i][j] += meeting.votes.0;
            wins[j][i] += meeting.votes.1;
        }
        strengths(&wins)
    };
    let theta = fit(&mut (0..prompts.len()));
    let mut stream = Coordinates::new(seed, Purpose::Resampling).stream();
    let draws: Vec<Vec<f64>> =
        (0..DRAWS).map(|_| fit(&mut (0..prompts.len()).map(|_| stream.below(prompts.len() as u64) as usize))).collect();
    let mut ranked: Vec<Ranked> = (0..n)
        .map(|model| {
            let (low, high) = percentiles::of_95(draws.iter().map(|theta| theta[model]).collect());
            let (rank_low, rank_high) =
                percentiles::of_95(draws.iter().map(|theta| place(theta, model) as f64).collect());
            Ranked {
                model: names[model].to_owned(),
                rank: place(&theta, model),
                rank_low: rank_low as usize,
                rank_high: rank_high as usize,
                strength: theta[model],
                low,
                high,
            }
        })
        .collect();
    ranked.sort_by_key(|ranked| ranked.rank);
    Some(ranked)
}

fn connected(links: &[Vec<f64>]) -> bool {
    let mut reached = vec![0];
    let mut at = 0;
    while at < reached.len() {
        let new: Vec<usize> =
            (0..links.len()).filter(|j| links[reached[at]][*j] > 0.0 && !reached.contains(j)).collect();
        reached.extend(new);
        at += 1;
    }
    reached.len() == links.len()
}

/// θ of each model, whose mean is 0.
fn strengths(wins: &[Vec<f64>]) -> Vec<f64> {
    let n = wins.len();
    let mut gamma = vec![1.0; n];
    for _ in 0..10_000 {
        let mut next: Vec<f64> = (0..n)
            .map(|i| {
                let won: f64 = wins[i].iter().sum();
                let shared: f64 = (0..n).map(|j| (wins[i][j] + wins[j][i]) / (gamma[i] + gamma[j])).sum();
                won / shared
            })
            .collect();
        let mean = next.iter().map(|gamma| gamma.ln()).sum::<f64>() / n as f64;
        next.iter_mut().for_each(|gamma| *gamma /= mean.exp());
        let change = gamma.iter().zip(&next).map(|(old, new)| (new / old - 1.0).abs()).fold(0.0, f64::max);
        gamma = next;
        if change < 1e-10 {
            break;
        }
    }
    gamma.into_iter().map(f64::ln).collect()
}

/// 1 and the number of models that are stronger by more than rounding.
fn place(theta: &[f64], model: usize) -> usize {
    1 + theta.iter().filter(|other| **other > theta[model] + 1e-7).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_models_have_the_logarithm_of_their_votes() {
        // 8 against 2 and the undecided vote that each pair gets: ln(8.5/2.5), half of it on either side of 0
        let prompts: Vec<_> = (0..10)
            .map(|i| vec![Meeting { models: (0, 1), votes: if i < 8 { (0.0, 1.0) } else { (1.0, 0.0) } }])
            .collect();
        let ranked = rank(&["a", "b"], &prompts, 1).unwrap();
        assert_eq!((ranked[0].model.as_str(), ranked[0].rank, ranked[1].rank), ("b", 1, 2));
        let half = (8.5_f64 / 2.5).ln() / 2.0;
        assert!((ranked[0].strength - half).abs() < 1e-9 && (ranked[1].strength + half).abs() < 1e-9, "{ranked:?}");
        assert!(ranked[0].low < half && half < ranked[0].high, "{ranked:?}");
        assert_eq!(ranked, rank(&["a", "b"], &prompts, 1).unwrap());
    }

    /// Votes in the very proportions of known strengths give these back, also between models that never met (0 and 2).
    #[test]
    fn strengths_come_back() {
        let theta = [-0.9_f64, 0.2, 0.7];
        let share = |i: usize, j: usize| 1.0 / (1.0 + (theta[j] - theta[i]).exp());
        let meeting = |i, j| Meeting { models: (i, j), votes: (1e5 * share(i, j), 1e5 * share(j, i)) };
        let ranked = rank(&["a", "b", "c"], &[vec![meeting(0, 1), meeting(1, 2)]], 1).unwrap();
        for (ranked, (name, expected)) in ranked.iter().zip([("c", 0.7), ("b", 0.2), ("a", -0.9)]) {
            assert!(ranked.model == name && (ranked.strength - expected).abs() < 1e-3, "{ranked:?}");
            // one prompt: all draws are alike
            assert_eq!((ranked.rank_low, ranked.rank_high), (ranked.rank, ranked.rank));
        }
    }

    #[test]
    fn a_model_that_wins_always_stays_finite_and_equal_ones_share_a_place() {
        let tie = Meeting { models: (0, 1), votes: (1.5, 1.5) };
        let lost = |model| Meeting { models: (model, 2), votes: (0.0, 5.0) };
        let ranked = rank(&["a", "b", "c"], &vec![vec![tie, lost(0), lost(1)]; 20], 1).unwrap();
        assert_eq!(
            ranked.iter().map(|r| (r.model.as_str(), r.rank)).collect::<Vec<_>>(),
            [("c", 1), ("a", 2), ("b", 2)]
        );
        assert!(ranked[0].strength.is_finite() && ranked[0].strength > 1.0, "{ranked:?}");
    }

    #[test]
    fn models_without_a_chain_of_votes_have_no_rank() {
        let meeting = |i, j, votes| vec![Meeting { models: (i, j), votes }];
        assert_eq!(rank(&["a", "b"], &[], 1), None);
        assert_eq!(rank(&["a", "b", "c"], &[meeting(0, 1, (1.0, 0.0)), meeting(1, 2, (0.0, 0.0))], 1), None);
        assert_eq!(rank(&["a", "b", "c", "d"], &[meeting(0, 1, (1.0, 0.0)), meeting(2, 3, (1.0, 0.0))], 1), None);
    }

    /// 200 studies of 40 prompts with 5 votes each whose share differs from prompt to prompt, uniform in [0.3, 0.9]: the
    /// interval of θ holds the truth of the mean share, 0.6, about as often as it says.
    #[test]
    fn the_interval_holds_the_truth_about_as_often_as_it_says() {
        let mut stream = Coordinates::new(1, Purpose::Sample).stream();
        let truth = (0.6_f64 / 0.4).ln() / 2.0;
        let held = (0..200).filter(|study| {
            let prompts: Vec<_> = (0..40)
                .map(|_| {
                    let p = stream.between(0.3, 0.9);
                    let won = (0..5).filter(|_| stream.uniform() < p).count() as f64;
                    vec![Meeting { models: (0, 1), votes: (won, 5.0 - won) }]
                })
                .collect();
            let ranked = rank(&["a", "b"], &prompts, *study).unwrap();
            let a = ranked.iter().find(|ranked| ranked.model == "a").unwrap();
            a.low <= truth && truth <= a.high
        });
        let held = held.count();
        assert!((180..=198).contains(&held), "{held} of 200");
    }
}
