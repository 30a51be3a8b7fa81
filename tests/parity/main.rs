//! Everything from the tokenizer to AdamW against numbers made with diffusers: a folder with `MANIFEST.json`,
//! `TOLERANCES.json`, tiny pipelines `<variant>-tiny/` and reference tensors `goldens/<variant>/*.safetensors`, named
//! by RLDIFF_GOLDENS. `make parity GOLDENS=DIR` prints one line per tensor. With `GOLDENS2=DIR` (RLDIFF_GOLDENS2) it
//! takes in a second set's adapters, `lora/sd2.*` and `goldens/lora/sd2.safetensors`.
//! A set of the rewards on CLIP (with `goldens/pictures.json`) is compared in `rewards.rs`; where RLDIFF_GOLDENS names none, the
//! part of one in `tests/data/rewards` is.
//!
//! A tensor passes if its largest error or its relative L2 error is within the tolerance of its name, ten times what
//! PyTorch's own f32 run is off. A reference tensor that nothing here compares is a failure too, but for the kinds
//! that `goldens::NOT_COMPARED` lists.

mod adapters;
mod goldens;
mod networks;
mod rewards;
mod updates;
