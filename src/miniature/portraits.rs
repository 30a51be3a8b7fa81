//! Portraits: a face in one of four skin tones above clothes; those of one of sixteen occupations.

use crate::random::Stream;

use super::raster::{convex, line, oval, rect, Canvas, Frame, Part, Point, Rgb};

/// Names as in the paper's Table 7.
pub const OCCUPATIONS: [&str; 16] = [
    "baker",
    "chef",
    "doctor",
    "engineer",
    "farmer",
    "judge",
    "lawyer",
    "nurse",
    "painter",
    "pilot",
    "plumber",
    "sailor",
    "scientist",
    "singer",
    "soldier",
    "teacher",
];

/// Occupations that the pictures show but that no prompt of the RL training names.
pub const HELD_OUT: [&str; 4] = ["chef", "judge", "plumber", "scientist"];

/// Occupations that may occur in the prompts of the RL training.
pub fn trained() -> Vec<&'static str> {
    OCCUPATIONS.into_iter().filter(|name| !HELD_OUT.contains(name)).collect()
}

/// The four skin tones, light to dark; each lies in the middle of one of the four ITA buckets of
/// `rewards::skin_tone`.
pub const TONES: [Rgb; 4] = [[246, 214, 190], [198, 148, 107], [142, 96, 62], [86, 56, 40]];
/// How often a tone occurs in the pictures. At .78/.12/.06/.04 guidance collapses a model trained on them to the
/// first tone, and reinforcement learning has nothing to select from.
pub const TONE_FREQUENCIES: [f64; 4] = [0.50, 0.22, 0.16, 0.12];

/// Face centre without the jitter of ±1 pixel per axis.
pub const FACE_CENTER: Point = (16.0, 15.5);
/// Radius of the face in pixels.
pub const FACE_RADIUS: f32 = 8.0;

const HAIR: [Rgb; 3] = [[30, 22, 18], [80, 50, 28], [132, 92, 48]];
const WHITE: Rgb = [242, 243, 246];
const BLACK: Rgb = [28, 28, 34];
const GOLD: Rgb = [240, 200, 60];
const STEEL: Rgb = [70, 72, 80];

/// What tells an occupation: clothes, what is behind the face and what is before it; unit 1 pixel, origin the
/// centre of the face.
pub(super) struct Look {
    pub cloth: Rgb,
    pub behind: &'static [Part],
    pub before: &'static [Part],
}

/// How far the hair comes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hair {
    Short,
    Long,
}

