//! The paper's human evaluation: pages on which people compare models without knowing which is which (Fig. 23 and 26),
//! and the count of their answers (Fig. 2).
//!
//! ```text
//! models, prompts ─► study (which model is left, which right) ─► pictures, pages ─► a browser ─► votes-*.json
//!                      │                                                                             │
//!                      └───────────────── study.json, kept by whoever runs it ─► votes ─► tally ◄────┘
//! ```
//! What raters get holds no model's name; the side of each model is in `study.json` only. Everyone gets all queries, or the
//! queries are shared out ([`assignment`], [`places`]).

pub mod agreement;
pub mod assignment;
mod example_pictures;
pub mod guidelines;
pub mod interval;
pub mod pages;
pub mod places;
pub mod prompts;
pub mod questions;
pub mod rank;
pub mod study;
pub mod tally;
mod tally_text;
pub mod votes;
