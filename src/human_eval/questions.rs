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

/// Which questions a study asks. Studies of the first edition are not made any more, but still counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Edition {
    /// Answers left, right, both, neither.
    #[serde(rename = "rldiff-study-1")]
    First,
    /// The questions and answers of Fig. 23, in its order.
    #[serde(rename = "rldiff-study-2")]
    Paper,
}

/// A rater's answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Left,
    Right,
    /// Of the first edition only, as is the next.
    BothGood,
    BothBad,
    /// Ambivalent, not sure, or the two are alike.
    NotSure,
    /// A picture was not to be seen: no vote on quality.
    DidNotLoad,
}

impl Answer {
    /// Does it say anything about the pictures?
    pub fn is_vote(self) -> bool {
        self != Answer::DidNotLoad
    }
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

impl Question {
    pub fn has(&self, answer: Answer) -> bool {
        self.answers.iter().any(|(own, _)| *own == answer)
    }
}

const OF_IMAGES: [(Answer, &str); 4] = [
    (Answer::Left, "Image A (left)"),
    (Answer::Right, "Image B (right)"),
    (Answer::NotSure, "Ambivalent / not sure / similar"),
    (Answer::DidNotLoad, "Did not load"),
];

const OF_SETS: [(Answer, &str); 4] = [
    (Answer::Left, "Set A (left)"),
    (Answer::Right, "Set B (right)"),
    (Answer::NotSure, "Ambivalent / not sure / similar"),
    (Answer::DidNotLoad, "Did not load"),
];

const PAIR: [Question; 3] = [
    Question {
        id: "fidelity",
        title: "fidelity and quality",
        text: "Which image has the higher fidelity and quality?",
        hint: "Right shapes, nothing broken, and beauty.",
        answers: OF_IMAGES,
    },
    Question {
        id: "alignment",
        title: "relevance to the description",
        text: "Which image matches the description better?",
        hint: "Things, their number, colours, places, style.",
        answers: OF_IMAGES,
    },
    Question {
        id: "preference",
        title: "overall preference",
        text: "Overall, which image do you prefer for this description?",
        hint: "Fidelity and beauty come before relevance; see the guidelines for the exception.",
        answers: OF_IMAGES,
    },
];

const GROUPS: [Question; 1] = [Question {
    id: "diversity",
    title: "diversity of skin tones",
    text: "Which set has the more diverse skin tones?",
    hint: "Skin tones only: light and dark in balance.",
    answers: OF_SETS,
}];

/// The first edition's words for the answers are not kept: its pages have them.
const BOTH_OR_NEITHER: [(Answer, &str); 4] =
    [(Answer::Left, "Left"), (Answer::Right, "Right"), (Answer::BothGood, "Both"), (Answer::BothBad, "Neither")];

const FIRST_PAIR: [Question; 3] = [
    Question {
        id: "alignment",
        title: "fits the description",
        text: "Which fits the description better?",
        hint: "Things, their number, colours, places, style.",
        answers: BOTH_OR_NEITHER,
    },
    Question {
        id: "fidelity",
        title: "quality of the picture",
        text: "Which is made better?",
        hint: "Shapes, faces, hands, light, noise.",
        answers: BOTH_OR_NEITHER,
    },
    Question {
        id: "preference",
        title: "overall preference",
        text: "Which do you prefer overall?",
        hint: "The one that you would keep.",
        answers: BOTH_OR_NEITHER,
    },
];

const FIRST_GROUPS: [Question; 1] = [Question {
    id: "diversity",
    title: "diversity of the set",
    text: "Which set of six is more diverse?",
    hint: "People: skin tones first, then age, gender, hair.",
    answers: BOTH_OR_NEITHER,
}];

impl Form {
    pub const ALL: [Form; 2] = [Form::Pair, Form::Group];

    pub fn questions(self, edition: Edition) -> &'static [Question] {
        match (edition, self) {
            (Edition::Paper, Form::Pair) => &PAIR,
            (Edition::Paper, Form::Group) => &GROUPS,
            (Edition::First, Form::Pair) => &FIRST_PAIR,
            (Edition::First, Form::Group) => &FIRST_GROUPS,
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
