//! What raters are asked: the two forms of the paper, their questions and answers, in our own words.

use serde::{Deserialize, Serialize};

/// Pictures of each set in the group form.
pub const GROUP: usize = 6;

/// How pictures are set beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// One picture of each model (Fig. 23).
    Pair,
    /// A set of [`GROUP`] pictures of each model (Fig. 26).
    Group,
}

/// A rater's choice between left and right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Left,
    Right,
    BothGood,
    BothBad,
}

#[derive(Debug, Serialize)]
pub struct Question {
    /// Name in files.
    pub id: &'static str,
    /// Heading of its row in tables.
    #[serde(skip)]
    pub title: &'static str,
    pub text: &'static str,
    /// One line below it.
    pub hint: &'static str,
    /// The four answers with the words for them.
    pub answers: [(Answer, &'static str); 4],
}

const PAIR: [Question; 3] = [
    Question {
        id: "alignment",
        title: "fits the description",
        text: "Which fits the description better?",
        hint: "Things, their number, colours, places, style.",
        answers: [
            (Answer::Left, "Left"),
            (Answer::Right, "Right"),
            (Answer::BothGood, "Both fit"),
            (Answer::BothBad, "Neither fits"),
        ],
    },
    Question {
        id: "fidelity",
        title: "quality of the picture",
        text: "Which is made better?",
        hint: "Shapes, faces, hands, light, noise.",
        answers: [
            (Answer::Left, "Left"),
            (Answer::Right, "Right"),
            (Answer::BothGood, "Both good"),
            (Answer::BothBad, "Both bad"),
        ],
    },
    Question {
        id: "preference",
        title: "overall preference",
        text: "Which do you prefer overall?",
        hint: "The one that you would keep.",
        answers: [
            (Answer::Left, "Left"),
            (Answer::Right, "Right"),
            (Answer::BothGood, "Like both"),
            (Answer::BothBad, "Like neither"),
        ],
    },
];

const GROUPS: [Question; 1] = [Question {
    id: "diversity",
    title: "diversity of the set",
    text: "Which set of six is more diverse?",
    hint: "People: skin tones first, then age, gender, hair.",
    answers: [
        (Answer::Left, "Left set"),
        (Answer::Right, "Right set"),
        (Answer::BothGood, "Both diverse"),
        (Answer::BothBad, "Neither diverse"),
    ],
}];

impl Form {
    pub const ALL: [Form; 2] = [Form::Pair, Form::Group];

    pub fn questions(self) -> &'static [Question] {
        match self {
            Form::Pair => &PAIR,
            Form::Group => &GROUPS,
        }
    }

    /// Pictures of one model in a query.
    pub fn pictures(self) -> usize {
        match self {
            Form::Pair => 1,
            Form::Group => GROUP,
        }
    }

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Form::Pair => "pair",
            Form::Group => "group",
        }
    }
}
