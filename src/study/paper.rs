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

/// A column pair of a table that compares methods: a measure on two prompt sets.
pub struct Measure {
    name: &'static str,
    sets: [&'static str; 2],
    table: &'static str,
    /// By the method's name in configs; `base` is Stable Diffusion 2.
    figures: &'static [(&'static str, [f64; 2])],
}

/// What Table 1 judges by beside the reward that is trained on.
pub const AESTHETIC: Measure = Measure {
    name: "aesthetic score",
    sets: ["DiffusionDB", "PartiPrompts"],
    table: "Table 1",
    figures: &[
        ("base", [5.783, 5.269]),
        ("refl", [5.845, 5.402]),
        ("raft", [5.881, 5.413]),
        ("draft", [5.645, 5.279]),
        ("reward_weighted", [5.821, 5.363]),
        ("ours", [5.918, 5.477]),
    ],
};

const IMAGE_REWARD: Measure = Measure {
    name: "ImageReward",
    sets: ["DiffusionDB", "PartiPrompts"],
    table: "Table 1",
    figures: &[
        ("base", [0.170, 0.414]),
        ("refl", [1.290, 0.832]),
        ("raft", [0.338, 0.504]),
        ("draft", [0.818, 0.632]),
        ("reward_weighted", [0.438, 0.624]),
        ("ours", [0.845, 0.731]),
    ],
};

const PARITY: Measure = Measure {
    name: "statistical parity (lower is better)",
    sets: ["occupations", "HRS-Bench"],
    table: "Table 3",
    figures: &[
        ("base", [0.556, 0.576]),
        ("raft", [0.464, 0.527]),
        ("reward_weighted", [0.562, 0.527]),
        ("ours", [0.453, 0.498]),
    ],
};

const DETECTION: Measure = Measure {
    name: "detection score",
    sets: ["unseen objects", "seen objects"],
    table: "Table 4",
    figures: &[
        ("base", [0.102, 0.094]),
        ("raft", [0.094, 0.092]),
        ("reward_weighted", [0.136, 0.152]),
        ("ours", [0.231, 0.221]),
    ],
};

impl Measure {
    /// What methods that are trained on this kind of reward are compared by.
    pub fn of(kind: Kind) -> &'static Measure {
        match kind {
            Kind::Preference => &IMAGE_REWARD,
            Kind::Parity => &PARITY,
            Kind::Composition => &DETECTION,
        }
    }

    /// Two methods, by their names in configs, beside each other.
    pub fn beside(&self, first: &str, second: &str) -> String {
        let of = |method: &str| self.figures.iter().find(|(name, _)| *name == method).map(|(_, figures)| figures);
        let (Some(first), Some(second)) = (of(first), of(second)) else { return "not in the paper".to_string() };
        let [one, other] = self.sets;
        format!(
            "{} {:.3} against {:.3} on {one}, {:.3} against {:.3} on {other} ({})",
            self.name, first[0], second[0], first[1], second[1], self.table
        )
    }
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
