//! Which answers count where queries are handed out again.
//!
//! A rater's place in a query is held by a chain: the rater who had it first, then those who got it again. It counts
//! once. Of the raters of a chain the one with more votes on the query counts, and where they have equally many the one
//! who got it later: a missing rater's votes that come after all change nothing that was counted without them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{bail, ensure, Result};

use super::{
    assignment::deal_again,
    questions::Answer,
    study::{Query, Study},
    votes::Session,
};

/// An answer that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    pub answer: Answer,
    /// The rater saw the query's left side on the right.
    pub mirrored: bool,
}

/// Answers by query and question, and what was left out.
#[derive(Debug, Default)]
pub struct Settled {
    answers: BTreeMap<String, BTreeMap<String, Vec<Given>>>,
    /// Answers to queries that another rater of the chain answered, too.
    pub left_out: usize,
    /// Raters with an unanswered place of whom there is no file.
    pub absent: Vec<usize>,
}

impl Settled {
    /// `sessions` belong to the study ([`super::votes::read_all`]).
    pub fn of(study: &Study, sessions: &[Session]) -> Self {
        let mut settled = Settled::default();
        if !study.is_shared_out() {
            sessions.iter().for_each(|session| settled.take(session, None));
            return settled;
        }
        let by_number = by_number(sessions);
        let mut absent = BTreeSet::new();
        for (query, chains) in chains(study) {
            for chain in chains {
                let votes = |number: &usize| by_number.get(number).map_or(0, |session| votes_on(session, query));
                let answered = |number: &&usize| by_number.get(number).is_some_and(|s| s.answered(query));
                // the last of the greatest
                let counted = chain.iter().filter(answered).max_by_key(|number| votes(number));
                for number in chain.iter().filter(answered) {
                    let session = by_number[number];
                    match counted == Some(number) {
                        true => settled.take(session, Some((query, study.is_mirrored(*number, query)))),
                        false => settled.left_out += session.answers.iter().filter(|v| v.query == query).count(),
                    }
                }
                let last = chain.last().expect("nobody has no place");
                if counted.is_none() && !by_number.contains_key(last) {
                    absent.insert(*last);
                }
            }
        }
        settled.absent = absent.into_iter().collect();
        settled
    }

    /// A session's answers: all of them, or those to a query, with whether it was mirrored.
    fn take(&mut self, session: &Session, only: Option<(&str, bool)>) {
        for vote in session.answers.iter().filter(|vote| only.is_none_or(|(query, _)| vote.query == query)) {
            let of_query = self.answers.entry(vote.query.clone()).or_default();
            let given = Given { answer: vote.answer, mirrored: only.is_some_and(|(_, mirrored)| mirrored) };
            of_query.entry(vote.question.clone()).or_default().push(given);
        }
    }

    pub fn to(&self, query: &Query, question: &str) -> &[Given] {
        self.answers.get(&query.id).and_then(|of_query| of_query.get(question)).map_or(&[], |answers| answers)
    }
}

fn by_number(sessions: &[Session]) -> BTreeMap<usize, &Session> {
    sessions.iter().filter_map(|session| Some((session.number?, session))).collect()
}

fn votes_on(session: &Session, query: &str) -> usize {
    session.answers.iter().filter(|vote| vote.query == query && vote.answer.is_vote()).count()
}

/// The chains of every query.
fn chains(study: &Study) -> BTreeMap<&str, Vec<Vec<usize>>> {
    let mut chains: BTreeMap<&str, Vec<Vec<usize>>> = BTreeMap::new();
    for assignment in study.assignments.iter().chain(&study.again) {
        for asked in &assignment.queries {
            let of_query = chains.entry(&asked.query).or_default();
            let before = of_query.iter_mut().find(|chain| asked.instead_of == chain.last().copied());
            match before {
                Some(chain) => chain.push(assignment.number),
                None => of_query.push(vec![assignment.number]),
            }
        }
    }
    chains
}

