//! The families of models, and how pictures of each are usually drawn.

use std::fs;

use serde_json::Value;

use crate::{miniature::EMBEDDED_MODEL, models::folder::ModelLocation};

/// A kind of model that is drawn with the same settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// 50 DDIM steps and guidance 7, as in the paper's evaluations (Appendix A), and η = 0, DDIM's own.
    StableDiffusion,
    /// The steps, the guidance and the η of its experiments.
    Miniature,
}

/// What tells the miniature's U-Net from others, in `unet/config.json`: the size of its latents, its widths, and the
/// width of its texts. No published model of these sizes is known.
const MARKS: [&str; 3] = ["sample_size", "block_out_channels", "cross_attention_dim"];

impl Family {
    /// By the config of its U-Net, which a training leaves as it is; where that cannot be read no picture will be drawn.
    pub fn of(location: &ModelLocation) -> Self {
        let own = unet_config(&ModelLocation::Embedded(EMBEDDED_MODEL)).expect("the embedded model has a U-Net");
        match unet_config(location) {
            Some(config) if MARKS.iter().all(|key| config[key] == own[key]) => Family::Miniature,
            _ => Family::StableDiffusion,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Family::StableDiffusion => "Stable Diffusion",
            Family::Miniature => "the miniature",
        }
    }

    /// DDIM steps.
    pub fn steps(self) -> usize {
        match self {
            Family::StableDiffusion => 50,
            Family::Miniature => 6,
        }
    }

    /// Guidance scale g.
    pub fn guidance(self) -> f64 {
        match self {
            Family::StableDiffusion => 7.0,
            Family::Miniature => 3.0,
        }
    }

    /// Noise η of the transitions.
    pub fn eta(self) -> f64 {
        match self {
            Family::StableDiffusion => 0.0,
            Family::Miniature => 1.0,
        }
    }
}

fn unet_config(location: &ModelLocation) -> Option<Value> {
    const FILE: &str = "unet/config.json";
    match location {
        ModelLocation::Embedded(files) => {
            let (_, bytes) = files.iter().find(|(path, _)| *path == FILE)?;
            serde_json::from_slice(bytes).ok()
        }
        ModelLocation::Disk(folder) => serde_json::from_slice(&fs::read(folder.join(FILE)).ok()?).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        miniature::{self, Edition},
        models::architectures::Architecture,
    };

    #[test]
    fn the_miniature_is_known_by_its_u_net() {
        assert_eq!(Family::of(&ModelLocation::Embedded(EMBEDDED_MODEL)), Family::Miniature);
        let folder = tempfile::tempdir().unwrap();
        let of = |config: &[u8]| {
            fs::create_dir_all(folder.path().join("unet")).unwrap();
            fs::write(folder.path().join("unet/config.json"), config).unwrap();
            Family::of(&ModelLocation::Disk(folder.path().to_path_buf()))
        };
        let own = miniature::blueprint::files(Edition::Second).texts["unet/config.json"].clone();
        assert_eq!(of(&own), Family::Miniature);
        let published = Architecture::Sd2Base.files().texts["unet/config.json"].clone();
        assert_eq!(of(&published), Family::StableDiffusion);
        assert_eq!(of(b"no JSON"), Family::StableDiffusion);
    }
}
