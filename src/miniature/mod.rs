//! The embedded world: procedural 32×32 pictures with captions, small enough to train a whole diffusion model on in
//! minutes, with the defects of the paper's three tasks built in so that there is something to repair.
//!
//! | pictures | caption | defect |
//! |---|---|---|
//! | pairs | "a carrot next to a book" | the second object is often missing |
//! | portraits | "a portrait of a nurse" | half of the faces have the lightest of four skin tones |
//! | places | "an apple in snow" | half of the pictures are washed out |
//! | singles | "a kite" | none |
//!
//! The object and occupation names occur in the paper's Tables 8 and 7. A scene is a pure function of
//! (seed, index), see [`scene::draw`].

pub mod blueprint;
pub mod bpe;
pub mod captions;
mod embedded;
pub mod objects;
pub mod places;
pub mod portraits;
pub mod pretrain;
pub mod prompts;
pub mod raster;
pub mod scene;

pub use embedded::EMBEDDED_MODEL;