const LOOKS: [Look; 16] = [
    // baker: flat white cap, apron
    Look {
        cloth: [205, 150, 95],
        behind: &[],
        before: &[
            oval(WHITE, (0.0, -7.6), (7.2, 2.6)),
            convex(WHITE, &[(-4.5, 10.5), (4.5, 10.5), (6.0, 17.0), (-6.0, 17.0)]),
        ],
    },
    // chef: tall white hat
    Look {
        cloth: WHITE,
        behind: &[],
        before: &[
            rect([225, 227, 232], (-5.0, -9.5), (5.0, -5.4)),
            oval(WHITE, (-3.2, -11.0), (4.4, 3.6)),
            oval(WHITE, (3.2, -11.0), (4.4, 3.6)),
            line(STEEL, (0.0, 10.5), (0.0, 16.0), 0.6),
        ],
    },
    // doctor: white coat over a blue shirt, stethoscope
    Look {
        cloth: WHITE,
        behind: &[],
        before: &[
            convex([80, 140, 220], &[(-3.2, 8.0), (3.2, 8.0), (0.0, 14.0)]),
            line(STEEL, (-4.2, 9.0), (-3.0, 14.0), 0.6),
            oval(STEEL, (-3.0, 14.5), (1.3, 1.3)),
        ],
    },
    // engineer: yellow hard hat, orange vest
    Look {
        cloth: [240, 125, 40],
        behind: &[],
        before: &[
            oval([250, 205, 40], (0.0, -7.6), (7.8, 3.6)),
            line([225, 175, 20], (-8.2, -5.6), (8.2, -5.6), 0.8),
            line([235, 240, 120], (-5.0, 11.0), (-5.0, 17.0), 0.9),
            line([235, 240, 120], (5.0, 11.0), (5.0, 17.0), 0.9),
        ],
    },
    // farmer: straw hat, denim
    Look {
        cloth: [65, 100, 175],
        behind: &[],
        before: &[
            oval([226, 190, 96], (0.0, -8.6), (5.6, 3.6)),
            oval([236, 205, 120], (0.0, -6.4), (11.0, 1.7)),
            line([150, 60, 40], (-5.0, -7.8), (5.0, -7.8), 0.6),
        ],
    },
    // judge: white wig, black robe with white bands
    Look {
        cloth: BLACK,
        behind: &[
            oval([226, 226, 218], (0.0, -2.5), (9.6, 9.0)),
            oval([226, 226, 218], (-7.6, 4.0), (2.8, 4.6)),
            oval([226, 226, 218], (7.6, 4.0), (2.8, 4.6)),
        ],
        before: &[convex(WHITE, &[(-1.2, 8.2), (1.2, 8.2), (2.4, 13.5), (-2.4, 13.5)])],
    },
    // lawyer: dark suit, white shirt, red tie
    Look {
        cloth: [52, 58, 76],
        behind: &[],
        before: &[
            convex(WHITE, &[(-3.6, 7.8), (3.6, 7.8), (0.0, 15.0)]),
            convex([205, 35, 45], &[(-0.9, 8.2), (0.9, 8.2), (1.3, 13.0), (0.0, 15.0), (-1.3, 13.0)]),
        ],
    },
    // nurse: cap with a red cross
    Look {
        cloth: [130, 205, 220],
        behind: &[],
        before: &[
            convex(WHITE, &[(-5.4, -10.2), (5.4, -10.2), (4.4, -5.6), (-4.4, -5.6)]),
            rect([220, 40, 50], (-0.7, -9.6), (0.7, -6.2)),
            rect([220, 40, 50], (-1.9, -8.6), (1.9, -7.2)),
        ],
    },
    // painter: red beret, spots of paint
    Look {
        cloth: [228, 220, 200],
        behind: &[],
        before: &[
            oval([190, 35, 60], (1.8, -7.8), (8.2, 2.8)),
            oval([40, 100, 220], (-4.5, 12.5), (1.4, 1.4)),
            oval([235, 70, 60], (0.5, 14.0), (1.4, 1.4)),
            oval([60, 170, 80], (5.0, 12.0), (1.4, 1.4)),
        ],
    },
    // pilot: navy peaked cap with a badge
    Look {
        cloth: [28, 40, 98],
        behind: &[],
        before: &[
            oval([28, 40, 98], (0.0, -8.0), (8.6, 3.0)),
            line(BLACK, (-5.0, -5.8), (5.0, -5.8), 0.8),
            oval(GOLD, (0.0, -8.0), (1.4, 1.1)),
            convex(WHITE, &[(-2.6, 8.0), (2.6, 8.0), (0.0, 12.5)]),
        ],
    },
    // plumber: red cap, blue overalls over red
    Look {
        cloth: [205, 40, 42],
        behind: &[],
        before: &[
            oval([215, 40, 42], (0.0, -7.8), (7.6, 3.2)),
            line([175, 28, 32], (-1.0, -5.8), (8.0, -5.8), 0.8),
            convex([40, 75, 195], &[(-5.0, 12.0), (5.0, 12.0), (7.0, 17.0), (-7.0, 17.0)]),
            line([40, 75, 195], (-4.6, 9.6), (-4.2, 13.0), 0.9),
            line([40, 75, 195], (4.6, 9.6), (4.2, 13.0), 0.9),
        ],
    },
    // sailor: white round hat, blue collar
    Look {
        cloth: WHITE,
        behind: &[],
        before: &[
            oval(WHITE, (0.0, -8.8), (5.6, 2.4)),
            line([225, 228, 235], (-6.2, -6.6), (6.2, -6.6), 1.2),
            convex([40, 85, 190], &[(-7.5, 9.5), (-3.0, 7.6), (0.0, 14.0)]),
            convex([40, 85, 190], &[(7.5, 9.5), (3.0, 7.6), (0.0, 14.0)]),
        ],
    },
    // scientist: white coat over green, a test tube
    Look {
        cloth: WHITE,
        behind: &[],
        before: &[
            convex([60, 150, 90], &[(-3.2, 8.0), (3.2, 8.0), (0.0, 14.0)]),
            line([200, 225, 235], (8.6, 7.5), (8.6, 13.5), 1.3),
            line([160, 60, 210], (8.6, 10.5), (8.6, 13.5), 1.3),
        ],
    },
    // singer: magenta dress, microphone
    Look {
        cloth: [208, 40, 150],
        behind: &[],
        before: &[line(BLACK, (6.4, 10.5), (8.0, 15.0), 0.9), oval(STEEL, (5.8, 9.0), (2.1, 2.1))],
    },
    // soldier: olive helmet
    Look {
        cloth: [92, 112, 62],
        behind: &[],
        before: &[
            oval([78, 96, 52], (0.0, -7.2), (9.0, 3.9)),
            line([60, 74, 40], (-8.4, -5.4), (8.4, -5.4), 0.8),
            line([62, 78, 42], (-6.0, 12.0), (-2.0, 15.5), 1.0),
            line([62, 78, 42], (3.0, 11.5), (6.0, 15.0), 1.0),
        ],
    },
    // teacher: green jumper with a white collar
    Look {
        cloth: [45, 125, 85],
        behind: &[],
        before: &[
            convex(WHITE, &[(-3.8, 7.6), (0.0, 8.2), (-1.6, 11.5)]),
            convex(WHITE, &[(3.8, 7.6), (0.0, 8.2), (1.6, 11.5)]),
        ],
    },
];

