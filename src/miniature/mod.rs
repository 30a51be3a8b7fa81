//! The embedded world: procedural 32×32 pictures with captions, small enough to train a whole diffusion model on in
//! minutes, with the defects of the paper's three tasks built in so that there is something to repair.
//!
//! | pictures | caption | defect | editions |
//! |---|---|---|---|
//! | pairs | "a carrot next to a book" | the second object is often missing | 1, 2 |
//! | portraits | "a portrait of a nurse" | half of the faces have the lightest of four skin tones | 1, 2 |
//! | places | "an apple in snow" | half of the pictures are washed out | 1, 2 |
//! | singles | "a kite" | none | 1, 2 |
//! | people | "a woman in a red shirt with a cap" | as portraits | 2 |
//! | workers | "a baker with a ball" | as portraits | 2 |
//! | pairs in places | "an apple and a book at sunset" | as places | 2 |
//!
//! The object and occupation names occur in the paper's Tables 8 and 7. A scene is a pure function of
//! (edition, seed, index), see [`scene::draw`].

pub mod blueprint;
pub mod bpe;
pub mod captions;
mod edition;
mod embedded;
pub mod objects;
pub mod people;
pub mod places;
pub mod portraits;
pub mod pretrain;
pub mod prompts;
pub mod raster;
pub mod scene;

pub use edition::Edition;
pub use embedded::{EMBEDDED_MODEL, MINIATURE_MODEL};
