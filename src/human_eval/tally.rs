//! Counts the answers: per pair of models and question the share of each answer, which model is preferred, and how far
//! the raters agree.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    agreement::{equal_pairs, krippendorff_alpha},
    interval::Share,
    places::{Given, Settled},
    questions::{Answer, Edition, Form, Question},
    rank::{rank, Meeting, Ranked},
    study::{Query, Study},
    votes::Session,
};

/// What tables call the prompts that were given one by one.
const NO_SET: &str = "(no set)";

/// Everything that is counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tally {
    pub title: String,
    pub study: String,
    pub raters: Vec<Rater>,
    pub queries: usize,
    /// Raters that every query should have, and how many queries have all their questions answered by fewer.
    pub raters_per_query: usize,
    pub queries_with_fewer: usize,
    /// Those queries, in the study's order.
    pub lacking: Vec<Lacking>,
    /// Numbers of raters of whom there is no file and whose queries nobody has answered in their place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub absent_raters: Vec<usize>,
    /// Answers that are not counted since another rater got the query again and answered it, too.
    pub answers_left_out: usize,
    #[serde(skip)]
    pub(super) edition: Edition,
    pub comparisons: Vec<Comparison>,
    /// The same for each set of prompts, where there is more than one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by_set: Vec<Comparison>,
    pub ranks: Vec<Rank>,
}

/// All models on one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rank {
    pub form: Form,
    pub question: String,
    #[serde(skip)]
    pub(super) title: &'static str,
    /// Best first; none where no chain of votes connects all models.
    pub models: Option<Vec<Ranked>>,
}

/// A query with fewer votes than it should have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lacking {
    pub query: String,
    /// On that of its questions which has the fewest.
    pub votes: usize,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rater {
    pub name: String,
    /// Where queries are shared out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<usize>,
    pub answers: usize,
    /// Half of his queries took no longer than this; a very short time is a reason to look at his answers.
    pub median_seconds_per_query: f64,
}

/// Two models on one question.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    pub first: String,
    pub second: String,
    pub form: Form,
    pub question: String,
    #[serde(skip)]
    pub(super) title: &'static str,
    /// Which prompts: all, or those of one set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    pub queries: usize,
    /// Answers that say something about the pictures: all but "did not load".
    pub votes: usize,
    /// Shares of all votes; those of one edition's answers add up to one.
    pub first_preferred: Option<Share>,
    pub second_preferred: Option<Share>,
    pub both_good: Option<Share>,
    pub both_bad: Option<Share>,
    /// "Ambivalent, not sure, similar".
    pub not_sure: Option<Share>,
    /// Share of "did not load" in all answers.
    pub did_not_load: Option<Share>,
    /// Share of the second model in the votes that prefer one.
    pub second_of_decided: Option<Share>,
    /// Share of the left side in those votes: ½ but for chance, unless raters favour a side.
    pub left_of_decided: Option<Share>,
    /// Share of the pairs of votes on one query that are equal.
    pub agreement: Option<f64>,
    /// Krippendorff's, over the votes.
    pub alpha: Option<f64>,
}

/// An answer in terms of the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    First,
    Second,
    BothGood,
    BothBad,
    NotSure,
}

/// `None` for a picture that did not load.
fn outcome(given: Given, query: &Query) -> Option<Outcome> {
    let lower_left = (query.left < query.right) != given.mirrored;
    Some(match given.answer {
        Answer::DidNotLoad => return None,
        Answer::NotSure => Outcome::NotSure,
        Answer::BothGood => Outcome::BothGood,
        Answer::BothBad => Outcome::BothBad,
        Answer::Left if lower_left => Outcome::First,
        Answer::Right if !lower_left => Outcome::First,
        Answer::Left | Answer::Right => Outcome::Second,
    })
}

