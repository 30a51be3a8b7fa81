//! How a run ended, in its summary and for people.

use serde::{Deserialize, Serialize};

use super::number;

/// Why a run ended where it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    pub reason: Reason,
    /// After so many iterations.
    pub iterations: u64,
    /// `run.iterations`.
    pub at_most: u64,
    /// The same in a sentence.
    pub words: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    IterationsDone,
    Saturated,
}

impl Ending {
    pub fn all_iterations(iterations: u64) -> Self {
        let words = format!("all {iterations} iterations are done");
        Ending { reason: Reason::IterationsDone, iterations, at_most: iterations, words }
    }
}

/// A task whose reward is below its best at the end of a run: the run has diverged on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FallBack {
    pub task: String,
    /// Which reward: "training reward", "evaluated reward".
    pub reward: String,
    /// Mean over the best window, and its first and last iteration, counted from 1.
    #[serde(with = "number")]
    pub best: f64,
    pub best_iterations: [u64; 2],
    /// The same of the newest window.
    #[serde(with = "number")]
    pub newest: f64,
    pub newest_iterations: [u64; 2],
    /// Of the difference.
    #[serde(with = "number")]
    pub standard_error: f64,
}

impl std::fmt::Display for FallBack {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let FallBack { task, reward, best, newest, .. } = self;
        let ([from, to], [newest_from, newest_to]) = (self.best_iterations, self.newest_iterations);
        let errors = (best - newest) / self.standard_error;
        write!(
            f,
            "task {task}: the {reward} fell back from {best:.4} (iterations {from} to {to}) to {newest:.4} ({newest_from} to \
             {newest_to}), by {errors:.1} standard errors: the run has diverged"
        )
    }
}