/// Adds raters to the study who get the unanswered queries of `missing`, or, where that is empty, all that the votes lack.
/// Returns how many raters there were before.
///
/// # Errors
/// Raters that are not there, or whose queries were handed out before; nothing to hand out.
pub fn hand_out_again(study: &mut Study, sessions: &[Session], missing: &[usize]) -> Result<usize> {
    let Some(per_rater) = study.per_rater else {
        bail!(
            "this study is not shared out (--per-rater): every rater has all queries, give its pages/ to another one"
        );
    };
    let raters = study.assignments.len() + study.again.len();
    let by_number = by_number(sessions);
    let chains = chains(study);
    for number in missing {
        ensure!((1..=raters).contains(number), "there is no rater {number}: the study has the raters 1 to {raters}");
    }
    let mut places: Vec<(&Query, Vec<usize>)> = Vec::new();
    // by number: queries that were there, and of these those that were handed on
    let (mut had, mut handed_on) = (BTreeMap::<usize, usize>::new(), BTreeMap::<usize, Vec<usize>>::new());
    for query in &study.queries {
        let questions = query.form.questions(study.edition).len();
        let mut of_query = Vec::new();
        for chain in &chains[query.id.as_str()] {
            let whole = |number: &usize| by_number.get(number).is_some_and(|s| votes_on(s, &query.id) == questions);
            let (last, before) = chain.split_last().expect("nobody has no place");
            for number in before {
                handed_on.entry(*number).or_default().push(*last);
            }
            chain.iter().for_each(|number| *had.entry(*number).or_default() += 1);
            let wanted = missing.is_empty() || missing.contains(last);
            if wanted && !chain.iter().any(whole) {
                of_query.push(*last);
            }
        }
        if !of_query.is_empty() {
            places.push((query, of_query));
        }
    }
    for number in missing {
        let Some(to) = handed_on.get(number).filter(|to| to.len() == had[number]) else { continue };
        let to: BTreeSet<String> = to.iter().map(usize::to_string).collect();
        let to = to.into_iter().collect::<Vec<_>>().join(", ");
        bail!(
            "the queries of rater {number} were handed out again before, to {to}: name these if they are missing, too"
        );
    }
    ensure!(!places.is_empty(), "no vote is missing: there is nothing to hand out again");
    let dealt = deal_again(places, per_rater, raters + 1, study.drawing.seed);
    study.again.extend(dealt);
    Ok(raters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::human_eval::{study::tests::example, votes::tests::session};

    /// Four pairs, two votes each, two queries a rater: four raters.
    fn shared() -> Study {
        let mut study = example(2, 4, 0);
        study.raters = 2;
        study.shared_out(Some(2)).unwrap()
    }

    /// Rater `number` votes for model 1, or answers so.
    fn votes(study: &Study, number: usize, questions: &[&str], answer: Option<Answer>) -> Session {
        let assignment = study.assignment(number).unwrap();
        let mut answers = Vec::new();
        for asked in &assignment.queries {
            let query = study.queries.iter().find(|query| query.id == asked.query).unwrap();
            let left = (query.left == 1) != asked.mirrored;
            let of_model_1 = if left { Answer::Left } else { Answer::Right };
            for question in questions {
                answers.push((asked.query.as_str(), *question, answer.unwrap_or(of_model_1)));
            }
        }
        Session { number: Some(number), ..session(study, &format!("rater {number}"), &answers) }
    }

    const ALL: [&str; 3] = ["fidelity", "alignment", "preference"];

    #[test]
    fn a_place_counts_once_whoever_sends_first_or_last() {
        let mut study = shared();
        let on_time: Vec<Session> = [1, 2, 4].map(|number| votes(&study, number, &ALL, None)).into();
        assert_eq!(Settled::of(&study, &on_time).absent, [3]);
        let id = study.id();
        assert_eq!(hand_out_again(&mut study, &on_time, &[]).unwrap(), 4);
        assert_eq!((study.again.len(), study.again[0].number, study.id()), (1, 5, id));
        let lost: BTreeSet<&str> = study.assignments[2].queries.iter().map(|asked| asked.query.as_str()).collect();
        let again: BTreeSet<&str> = study.again[0].queries.iter().map(|asked| asked.query.as_str()).collect();
        assert_eq!(lost, again);

        let stand_in = votes(&study, 5, &ALL, Some(Answer::NotSure));
        let late = votes(&study, 3, &ALL, None);
        let counted = |sessions: &[Session]| {
            let settled = Settled::of(&study, sessions);
            let answers: Vec<usize> = study.queries.iter().map(|q| settled.to(q, "preference").len()).collect();
            let unsure = study.queries.iter().flat_map(|q| settled.to(q, "preference"));
            (answers, unsure.filter(|given| given.answer == Answer::NotSure).count(), settled.left_out, settled.absent)
        };
        let with =
            |more: &[&Session]| counted(&on_time.iter().chain(more.iter().copied()).cloned().collect::<Vec<_>>());
        assert_eq!(with(&[]).3, [5]);
        assert_eq!(with(&[&stand_in]), (vec![2; 4], 2, 0, vec![]));
        // the late ones change nothing, and stand alone where nobody stood in
        assert_eq!(with(&[&stand_in, &late]), (vec![2; 4], 2, 6, vec![]));
        assert_eq!(with(&[&late, &stand_in]), (vec![2; 4], 2, 6, vec![]));
        assert_eq!(with(&[&late]), (vec![2; 4], 0, 0, vec![]));
        // one who answered in part, or for whom nothing loaded, does not displace one who answered
        let in_part = votes(&study, 5, &ALL[..1], Some(Answer::NotSure));
        assert_eq!(with(&[&late, &in_part]), (vec![2; 4], 0, 2, vec![]));
        let nothing_loaded = votes(&study, 5, &ALL, Some(Answer::DidNotLoad));
        assert_eq!(with(&[&late, &nothing_loaded]), (vec![2; 4], 0, 6, vec![]));
    }

    #[test]
    fn named_raters_are_handed_out_and_mistakes_said() {
        let mut study = shared();
        assert_eq!(hand_out_again(&mut study, &[], &[2, 3]).unwrap(), 4);
        let places: usize = study.again.iter().map(|assignment| assignment.queries.len()).sum();
        assert_eq!(places, 4);
        assert!(study.again.iter().flat_map(|a| &a.queries).all(|asked| matches!(asked.instead_of, Some(2 | 3))));
        let error = |study: &mut Study, sessions: &[Session], missing: &[usize]| {
            hand_out_again(study, sessions, missing).unwrap_err().to_string()
        };
        let raters = 4 + study.again.len();
        assert!(error(&mut study, &[], &[99])
            .starts_with(&format!("there is no rater 99: the study has the raters 1 to {raters}")));
        let twice = error(&mut study, &[], &[2]);
        assert!(twice.starts_with("the queries of rater 2 were handed out again before, to 5"), "{twice}");
        // a stand-in can be missing, too
        let mut further = study.clone();
        hand_out_again(&mut further, &[], &[5]).unwrap();
        assert!(further.again.last().unwrap().queries.iter().all(|asked| asked.instead_of == Some(5)));
        let one = votes(&study, 1, &ALL, None);
        assert!(error(&mut study, &[one], &[1]).starts_with("no vote is missing"));
        assert!(error(&mut example(2, 1, 0), &[], &[1]).starts_with("this study is not shared out"));
    }
}
