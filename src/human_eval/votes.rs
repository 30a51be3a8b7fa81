//! The files that raters send: reading them, and saying what is wrong with the wrong ones.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{anyhow, bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{questions::Answer, study::Study};
use crate::user_file;

/// First field of a file of votes.
pub const FORMAT: &str = "rldiff-votes-1";

/// What the pages export: one rater's answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Session {
    pub format: String,
    /// [`Study::id`] of the pages.
    pub study: String,
    /// What the rater calls himself.
    pub rater: String,
    /// The rater's number, where queries are shared out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<usize>,
    /// Random, made when the rater began: a file that is exported twice has the same.
    pub session: String,
    /// Times in ISO 8601, as the browser's clock gave them.
    pub started: String,
    pub exported: String,
    pub answers: Vec<Vote>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vote {
    pub query: String,
    pub question: String,
    pub answer: Answer,
    /// From the query's appearance to this answer.
    pub seconds: f64,
}

impl Session {
    /// Is there an answer to this query?
    pub fn answered(&self, query: &str) -> bool {
        self.answers.iter().any(|vote| vote.query == query)
    }
}

/// Reads files, and the `.json` files of folders, in the order of their names.
///
/// # Errors
/// One line for each file that cannot be counted: unreadable, malformed, of another study, or from a session or rater
/// that is there already.
pub fn read_all(study: &Study, paths: &[PathBuf]) -> Result<Vec<Session>> {
    let mut sessions: Vec<(PathBuf, Session)> = Vec::new();
    let mut wrong = Vec::new();
    for path in files(paths)? {
        let read = read(study, &path).and_then(|session| {
            check_new(&session, &sessions)?;
            Ok(session)
        });
        match read {
            Ok(session) => sessions.push((path, session)),
            Err(error) => wrong.push(format!("{}: {error:#}", path.display())),
        }
    }
    if !wrong.is_empty() {
        // the command line writes "error: " before the first
        return Err(anyhow!(wrong.join("\nerror: ")));
    }
    Ok(sessions.into_iter().map(|(_, session)| session).collect())
}

fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let cannot = || format!("cannot read {}", path.display());
        let entries = std::fs::read_dir(path).with_context(cannot)?;
        let inside = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>().with_context(cannot)?;
        let mut inside: Vec<_> =
            inside.into_iter().filter(|p| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"))).collect();
        ensure!(!inside.is_empty(), "{} holds no .json file", path.display());
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

/// A session whose every answer belongs to the study.
fn read(study: &Study, path: &Path) -> Result<Session> {
    let bytes = user_file::read(path).context("cannot be read")?;
    let session: Session = serde_json::from_slice(&bytes).context("is no file of votes")?;
    ensure!(session.format == FORMAT, "has the format {:?}, not {FORMAT:?}", session.format);
    let id = study.id();
    ensure!(session.study == id, "belongs to the study {}, not to {id}", session.study);
    ensure!(!session.rater.trim().is_empty() && !session.session.is_empty(), "says neither who answered nor when");
    ensure!(!session.answers.is_empty(), "holds no answers");
    let assignment = match session.number {
        None if study.is_shared_out() => bail!("says no rater's number, and this study is shared out"),
        None => None,
        Some(number) => {
            let assignment = study.assignment(number);
            Some(assignment.with_context(|| format!("is of the rater number {number}, whom the study has not"))?)
        }
    };
    let mut seen = BTreeSet::new();
    for vote in &session.answers {
        let Some(query) = study.queries.iter().find(|query| query.id == vote.query) else {
            bail!("answers a query {:?} that the study has not", vote.query);
        };
        let own = assignment.is_none_or(|assignment| assignment.asked(&query.id).is_some());
        ensure!(own, "answers the query {:?}, which rater {} did not get", vote.query, session.number.unwrap_or(0));
        let questions = query.form.questions(study.edition);
        let Some(question) = questions.iter().find(|question| question.id == vote.question) else {
            bail!("answers a question {:?} that {} has not", vote.question, vote.query);
        };
        let known = question.has(vote.answer);
        ensure!(known, "gives {} of {} an answer that it has not", vote.question, vote.query);
        ensure!(seen.insert((&vote.query, &vote.question)), "answers {} of {} twice", vote.question, vote.query);
        ensure!(vote.seconds >= 0.0, "has a negative time at {}", vote.query);
    }
    Ok(session)
}

fn check_new(session: &Session, sessions: &[(PathBuf, Session)]) -> Result<()> {
    for (path, other) in sessions {
        ensure!(other.session != session.session, "is the same session as {}", path.display());
        let path = path.display();
        if let (Some(number), Some(others)) = (session.number, other.number) {
            ensure!(number != others, "is a second file of rater {number}, after {path}");
        }
        let rater = session.rater.trim();
        if other.rater.trim() != rater {
            continue;
        }
        ensure!(session.number.is_some(), "is a second file of the rater {rater:?}, after {path}");
        // one person may take two numbers, if they have no query in common
        let twice = session.answers.iter().find(|vote| other.answered(&vote.query));
        ensure!(twice.is_none(), "has a second vote of {rater:?} on {}, after {path}", twice.unwrap().query);
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::human_eval::study::tests::example;

    pub fn session(study: &Study, rater: &str, answers: &[(&str, &str, Answer)]) -> Session {
        Session {
            format: FORMAT.into(),
            study: study.id(),
            rater: rater.into(),
            number: None,
            session: format!("session of {rater}"),
            started: "2026-11-26T08:00:00.000Z".into(),
            exported: "2026-11-26T09:00:00.000Z".into(),
            answers: answers
                .iter()
                .map(|&(query, question, answer)| Vote {
                    query: query.into(),
                    question: question.into(),
                    answer,
                    seconds: 1.5,
                })
                .collect(),
        }
    }

    const ONE: [(&str, &str, Answer); 1] = [("pair-0001", "fidelity", Answer::Left)];

    #[test]
    fn good_files_are_read_in_the_order_of_their_names() {
        let folder = tempfile::tempdir().unwrap();
        let study = example(2, 2, 1);
        for (file, rater) in [("b.json", "bea"), ("a.json", "abe"), ("C.JSON", "cy")] {
            let text = serde_json::to_string(&session(&study, rater, &ONE)).unwrap();
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        std::fs::write(folder.path().join("notes.txt"), "not votes").unwrap();
        let sessions = read_all(&study, &[folder.path().to_path_buf()]).unwrap();
        assert_eq!(sessions.iter().map(|s| s.rater.as_str()).collect::<Vec<_>>(), ["cy", "abe", "bea"]);
    }

    #[test]
    fn every_wrong_file_gets_its_own_line() {
        let folder = tempfile::tempdir().unwrap();
        let study = example(2, 2, 1);
        let good = session(&study, "abe", &ONE);
        let text = |session: &Session| serde_json::to_string(session).unwrap();
        let with = |change: &dyn Fn(&mut Session)| {
            let mut session = session(&study, "bea", &ONE);
            change(&mut session);
            text(&session)
        };
        let cases: [(String, &str); 15] = [
            ("{".into(), "is no file of votes: EOF"),
            ("[]".into(), "is no file of votes"),
            (with(&|_| ()).replace("\"left\"", "\"middle\""), "unknown variant `middle`"),
            (with(&|_| ()).replace("\"rater\"", "\"name\""), "unknown field `name`"),
            (with(&|s| s.format = "rldiff-votes-0".into()), "has the format \"rldiff-votes-0\""),
            (with(&|s| s.study = example(2, 3, 1).id()), "belongs to the study"),
            (with(&|s| s.rater = " ".into()), "says neither who"),
            (with(&|s| s.answers.clear()), "holds no answers"),
            (with(&|s| s.answers[0].query = "pair-0009".into()), "a query \"pair-0009\" that the study has not"),
            (with(&|s| s.answers[0].question = "diversity".into()), "\"diversity\" that pair-0001 has not"),
            (with(&|s| s.answers[0].answer = Answer::BothBad), "gives fidelity of pair-0001 an answer that it has not"),
            (with(&|s| s.answers.push(s.answers[0].clone())), "answers fidelity of pair-0001 twice"),
            (with(&|s| s.answers[0].seconds = -1.0), "negative time"),
            (with(&|s| s.session = good.session.clone()), "is the same session as"),
            (with(&|s| s.rater = "abe ".into()), "is a second file of the rater \"abe\""),
        ];
        std::fs::write(folder.path().join("00.json"), text(&good)).unwrap();
        for (i, (content, _)) in cases.iter().enumerate() {
            std::fs::write(folder.path().join(format!("{:02}.json", i + 1)), content).unwrap();
        }
        let error = format!("{:#}", read_all(&study, &[folder.path().to_path_buf()]).unwrap_err());
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!(lines.len(), cases.len(), "{error}");
        for (i, (line, (_, expected))) in lines.iter().zip(&cases).enumerate() {
            assert!(line.contains(&format!("{:02}.json: ", i + 1)) && line.contains(expected), "{line} / {expected}");
        }
        // a number where nobody has one is nobody's
        std::fs::write(folder.path().join("00.json"), with(&|s| s.number = Some(1))).unwrap();
        let numbered = read_all(&study, &[folder.path().join("00.json")]).unwrap_err().to_string();
        assert!(numbered.ends_with("is of the rater number 1, whom the study has not"), "{numbered}");
        let missing = read_all(&study, &[folder.path().join("absent.json")]).unwrap_err().to_string();
        assert!(missing.contains("absent.json: cannot be read"), "{missing}");
    }

    #[test]
    fn raters_with_numbers_answer_their_own_queries_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut study = example(2, 4, 0);
        study.raters = 2;
        let study = study.shared_out(Some(2)).unwrap();
        let own = |number: usize, i: usize| study.assignment(number).unwrap().queries[i].query.clone();
        let other = study.queries.iter().find(|q| study.assignment(1).unwrap().asked(&q.id).is_none()).unwrap();
        let sharing = (2..=4).find(|n| study.assignment(*n).unwrap().asked(&own(1, 0)).is_some()).unwrap();
        let apart = (2..=4).find(|n| study.assignment(*n).unwrap().asked(&own(1, 0)).is_none()).unwrap();
        let of = |rater: &str, number: Option<usize>, query: &str, session_name: &str| {
            let answers = [(query, "fidelity", Answer::Left)];
            Session { number, session: session_name.into(), ..session(&study, rater, &answers) }
        };
        let cases = [
            (of("abe", Some(1), &own(1, 0), "a"), ""),
            (of("abe", Some(apart), &own(apart, 0), "b"), ""),
            (of("bea", None, &own(1, 0), "c"), "says no rater's number"),
            (of("bea", Some(5), &own(1, 0), "d"), "is of the rater number 5, whom the study has not"),
            (of("bea", Some(1), &own(1, 1), "e"), "is a second file of rater 1, after"),
            (of("bea", Some(1), &other.id, "f"), "which rater 1 did not get"),
            (of("abe", Some(sharing), &own(1, 0), "g"), "has a second vote of \"abe\" on"),
        ];
        for (i, (session, _)) in cases.iter().enumerate() {
            std::fs::write(folder.path().join(format!("{i}.json")), serde_json::to_string(session).unwrap()).unwrap();
        }
        let error = read_all(&study, &[folder.path().to_path_buf()]).unwrap_err().to_string();
        let lines: Vec<&str> = error.lines().collect();
        let expected: Vec<&str> = cases.iter().map(|(_, expected)| *expected).filter(|e| !e.is_empty()).collect();
        assert_eq!(lines.len(), expected.len(), "{error}");
        for (line, expected) in lines.iter().zip(expected) {
            assert!(line.contains(expected), "{line} / {expected}");
        }
    }
}
