//! The paper's findings, each with what the study says of it.

use serde::Serialize;

use super::statistics::Interval;

/// What a study says of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval agrees with it.
    Reproduced,
    /// The whole interval speaks against it.
    NotReproduced,
    /// The interval holds both.
    Undecided,
}

impl Verdict {
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Reproduced => "reproduced",
            Verdict::NotReproduced => "NOT reproduced",
            Verdict::Undecided => "undecided",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What the paper finds.
    pub claim: String,
    /// The paper's own figure, and where it is.
    pub paper: String,
    pub verdict: Verdict,
    /// The figure behind the verdict.
    pub evidence: String,
}

impl Finding {
    /// Of a quantity that the paper finds to be at least (or above) `level`.
    pub fn at_least(claim: String, paper: String, what: &str, found: Interval, level: f64) -> Self {
        let verdict = if found.low > level || (found.low == level && level != 0.0) {
            Verdict::Reproduced
        } else if found.high < level {
            Verdict::NotReproduced
        } else {
            Verdict::Undecided
        };
        Finding { claim, paper, verdict, evidence: format!("{what} {}", found.text(true)) }
    }

    /// Of something that is so or not with each seed: undecided where seeds disagree.
    pub fn that(claim: String, paper: String, evidence: String, holds: &[bool]) -> Self {
        let verdict = match (holds.contains(&true), holds.contains(&false)) {
            (true, false) => Verdict::Reproduced,
            (false, true) => Verdict::NotReproduced,
            _ => Verdict::Undecided,
        };
        Finding { claim, paper, verdict, evidence }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_interval_decides() {
        let verdict = |low, high, level| {
            let found = Interval { value: (low + high) / 2.0, low, high };
            Finding::at_least("x".into(), "y".into(), "gain", found, level).verdict
        };
        let that = |holds: &[bool]| Finding::that("x".into(), "y".into(), "z".into(), holds).verdict;
        assert_eq!(that(&[true, true]), Verdict::Reproduced);
        assert_eq!(that(&[false]), Verdict::NotReproduced);
        assert_eq!(that(&[true, false]), Verdict::Undecided);
        assert_eq!(that(&[]), Verdict::Undecided);
        assert_eq!(verdict(0.1, 0.3, 0.0), Verdict::Reproduced);
        assert_eq!(verdict(-0.1, 0.3, 0.0), Verdict::Undecided);
        assert_eq!(verdict(0.0, 0.3, 0.0), Verdict::Undecided);
        assert_eq!(verdict(-0.3, -0.1, 0.0), Verdict::NotReproduced);
        assert_eq!(verdict(0.8, 0.9, 0.8), Verdict::Reproduced);
        assert_eq!(verdict(0.5, 0.79, 0.8), Verdict::NotReproduced);
        assert_eq!(verdict(f64::NAN, f64::NAN, 0.0), Verdict::Undecided);
    }
}