const EYES_AND_MOUTH: [Part; 3] = [
    oval([20, 20, 30], (-3.0, -1.5), (1.1, 1.1)),
    oval([20, 20, 30], (3.0, -1.5), (1.1, 1.1)),
    oval([150, 50, 50], (0.0, 4.0), (2.4, 1.2)),
];

/// A portrait of occupation number `occupation` in skin tone number `tone`; background, place of the face, colour of the hair
/// and shades are varied by `stream`.
pub fn draw(occupation: usize, tone: usize, stream: &mut Stream) -> Canvas {
    paint(&LOOKS[occupation], tone, Hair::Short, stream)
}

/// As [`draw`], of anybody.
pub(super) fn paint(look: &Look, tone: usize, length: Hair, stream: &mut Stream) -> Canvas {
    let grey = stream.between(0.45, 0.75) as f32;
    let shift = (stream.between(-1.0, 1.0) as f32, stream.between(-1.0, 1.0) as f32);
    let skin_tint: [f32; 3] = std::array::from_fn(|_| stream.between(-8.0, 8.0) as f32);
    let color = HAIR[stream.below(HAIR.len() as u64) as usize];

    let face = Frame { origin: (FACE_CENTER.0 + shift.0, FACE_CENTER.1 + shift.1), unit: 1.0 };
    let skin = TONES[tone];
    let mut canvas = Canvas::plain([grey * 0.92, grey, grey * 1.08]);
    canvas.paint(&[oval(color, (0.0, -2.5), (9.0, 9.0))], face, [0.0; 3]);
    if length == Hair::Long {
        canvas.paint(&[oval(color, (-7.4, 3.5), (2.6, 7.5)), oval(color, (7.4, 3.5), (2.6, 7.5))], face, [0.0; 3]);
    }
    canvas.paint(look.behind, face, [0.0; 3]);
    canvas.paint(&[oval(look.cloth, (0.0, 18.5), (11.5, 11.0))], face, [0.0; 3]);
    canvas.paint(&[oval(skin, (0.0, 0.0), (FACE_RADIUS, FACE_RADIUS))], face, skin_tint);
    canvas.paint(&EYES_AND_MOUTH, face, [0.0; 3]);
    canvas.paint(look.before, face, [0.0; 3]);
    canvas
}