impl Tally {
    /// `sessions` belong to the study ([`super::votes::read_all`]).
    pub fn of(study: &Study, sessions: &[Session]) -> Self {
        let answers = Settled::of(study, sessions);
        let lacking = |query: &Query| {
            let votes = |question: &Question| {
                answers.to(query, question.id).iter().filter(|given| given.answer.is_vote()).count()
            };
            let votes = query.form.questions(study.edition).iter().map(votes).min().unwrap_or(0);
            (votes < study.raters).then(|| Lacking { query: query.id.clone(), votes })
        };
        let lacking: Vec<Lacking> = study.queries.iter().filter_map(lacking).collect();
        let (mut comparisons, mut by_set) = (Vec::new(), Vec::new());
        for meeting in study.meetings() {
            for form in Form::ALL {
                let queries: Vec<&Query> =
                    study.queries.iter().filter(|q| q.form == form && q.models() == meeting).collect();
                let sets: BTreeSet<Option<&str>> = queries.iter().map(|query| query.set.as_deref()).collect();
                for question in form.questions(study.edition).iter().filter(|_| !queries.is_empty()) {
                    let answers: Vec<_> =
                        queries.iter().map(|query| (*query, answers.to(query, question.id))).collect();
                    comparisons.push(Comparison::of(study, meeting, form, question, None, &answers));
                    for set in sets.iter().filter(|_| sets.len() > 1) {
                        let of_set: Vec<_> =
                            answers.iter().copied().filter(|(query, _)| query.set.as_deref() == *set).collect();
                        let name = set.unwrap_or(NO_SET).to_owned();
                        by_set.push(Comparison::of(study, meeting, form, question, Some(name), &of_set));
                    }
                }
            }
        }
        let forms = Form::ALL.into_iter().filter(|form| study.queries.iter().any(|query| query.form == *form));
        let questions =
            forms.flat_map(|form| form.questions(study.edition).iter().map(move |question| (form, question)));
        Tally {
            ranks: questions.map(|(form, question)| Rank::of(study, form, question, &answers)).collect(),
            title: study.title.clone(),
            study: study.id(),
            raters: sessions.iter().map(Rater::of).collect(),
            queries: study.queries.len(),
            raters_per_query: study.raters,
            queries_with_fewer: lacking.len(),
            lacking,
            absent_raters: answers.absent.clone(),
            answers_left_out: answers.left_out,
            edition: study.edition,
            comparisons,
            by_set,
        }
    }
}

impl Rank {
    fn of(study: &Study, form: Form, question: &Question, answers: &Settled) -> Self {
        // queries with the same noise show the same pictures of the same prompt
        let mut prompts: BTreeMap<usize, Vec<Meeting>> = BTreeMap::new();
        for query in study.queries.iter().filter(|query| query.form == form) {
            let mut votes = (0.0, 0.0);
            for outcome in answers.to(query, question.id).iter().filter_map(|&given| outcome(given, query)) {
                let (first, second) = match outcome {
                    Outcome::First => (1.0, 0.0),
                    Outcome::Second => (0.0, 1.0),
                    Outcome::BothGood | Outcome::BothBad | Outcome::NotSure => (0.5, 0.5),
                };
                votes = (votes.0 + first, votes.1 + second);
            }
            prompts.entry(query.first_sample).or_default().push(Meeting { models: query.models(), votes });
        }
        let names: Vec<&str> = study.models.iter().map(|model| model.name.as_str()).collect();
        let prompts: Vec<_> = prompts.into_values().collect();
        Rank {
            form,
            question: question.id.to_owned(),
            title: question.title,
            models: rank(&names, &prompts, study.drawing.seed),
        }
    }
}

impl Rater {
    fn of(session: &Session) -> Self {
        let mut seconds: BTreeMap<&str, f64> = BTreeMap::new();
        for vote in &session.answers {
            let longest = seconds.entry(&vote.query).or_default();
            *longest = longest.max(vote.seconds);
        }
        let mut seconds: Vec<f64> = seconds.into_values().collect();
        seconds.sort_by(f64::total_cmp);
        Rater {
            name: session.rater.trim().to_owned(),
            number: session.number,
            answers: session.answers.len(),
            median_seconds_per_query: seconds[(seconds.len() - 1) / 2],
        }
    }
}

