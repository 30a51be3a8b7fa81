//! The figures that the paper gives for what a study looks at: its Tables 1 and 5 and section 4.1.

use crate::config::RewardConfig;

/// The paper's three kinds of reward; each of a study's rewards is taken for one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ImageReward; the miniature's stand-in is colourfulness.
    Preference,
    /// The confidence of a detector (Eq. 13).
    Composition,
    /// Statistical parity (Eq. 12), of which the reward is the negative: the paper prints it without the sign.
    Parity,
}

impl Kind {
    pub fn of(reward: &RewardConfig) -> Self {
        match reward {
            RewardConfig::Parity { .. } => Kind::Parity,
            RewardConfig::MiniatureComposition {} | RewardConfig::Composition(_) => Kind::Composition,
            _ => Kind::Preference,
        }
    }

    /// Factor from the reward to what the tables print.
    pub fn sign(self) -> f64 {
        if self == Kind::Parity {
            -1.0
        } else {
            1.0
        }
    }

    /// What it is called where a user has mistaken it for another.
    pub fn words(self) -> &'static str {
        match self {
            Kind::Preference => "a preference",
            Kind::Composition => "an object composition",
            Kind::Parity => "a parity",
        }
    }

    fn metric(self) -> &'static str {
        match self {
            Kind::Preference => "ImageReward",
            Kind::Composition => "detection score",
            Kind::Parity => "statistical parity",
        }
    }

    /// Table 5: base model, runs trained on preference, composition and parity, joint run.
    fn table_5(self) -> [f64; 5] {
        match self {
            Kind::Preference => [0.273, 0.783, 0.304, 0.093, 0.701],
            Kind::Composition => [0.098, 0.114, 0.226, 0.076, 0.182],
            Kind::Parity => [0.567, 0.659, 0.575, 0.479, 0.499],
        }
    }

    /// What a model of Table 5 has after `run` and the base model before.
    pub fn since_base(self, run: Trained) -> String {
        let values = self.table_5();
        format!("{} {:.3} to {:.3} (Table 5)", self.metric(), values[0], values[run.column()])
    }

    /// Two models of Table 5 beside each other.
    pub fn against(self, run: Trained, other: Trained) -> String {
        let values = self.table_5();
        format!("{} {:.3} against {:.3} (Table 5)", self.metric(), values[run.column()], values[other.column()])
    }

    /// The share of the single run's score that the joint run has; of a metric where lower is better, the inverse.
    pub fn score_kept(self) -> f64 {
        let values = self.table_5();
        let (single, joint) = (values[Trained::On(self).column()], values[Trained::Jointly.column()]);
        if self == Kind::Parity {
            single / joint
        } else {
            joint / single
        }
    }

    /// The share of the single run's gain over the base model that the joint run has.
    pub fn gain_kept(self) -> f64 {
        let values = self.table_5();
        let (single, joint) = (values[Trained::On(self).column()], values[Trained::Jointly.column()]);
        (joint - values[0]) / (single - values[0])
    }
}

/// What a run of Table 5 is trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    On(Kind),
    Jointly,
}

impl Trained {
    fn column(self) -> usize {
        match self {
            Trained::On(Kind::Preference) => 1,
            Trained::On(Kind::Composition) => 2,
            Trained::On(Kind::Parity) => 3,
            Trained::Jointly => 4,
        }
    }
}

/// Table 1: ImageReward of a method, by its name in configs, on DiffusionDB and PartiPrompts.
pub fn image_reward(method: &str) -> Option<[f64; 2]> {
    Some(match method {
        "ours" => [0.845, 0.731],
        "refl" => [1.290, 0.832],
        "raft" => [0.338, 0.504],
        "draft" => [0.818, 0.632],
        "reward_weighted" => [0.438, 0.624],
        _ => return None,
    })
}

/// Table 1: the aesthetic score of a method, as [`image_reward`]; `base` is Stable Diffusion 2.
pub fn aesthetic(method: &str) -> Option<[f64; 2]> {
    Some(match method {
        "ours" => [5.918, 5.477],
        "refl" => [5.845, 5.402],
        "raft" => [5.881, 5.413],
        "draft" => [5.645, 5.279],
        "reward_weighted" => [5.821, 5.363],
        "base" => [5.783, 5.269],
        _ => return None,
    })
}

/// Two methods of Table 1 beside each other.
pub fn beside(judge: &str, higher: Option<[f64; 2]>, lower: Option<[f64; 2]>) -> String {
    let (Some(higher), Some(lower)) = (higher, lower) else { return "not in the paper".to_string() };
    format!(
        "{judge} {:.3} against {:.3} on DiffusionDB, {:.3} against {:.3} on PartiPrompts (Table 1)",
        higher[0], lower[0], higher[1], lower[1]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shares that section 4.4 calls "over 80 %", and those of the gains, from Table 5's own figures.
    #[test]
    fn the_papers_shares() {
        let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 5e-4, "{found} instead of {wanted}");
        near(Kind::Preference.score_kept(), 0.895);
        near(Kind::Composition.score_kept(), 0.805);
        near(Kind::Parity.score_kept(), 0.960);
        near(Kind::Preference.gain_kept(), 0.839);
        near(Kind::Composition.gain_kept(), 0.656);
        near(Kind::Parity.gain_kept(), 0.773);
    }
}
