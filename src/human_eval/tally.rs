//! Counts the answers: per pair of models and question the share of each answer, which model is preferred, and how far
//! the raters agree.

use std::{collections::BTreeMap, fmt::Write};

use serde::Serialize;

use super::{
    agreement::{equal_pairs, krippendorff_alpha},
    interval::Share,
    questions::{Answer, Form, Question},
    study::{Query, Study},
    votes::Session,
};

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
    pub comparisons: Vec<Comparison>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rater {
    pub name: String,
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
    title: &'static str,
    pub queries: usize,
    pub votes: usize,
    /// Shares of all votes; the four add up to one.
    pub first_preferred: Option<Share>,
    pub second_preferred: Option<Share>,
    pub both_good: Option<Share>,
    pub both_bad: Option<Share>,
    /// Share of the second model in the votes that prefer one.
    pub second_of_decided: Option<Share>,
    /// Share of the left side in those votes: ½ but for chance, unless raters favour a side.
    pub left_of_decided: Option<Share>,
    /// Share of the pairs of votes on one query that are equal.
    pub agreement: Option<f64>,
    /// Krippendorff's, over the four answers.
    pub alpha: Option<f64>,
}

/// An answer in terms of the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    First,
    Second,
    BothGood,
    BothBad,
}

fn outcome(answer: Answer, query: &Query) -> Outcome {
    match answer {
        Answer::BothGood => Outcome::BothGood,
        Answer::BothBad => Outcome::BothBad,
        Answer::Left if query.left < query.right => Outcome::First,
        Answer::Right if query.left > query.right => Outcome::First,
        Answer::Left | Answer::Right => Outcome::Second,
    }
}

/// By query and question, in the order of the sessions.
struct Answers(BTreeMap<String, BTreeMap<String, Vec<Answer>>>);

impl Answers {
    fn of(sessions: &[Session]) -> Self {
        let mut answers: BTreeMap<String, BTreeMap<String, Vec<Answer>>> = BTreeMap::new();
        for vote in sessions.iter().flat_map(|session| &session.answers) {
            let of_query = answers.entry(vote.query.clone()).or_default();
            of_query.entry(vote.question.clone()).or_default().push(vote.answer);
        }
        Answers(answers)
    }

    fn to(&self, query: &Query, question: &Question) -> &[Answer] {
        self.0.get(&query.id).and_then(|of_query| of_query.get(question.id)).map_or(&[], |answers| answers)
    }
}

impl Tally {
    /// `sessions` belong to the study ([`super::votes::read_all`]).
    pub fn of(study: &Study, sessions: &[Session]) -> Self {
        let answers = Answers::of(sessions);
        let has_fewer = |query: &&Query| {
            query.form.questions().iter().any(|question| answers.to(query, question).len() < study.raters)
        };
        let mut comparisons = Vec::new();
        for meeting in study.meetings() {
            for form in Form::ALL {
                let queries: Vec<&Query> =
                    study.queries.iter().filter(|q| q.form == form && q.models() == meeting).collect();
                for question in form.questions().iter().filter(|_| !queries.is_empty()) {
                    let answers: Vec<_> = queries.iter().map(|query| (*query, answers.to(query, question))).collect();
                    comparisons.push(Comparison::of(study, meeting, form, question, &answers));
                }
            }
        }
        Tally {
            title: study.title.clone(),
            study: study.id(),
            raters: sessions.iter().map(Rater::of).collect(),
            queries: study.queries.len(),
            raters_per_query: study.raters,
            queries_with_fewer: study.queries.iter().filter(has_fewer).count(),
            comparisons,
        }
    }