impl Comparison {
    fn of(
        study: &Study,
        (first, second): (usize, usize),
        form: Form,
        question: &Question,
        set: Option<String>,
        answers: &[(&Query, &[Given])],
    ) -> Self {
        let outcomes: Vec<Vec<Outcome>> = answers
            .iter()
            .map(|(query, answers)| answers.iter().filter_map(|&given| outcome(given, query)).collect())
            .collect();
        let given: Vec<usize> = answers.iter().map(|(_, answers)| answers.len()).collect();
        let answered = |is: &dyn Fn(Answer) -> bool| -> Vec<usize> {
            answers.iter().map(|(_, answers)| answers.iter().filter(|given| is(given.answer)).count()).collect()
        };
        let count = |wanted: &[Outcome]| -> Vec<usize> {
            outcomes.iter().map(|of_query| of_query.iter().filter(|o| wanted.contains(o)).count()).collect()
        };
        let all: Vec<usize> = outcomes.iter().map(Vec::len).collect();
        let share = |counted: Vec<usize>, of: &[usize]| {
            Share::of(&counted.into_iter().zip(of.iter().copied()).collect::<Vec<_>>())
        };
        let decided = count(&[Outcome::First, Outcome::Second]);
        Comparison {
            first: study.models[first].name.clone(),
            second: study.models[second].name.clone(),
            form,
            question: question.id.to_owned(),
            title: question.title,
            set,
            queries: all.iter().filter(|votes| **votes > 0).count(),
            votes: all.iter().sum(),
            first_preferred: share(count(&[Outcome::First]), &all),
            second_preferred: share(count(&[Outcome::Second]), &all),
            both_good: share(count(&[Outcome::BothGood]), &all),
            both_bad: share(count(&[Outcome::BothBad]), &all),
            not_sure: share(count(&[Outcome::NotSure]), &all),
            did_not_load: share(answered(&|answer| !answer.is_vote()), &given),
            second_of_decided: share(count(&[Outcome::Second]), &decided),
            left_of_decided: share(answered(&|answer| answer == Answer::Left), &decided),
            agreement: equal_pairs(&outcomes),
            alpha: krippendorff_alpha(&outcomes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::human_eval::{study::tests::example, votes::tests::session};

    /// Three raters on four pairs and one group; all prefer model 1 in the pairs, whatever side it is on.
    fn tally() -> Tally {
        let mut study = example(2, 4, 1);
        study.edition = Edition::First;
        let sessions: Vec<Session> = ["abe", "bea", "c|y"]
            .iter()
            .enumerate()
            .map(|(i, rater)| {
                let mut answers = Vec::new();
                for query in &study.queries {
                    let of_model_1 = if query.left == 1 { Answer::Left } else { Answer::Right };
                    match query.form {
                        Form::Pair => {
                            answers.push((query.id.as_str(), "alignment", of_model_1));
                            answers.push((query.id.as_str(), "fidelity", Answer::BothBad));
                        }
                        // two for model 1, one for both
                        Form::Group if i < 2 => answers.push((query.id.as_str(), "diversity", of_model_1)),
                        Form::Group => answers.push((query.id.as_str(), "diversity", Answer::BothGood)),
                    }
                }
                session(&study, rater, &answers)
            })
            .collect();
        Tally::of(&study, &sessions)
    }

    #[test]
    fn sides_are_turned_back_into_models() {
        let tally = tally();
        assert_eq!(tally.comparisons.len(), 4);
        let [alignment, fidelity, preference, diversity] = &tally.comparisons[..] else { panic!() };
        let shares = |c: &Comparison| {
            [c.first_preferred, c.second_preferred, c.both_good, c.both_bad].map(|s| s.map(|s| s.counted))
        };
        assert_eq!((alignment.votes, shares(alignment)), (12, [Some(0), Some(12), Some(0), Some(0)]));
        assert_eq!(alignment.second_of_decided.unwrap().share, 1.0);
        // model 1 is on the left in two of the four
        assert_eq!(alignment.left_of_decided.unwrap().share, 0.5);
        assert_eq!((fidelity.votes, shares(fidelity)), (12, [Some(0), Some(0), Some(0), Some(12)]));
        assert_eq!((fidelity.second_of_decided, fidelity.agreement, fidelity.alpha), (None, Some(1.0), None));
        assert_eq!((preference.votes, shares(preference)), (0, [None; 4]));
        assert_eq!((diversity.votes, shares(diversity)), (3, [Some(0), Some(2), Some(1), Some(0)]));
        // one unit with 2 + 1: disagreeing 2, expected (9 − 5)/2 = 2
        assert_eq!(diversity.alpha, Some(0.0));
        // preference was not answered at all, diversity three times instead of five
        assert_eq!((tally.queries, tally.queries_with_fewer), (5, 5));
        assert_eq!((tally.raters[0].answers, tally.raters[0].median_seconds_per_query), (9, 1.5));
    }

    /// Model 2 wins over 1, and 1 over 0, whatever the sides.
    #[test]
    fn models_are_ranked_by_all_their_votes() {
        let study = example(3, 6, 0);
        let answers: Vec<_> = study
            .queries
            .iter()
            .map(|query| {
                let preferred = if query.left > query.right { Answer::Left } else { Answer::Right };
                (query.id.as_str(), "preference", preferred)
            })
            .collect();
        let tally = Tally::of(&study, &[session(&study, "abe", &answers)]);
        let rank = tally.ranks.iter().find(|rank| rank.question == "preference").unwrap();
        let models: Vec<_> = rank.models.as_ref().unwrap().iter().map(|r| (r.rank, r.model.as_str())).collect();
        assert_eq!(models, [(1, "model 2"), (2, "model 1"), (3, "model 0")]);
        // nobody was asked about the other two
        assert_eq!(tally.ranks.iter().filter(|rank| rank.models.is_none()).count(), 2);
        let text = tally.markdown();
        assert!(text.contains("| overall preference | 1 (1–1) | model 2 | "), "{text}");
        assert!(text.contains("| fidelity and quality | – | no chain of votes connects all models | – |"), "{text}");
    }

    /// Two raters on pairs of two sets. Of fidelity the first is not sure, for the second nothing loaded.
    fn tally_of_sets() -> Tally {
        let mut study = example(2, 4, 0);
        study.queries[3].set = Some("parti".into());
        let sessions: Vec<Session> = ["abe", "bea"]
            .iter()
            .map(|rater| {
                let of_fidelity = if *rater == "abe" { Answer::NotSure } else { Answer::DidNotLoad };
                let mut answers = Vec::new();
                for query in &study.queries {
                    // model 1 wins in the set, model 0 elsewhere
                    let winner = usize::from(query.set.is_some());
                    let preferred = if query.left == winner { Answer::Left } else { Answer::Right };
                    answers.push((query.id.as_str(), "fidelity", of_fidelity));
                    answers.push((query.id.as_str(), "alignment", Answer::NotSure));
                    answers.push((query.id.as_str(), "preference", preferred));
                }
                session(&study, rater, &answers)
            })
            .collect();
        study.raters = 2;
        Tally::of(&study, &sessions)
    }

    #[test]
    fn what_did_not_load_is_no_vote() {
        let tally = tally_of_sets();
        let [fidelity, alignment, _] = &tally.comparisons[..] else { panic!() };
        assert_eq!((fidelity.votes, alignment.votes), (4, 8));
        let of = |share: Option<Share>| share.map(|s| (s.counted, s.votes));
        assert_eq!((of(fidelity.not_sure), of(fidelity.did_not_load)), (Some((4, 4)), Some((4, 8))));
        assert_eq!((of(alignment.not_sure), of(alignment.did_not_load)), (Some((8, 8)), Some((0, 8))));
        assert_eq!((fidelity.second_of_decided, fidelity.agreement), (None, None));
        // every query has one vote on fidelity, two were wanted
        assert_eq!(tally.queries_with_fewer, 4);
        let text = tally.markdown();
        assert!(text.contains("24 answers. 4 of them say that a picture did not load"), "{text}");
        assert!(text.contains("| not sure or similar | did not load (of all answers) |"), "{text}");
    }

    #[test]
    fn each_set_of_prompts_has_its_own_rates() {
        let tally = tally_of_sets();
        let of = |set: &str| {
            let found = tally.by_set.iter().find(|c| c.set.as_deref() == Some(set) && c.question == "preference");
            found.unwrap().second_preferred.map(|s| (s.counted, s.votes))
        };
        assert_eq!((of(NO_SET), of("parti")), (Some((0, 6)), Some((2, 2))));
        assert_eq!(tally.by_set.len(), 6);
        let text = tally.markdown();
        assert!(text.contains("| parti: overall preference | 2 | 0 % ("), "{text}");
        // also of each set: who was not sure, and what did not load
        let fidelity = tally.by_set.iter().find(|c| c.set.as_deref() == Some("parti") && c.question == "fidelity");
        let of = |share: Option<Share>| share.map(|s| (s.counted, s.votes));
        assert_eq!(fidelity.map(|c| (of(c.not_sure), of(c.did_not_load))), Some((Some((1, 1)), Some((1, 2)))));
        let row = "| parti: fidelity and quality | 1 | 0 % (0–79) | 0 % (0–79) | 100 % (21–100) | 50 % (";
        assert!(text.contains(row), "{text}");
        // where there is one set only, all prompts are it
        assert!(self::tally().by_set.is_empty());
    }

    #[test]
    fn the_tables_say_it() {
        let text = tally().markdown();
        assert!(
            text.contains("3 raters, 5 queries, 27 answers.\n5 of 5 queries have fewer than 5 raters: pair-0001 (0), "),
            "{text}"
        );
        assert!(text.contains("\n## model 0 against model 1\n"), "{text}");
        let row = "| fits the description | 12 | 0 % (0–49) | 100 % (51–100) | 0 % (0–49) | 0 % (0–49) | 100 % (51–100) | 50 % (";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| overall preference | 0 | – | – | – | – | – | – | – | – |"), "{text}");
        assert!(text.contains("| c\\|y | 9 | 1.5 |"), "{text}");
        let json = serde_json::to_value(tally()).unwrap();
        assert_eq!(json["comparisons"][0]["second_preferred"]["share"], 1.0);
        assert_eq!(json["comparisons"][0]["form"], "pair");
        assert!(json["comparisons"][1]["alpha"].is_null());
    }
}
