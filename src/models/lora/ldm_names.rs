//! The U-Net's layers by the names of the original code (LDM, sgm), which some trainers write: `input_blocks_4_1_…` for
//! `down_blocks_1_attentions_0_…`.
//!
//! ```text
//! input_blocks.0.0   conv_in          input_blocks.N.0, N.1     resnet and attention of a level's layers, then its
//! time_embed.0, .2   the time MLP     input_blocks.N.0.op       downsampler
//! middle_block.0, 1, 2                resnet, attention, resnet
//! output_blocks.N.0, N.1              resnet and attention; the level's upsampler comes behind them in its last N
//! out.0, out.2       conv_norm_out, conv_out
//! ```

use std::collections::BTreeMap;

/// Parts of a resnet, by diffusers' name.
const RESNET: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];

const OUTER: [(&str, &str); 5] = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];

/// Sizes of one side of the U-Net.
#[derive(Default)]
struct Side {
    /// Resnets of each level.
    resnets: Vec<usize>,
    /// Whether a level has attention.
    attention: Vec<bool>,
}

impl Side {
    fn of<'a>(paths: impl Iterator<Item = &'a String>, side: &str) -> Side {
        let mut found = Side::default();
        for path in paths {
            let Some((level, kind, layer, _)) = parts(path, side) else { continue };
            // strange names must not ask for memory
            if level >= 64 || layer >= 64 {
                continue;
            }
            if found.resnets.len() <= level {
                found.resnets.resize(level + 1, 0);
                found.attention.resize(level + 1, false);
            }
            match kind {
                "resnets" => found.resnets[level] = found.resnets[level].max(layer + 1),
                "attentions" => found.attention[level] = true,
                _ => {}
            }
        }
        found
    }

    /// Resnets of the levels before `level`.
    fn before(&self, level: usize) -> usize {
        self.resnets.iter().take(level).sum()
    }
}

/// `side.LEVEL.KIND.LAYER.rest`
fn parts<'a>(path: &'a str, side: &str) -> Option<(usize, &'a str, usize, &'a str)> {
    let mut words = path.strip_prefix(side)?.strip_prefix('.')?.splitn(4, '.');
    let level = words.next()?.parse().ok()?;
    let kind = words.next()?;
    let layer = words.next()?.parse().ok()?;
    Some((level, kind, layer, words.next()?))
}

/// The original name of every layer that has one → its path in diffusers.
pub fn layers<'a>(paths: impl Iterator<Item = &'a String> + Clone) -> BTreeMap<String, String> {
    let down = Side::of(paths.clone(), "down_blocks");
    let up = Side::of(paths.clone(), "up_blocks");
    let name = |path: &str| -> Option<String> {
        if let Some((_, ldm)) = OUTER.iter().find(|(ours, _)| *ours == path) {
            return Some(ldm.to_string());
        }
        let of_resnet = |rest: &str| RESNET.iter().find(|(ours, _)| *ours == rest).map(|(_, ldm)| *ldm);
        if let Some((level, kind, layer, rest)) = parts(path, "down_blocks") {
            let first = 1 + down.before(level) + level;
            return match kind {
                "resnets" => Some(format!("input_blocks.{}.0.{}", first + layer, of_resnet(rest)?)),
                "attentions" => Some(format!("input_blocks.{}.1.{rest}", first + layer)),
                "downsamplers" => Some(format!("input_blocks.{}.0.op", first + down.resnets.get(level)?)),
                _ => None,
            };
        }
        if let Some((level, kind, layer, rest)) = parts(path, "up_blocks") {
            let first = up.before(level);
            return match kind {
                "resnets" => Some(format!("output_blocks.{}.0.{}", first + layer, of_resnet(rest)?)),
                "attentions" => Some(format!("output_blocks.{}.1.{rest}", first + layer)),
                "upsamplers" => {
                    let (last, place) =
                        (first + up.resnets.get(level)? - 1, 1 + usize::from(*up.attention.get(level)?));
                    Some(format!("output_blocks.{last}.{place}.conv"))
                }
                _ => None,
            };
        }
        let (kind, rest) = path.strip_prefix("mid_block.")?.split_once('.')?;
        let (layer, rest) = rest.split_once('.')?;
        match (kind, layer) {
            ("resnets", "0") => Some(format!("middle_block.0.{}", of_resnet(rest)?)),
            ("attentions", "0") => Some(format!("middle_block.1.{rest}")),
            ("resnets", "1") => Some(format!("middle_block.2.{}", of_resnet(rest)?)),
            _ => None,
        }
    };
    paths.filter_map(|path| Some((name(path)?, path.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_layers_are_counted_as_the_original_code_does() {
        let mut paths = vec!["conv_in".to_string(), "mid_block.attentions.0.proj_in".into()];
        for (level, attention) in [(0, true), (1, false)] {
            for layer in 0..2 {
                paths.push(format!("down_blocks.{level}.resnets.{layer}.conv1"));
                paths.extend(attention.then(|| format!("down_blocks.{level}.attentions.{layer}.proj_in")));
            }
        }
        paths.push("down_blocks.0.downsamplers.0.conv".into());
        for (level, attention) in [(0, false), (1, true)] {
            for layer in 0..3 {
                paths.push(format!("up_blocks.{level}.resnets.{layer}.conv_shortcut"));
                paths.extend(attention.then(|| format!("up_blocks.{level}.attentions.{layer}.proj_out")));
            }
        }
        paths.push("up_blocks.0.upsamplers.0.conv".into());
        let layers = layers(paths.iter());
        for (ldm, path) in [
            ("input_blocks.0.0", "conv_in"),
            ("input_blocks.2.1.proj_in", "down_blocks.0.attentions.1.proj_in"),
            ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
            ("input_blocks.4.0.in_layers.2", "down_blocks.1.resnets.0.conv1"),
            ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
            ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
            ("output_blocks.3.0.skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
            ("output_blocks.5.1.proj_out", "up_blocks.1.attentions.2.proj_out"),
        ] {
            assert_eq!(layers.get(ldm).map(String::as_str), Some(path), "{ldm}");
        }
        assert_eq!(layers.len(), paths.len());
    }
}