    /// Tables for people.
    pub fn markdown(&self) -> String {
        let mut text = format!("# Human evaluation: {}\n\n", self.title);
        let votes: usize = self.comparisons.iter().map(|c| c.votes).sum();
        let _ = writeln!(text, "{} raters, {} queries, {votes} answers.", self.raters.len(), self.queries);
        if self.queries_with_fewer > 0 {
            let (fewer, wanted) = (self.queries_with_fewer, self.raters_per_query);
            let _ = writeln!(text, "{fewer} of {} queries have fewer than {wanted} raters.", self.queries);
        }
        text.push_str("In brackets 95 % confidence intervals, with the queries as the units that vary.\n");
        let mut names: Vec<(&str, &str)> = Vec::new();
        for c in &self.comparisons {
            if !names.contains(&(&c.first, &c.second)) {
                names.push((&c.first, &c.second));
            }
        }
        for (first, second) in names {
            let _ = writeln!(text, "\n## {first} against {second}\n");
            let _ = writeln!(
                text,
                "| question | votes | {first} | {second} | both good | both bad | {second}, of those that prefer one | left, of those | raters agree | alpha |"
            );
            text.push_str("|---|---|---|---|---|---|---|---|---|---|\n");
            for c in self.comparisons.iter().filter(|c| c.first == first && c.second == second) {
                let shares = [c.first_preferred, c.second_preferred, c.both_good, c.both_bad];
                let shares: Vec<String> =
                    shares.into_iter().chain([c.second_of_decided, c.left_of_decided]).map(percent).collect();
                let agree = c.agreement.map_or("–".to_owned(), |share| format!("{:.0} %", 100.0 * share));
                let alpha = c.alpha.map_or("–".to_owned(), |alpha| format!("{alpha:.2}").replace('-', "−"));
                let _ = writeln!(text, "| {} | {} | {} | {agree} | {alpha} |", c.title, c.votes, shares.join(" | "));
            }
        }
        text.push_str("\n| rater | answers | median seconds per query |\n|---|---|---|\n");
        for rater in &self.raters {
            // a name is whatever the rater typed
            let name = rater.name.replace('|', "\\|").replace(char::is_control, " ");
            let _ = writeln!(text, "| {name} | {} | {:.1} |", rater.answers, rater.median_seconds_per_query);
        }
        text.push_str(
            "\nraters agree: share of the pairs of votes on one query that are equal. alpha is Krippendorff's (nominal): 1 where \
             raters agree fully, 0 where they agree as by chance; it is not defined where all gave one and the same answer. \
             \"left\" is near 50 % where raters favour no side.\n",
        );
        text
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
        answers: &[(&Query, &[Answer])],
    ) -> Self {
        let outcomes: Vec<Vec<Outcome>> =
            answers.iter().map(|(query, answers)| answers.iter().map(|&a| outcome(a, query)).collect()).collect();
        let count = |wanted: &[Outcome]| -> Vec<usize> {
            outcomes.iter().map(|of_query| of_query.iter().filter(|o| wanted.contains(o)).count()).collect()
        };
        let all: Vec<usize> = outcomes.iter().map(Vec::len).collect();
        let share = |counted: Vec<usize>, of: &[usize]| {
            Share::of(&counted.into_iter().zip(of.iter().copied()).collect::<Vec<_>>())
        };
        let decided = count(&[Outcome::First, Outcome::Second]);
        let left = answers.iter().map(|(_, answers)| answers.iter().filter(|a| **a == Answer::Left).count()).collect();
        Comparison {
            first: study.models[first].name.clone(),
            second: study.models[second].name.clone(),
            form,
            question: question.id.to_owned(),
            title: question.title,
            queries: all.iter().filter(|votes| **votes > 0).count(),
            votes: all.iter().sum(),
            first_preferred: share(count(&[Outcome::First]), &all),
            second_preferred: share(count(&[Outcome::Second]), &all),
            both_good: share(count(&[Outcome::BothGood]), &all),
            both_bad: share(count(&[Outcome::BothBad]), &all),
            second_of_decided: share(count(&[Outcome::Second]), &decided),
            left_of_decided: share(left, &decided),
            agreement: equal_pairs(&outcomes),
            alpha: krippendorff_alpha(&outcomes),
        }
    }
}

/// "62 % (51–72)".
fn percent(share: Option<Share>) -> String {
    let hundred = |x: f64| format!("{:.0}", 100.0 * x);
    share.map_or("–".to_owned(), |s| format!("{} % ({}–{})", hundred(s.share), hundred(s.low), hundred(s.high)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::human_eval::{study::tests::example, votes::tests::session};

    /// Three raters on four pairs and one group; all prefer model 1 in the pairs, whatever side it is on.
    fn tally() -> Tally {
        let study = example(2, 4, 1);
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

    #[test]
    fn the_tables_say_it() {
        let text = tally().markdown();
        assert!(text.contains("3 raters, 5 queries, 27 answers.\n5 of 5 queries have fewer than 5 raters."), "{text}");
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
