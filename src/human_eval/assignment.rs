//! Who gets which query, where a rater does not get all of them.
//!
//! With Q queries that need N votes each and raters who take M of them there are R = ⌈QN/M⌉ raters. Queries are dealt one
//! after the other, to N raters each, from a shuffled deck of all raters; an empty deck is followed by another. So the N
//! raters of a query are different and no rater has more than one query more than another; and since the queries of one
//! form, pair of models and set follow one another, every rater has about the same share of each.
//!
//! A missing rater's queries can be handed out again, to raters with numbers of their own. A rater's place in a query is
//! then that of a chain of raters, and counts once ([`super::places`]).

use std::collections::BTreeMap;

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};

use super::{
    questions::Form,
    study::{half_of, Query},
};
use crate::random::{Coordinates, Purpose, Stream};

/// Raters for whom folders are made.
const MOST_RATERS: usize = 10_000;

/// A rater's queries, in the order in which they come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assignment {
    /// The rater's number, from 1.
    pub number: usize,
    pub queries: Vec<Asked>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    pub query: String,
    /// This rater sees on the left what the query has on the right.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mirrored: bool,
    /// The rater who had it before and did not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead_of: Option<usize>,
}

impl Assignment {
    pub fn asked(&self, query: &str) -> Option<&Asked> {
        self.queries.iter().find(|asked| asked.query == query)
    }

    /// The queries with the rater who had each before, in a random order with random sides: in each form and pair of
    /// models the lower model stands on the left in half of them. Pairs come before groups.
    fn of(number: usize, queries: Vec<(&Query, Option<usize>)>, seed: u64) -> Self {
        let mut stream = at(seed, number, 1).stream();
        let mut groups = BTreeMap::<_, Vec<_>>::new();
        for (query, instead_of) in queries {
            groups.entry((query.form, query.models())).or_default().push((query, instead_of));
        }
        let mut of_forms: BTreeMap<Form, Vec<Asked>> = BTreeMap::new();
        for ((form, _), queries) in groups {
            let higher_left = half_of(queries.len(), &mut stream);
            let asked = queries.into_iter().zip(higher_left).map(|((query, instead_of), higher_left)| Asked {
                query: query.id.clone(),
                mirrored: (query.left > query.right) != higher_left,
                instead_of,
            });
            of_forms.entry(form).or_default().extend(asked);
        }
        let shuffled = of_forms.into_values().flat_map(|asked| {
            let order = stream.choose(asked.len(), asked.len());
            order.into_iter().map(|i| asked[i].clone()).collect::<Vec<_>>()
        });
        Assignment { number, queries: shuffled.collect() }
    }
}

fn at(seed: u64, rater: usize, what: u16) -> Coordinates {
    Coordinates { iteration: rater as u32, task: u8::MAX, step: what, ..Coordinates::new(seed, Purpose::StudySides) }
}

/// Deals `queries` that need `votes` votes each to raters who take `per_rater` at most.
///
/// # Errors
/// Numbers that cannot be met, with some that can.
pub fn deal(queries: &[Query], votes: usize, per_rater: usize, seed: u64) -> Result<Vec<Assignment>> {
    let there = queries.len();
    ensure!(per_rater > 0, "--per-rater must be at least 1");
    ensure!(
        per_rater <= there,
        "--per-rater {per_rater}: there are {there} queries, and a rater votes once on each, so {votes} votes a query \
         need {votes} raters or more: --per-rater {there} or less would do, or none of it (all raters get all queries)"
    );
    let raters = (there * votes).div_ceil(per_rater);
    ensure!(
        raters <= MOST_RATERS,
        "--per-rater {per_rater}: {there} queries with {votes} votes each would need {raters} raters, {MOST_RATERS} are \
         possible: --per-rater {} or more would do, or fewer votes (--raters)",
        (there * votes).div_ceil(MOST_RATERS)
    );
    let places = queries.iter().map(|query| (query, vec![None; votes])).collect();
    Ok(to_raters(places, raters, 1, seed))
}

/// Deals places that were not answered, each with the rater who had it, to new raters with numbers from `first` on.
pub fn deal_again(places: Vec<(&Query, Vec<usize>)>, per_rater: usize, first: usize, seed: u64) -> Vec<Assignment> {
    let all: usize = places.iter().map(|(_, of_query)| of_query.len()).sum();
    let most = places.iter().map(|(_, of_query)| of_query.len()).max().unwrap_or(0);
    let before =
        places.into_iter().map(|(query, of_query)| (query, of_query.into_iter().map(Some).collect())).collect();
    to_raters(before, all.div_ceil(per_rater).max(most), first, seed)
}

/// One rater for each place; those of a query are different.
fn to_raters(places: Vec<(&Query, Vec<Option<usize>>)>, raters: usize, first: usize, seed: u64) -> Vec<Assignment> {
    let mut stream = at(seed, first, 0).stream();
    let mut deck = Vec::new();
    let mut hands: Vec<Vec<(&Query, Option<usize>)>> = vec![Vec::new(); raters];
    for (query, of_query) in places {
        let dealt = draw(of_query.len(), raters, &mut deck, &mut stream);
        for (rater, instead_of) in dealt.into_iter().zip(of_query) {
            hands[rater].push((query, instead_of));
        }
    }
    hands.into_iter().enumerate().map(|(i, hand)| Assignment::of(first + i, hand, seed)).collect()
}

/// `count` different raters from the top of the deck; those that are passed over stay on it.
fn draw(count: usize, raters: usize, deck: &mut Vec<usize>, stream: &mut Stream) -> Vec<usize> {
    let mut drawn = Vec::new();
    while drawn.len() < count {
        match deck.iter().rposition(|rater| !drawn.contains(rater)) {
            Some(place) => drawn.push(deck.remove(place)),
            None => deck.splice(0..0, stream.choose(raters, raters)).for_each(drop),
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::human_eval::study::tests::example;

    fn lower_left(queries: &[Query], asked: &Asked) -> bool {
        let query = queries.iter().find(|query| query.id == asked.query).unwrap();
        (query.left < query.right) != asked.mirrored
    }

    /// The paper's 400 prompts against one rival, small ones, and such that do not divide.
    #[test]
    fn every_query_has_its_votes_from_different_raters_and_nobody_has_more_than_his_share() {
        for (pairs, groups, votes, per_rater) in
            [(400, 0, 5, 40), (7, 3, 3, 4), (5, 0, 5, 5), (9, 2, 4, 7), (1, 0, 3, 1)]
        {
            let queries = example(2, pairs, groups).queries;
            let dealt = deal(&queries, votes, per_rater, 3).unwrap();
            assert_eq!(dealt.len(), (queries.len() * votes).div_ceil(per_rater));
            let sizes: Vec<usize> = dealt.iter().map(|assignment| assignment.queries.len()).collect();
            let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
            assert!(most <= per_rater && most - least <= 1, "{sizes:?}");
            for query in &queries {
                let raters = dealt.iter().filter(|assignment| assignment.asked(&query.id).is_some()).count();
                assert_eq!(raters, votes, "{}", query.id);
            }
            for (i, assignment) in dealt.iter().enumerate() {
                assert_eq!(assignment.number, i + 1);
                let mut ids: Vec<&str> = assignment.queries.iter().map(|asked| asked.query.as_str()).collect();
                let pairs = ids.iter().take_while(|id| id.starts_with("pair")).count();
                assert!(ids[pairs..].iter().all(|id| id.starts_with("group")), "{ids:?}");
                ids.sort_unstable();
                ids.dedup();
                assert_eq!(ids.len(), assignment.queries.len(), "a query twice for one rater");
                let left = assignment.queries[..pairs].iter().filter(|asked| lower_left(&queries, asked)).count();
                assert!(left == pairs / 2 || left == pairs.div_ceil(2), "{left} of {pairs}");
            }
            assert_eq!(dealt, deal(&queries, votes, per_rater, 3).unwrap());
        }
    }

    #[test]
    fn another_seed_is_another_deal_and_raters_differ_in_order_and_sides() {
        let queries = example(2, 12, 0).queries;
        // everyone gets everything, but each in an order of his own
        let dealt = deal(&queries, 4, 12, 3).unwrap();
        assert_eq!(dealt.len(), 4);
        let ids = |a: &Assignment| a.queries.iter().map(|asked| asked.query.clone()).collect::<Vec<_>>();
        let sides = |a: &Assignment| {
            let mut asked: Vec<_> = a.queries.iter().map(|asked| (asked.query.clone(), asked.mirrored)).collect();
            asked.sort_unstable();
            asked
        };
        assert!(ids(&dealt[0]) != ids(&dealt[1]) && sides(&dealt[0]) != sides(&dealt[1]));
        assert_ne!(dealt, deal(&queries, 4, 12, 4).unwrap());
    }

    #[test]
    fn numbers_that_cannot_be_met_are_named_with_some_that_can() {
        let queries = example(2, 8, 0).queries;
        let error = |votes, per_rater| deal(&queries, votes, per_rater, 3).unwrap_err().to_string();
        assert_eq!(
            error(5, 9),
            "--per-rater 9: there are 8 queries, and a rater votes once on each, so 5 votes a query need 5 raters or more: \
             --per-rater 8 or less would do, or none of it (all raters get all queries)"
        );
        assert!(error(10_000, 1).ends_with("--per-rater 8 or more would do, or fewer votes (--raters)"));
    }

    #[test]
    fn places_are_dealt_again_to_different_new_raters() {
        let queries = example(2, 4, 0).queries;
        let places = vec![(&queries[0], vec![2, 7]), (&queries[1], vec![7]), (&queries[3], vec![2])];
        let dealt = deal_again(places, 10, 9, 3);
        // four places would fit one rater, but not two of the same query
        assert_eq!(dealt.iter().map(|a| a.number).collect::<Vec<_>>(), [9, 10]);
        let mut all: Vec<_> = dealt
            .iter()
            .flat_map(|a| a.queries.iter().map(|asked| (asked.query.as_str(), asked.instead_of.unwrap())))
            .collect();
        all.sort_unstable();
        assert_eq!(all, [("pair-0001", 2), ("pair-0001", 7), ("pair-0002", 7), ("pair-0004", 2)]);
        assert!(dealt.iter().all(|a| a.asked("pair-0001").is_some()));
    }
}
