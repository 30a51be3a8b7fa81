//! CLIP's picture tower from either published layout, with the names of [`crate::rewards::vision_transformer`].

use anyhow::{Context, Result};
use tch::Tensor;

use crate::rewards::weights::Checkpoint;

/// Where a layout keeps what.
struct Layout {
    singles: [(&'static str, &'static str); 8],
    blocks: &'static str,
    in_block: &'static [(&'static str, &'static str)],
    projection: &'static str,
    /// The projection is `[width, outputs]`, to be multiplied from the left.
    transposed: bool,
}

const HUGGING_FACE: Layout = Layout {
    singles: [
        ("vision_model.embeddings.class_embedding", "cls_token"),
        ("vision_model.embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        ("vision_model.embeddings.position_embedding.weight", "pos_embed"),
        // spelled so in the files
        ("vision_model.pre_layrnorm.weight", "norm_pre.weight"),
        ("vision_model.pre_layrnorm.bias", "norm_pre.bias"),
        ("vision_model.post_layernorm.weight", "norm.weight"),
        ("vision_model.post_layernorm.bias", "norm.bias"),
        ("visual_projection.weight", "projection"),
    ],
    blocks: "vision_model.encoder.layers",
    in_block: &[
        ("layer_norm1", "norm1"),
        ("self_attn.out_proj", "attn.proj"),
        ("layer_norm2", "norm2"),
        ("mlp.fc1", "mlp.fc1"),
        ("mlp.fc2", "mlp.fc2"),
    ],
    projection: "visual_projection.weight",
    transposed: false,
};

const OPENAI: Layout = Layout {
    singles: [
        ("visual.class_embedding", "cls_token"),
        ("visual.conv1.weight", "patch_embed.proj.weight"),
        ("visual.positional_embedding", "pos_embed"),
        ("visual.ln_pre.weight", "norm_pre.weight"),
        ("visual.ln_pre.bias", "norm_pre.bias"),
        ("visual.ln_post.weight", "norm.weight"),
        ("visual.ln_post.bias", "norm.bias"),
        ("visual.proj", "projection"),
    ],
    blocks: "visual.transformer.resblocks",
    in_block: &[
        ("ln_1", "norm1"),
        ("attn.out_proj", "attn.proj"),
        ("ln_2", "norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ],
    projection: "visual.proj",
    transposed: true,
};

/// The picture tower's tensors under canonical names, `projection` as `[outputs, width]`; what else the file holds (the
/// text tower, a predictor's head) keeps its name.
///
/// # Errors
/// Neither layout, or tensors of it that are missing: the first few are named as the file would.
pub fn canonical(mut checkpoint: Checkpoint) -> Result<Checkpoint> {
    let layout = [HUGGING_FACE, OPENAI].into_iter().find(|layout| checkpoint.has(layout.projection));
    let layout = layout.with_context(|| {
        let [hf, openai] = [HUGGING_FACE.projection, OPENAI.projection];
        format!("{}: neither {hf} nor {openai} is there: no CLIP model with a picture tower", checkpoint.path)
    })?;
    let names = renames(&layout, checkpoint.blocks(layout.blocks));
    checkpoint.ensure_all(names.iter().flat_map(|(from, _)| from))?;
    for (from, to) in &names {
        let parts: Vec<Tensor> = from.iter().filter_map(|name| checkpoint.tensors.remove(name)).collect();
        let tensor = match parts.as_slice() {
            [one] => one.shallow_clone(),
            several => {
                Tensor::f_cat(several, 0).with_context(|| format!("{}: {}", checkpoint.path, from.join(", ")))?
            }
        };
        checkpoint.tensors.insert(to.clone(), tensor);
    }
    // BLIP's file has leading dimensions of 1
    let [width] = checkpoint.shape("cls_token")?;
    let [tokens, _] = checkpoint.shape("pos_embed")?;
    for (name, shape) in [("cls_token", [1, 1, width]), ("pos_embed", [1, tokens, width])] {
        let viewed = checkpoint.tensors[name].f_view(shape);
        let viewed = viewed.with_context(|| format!("{}: {name} is not of width {width}", checkpoint.path))?;
        checkpoint.tensors.insert(name.to_string(), viewed);
    }
    let [_, _] = checkpoint.shape("projection")?;
    if layout.transposed {
        let turned = checkpoint.tensors["projection"].tr().contiguous();
        checkpoint.tensors.insert("projection".to_string(), turned);
    }
    Ok(checkpoint)
}

/// What no picture needs: the text tower and buffers.
pub fn ignored(name: &str) -> bool {
    let text = ["text_model.", "text_projection", "transformer.", "token_embedding.", "ln_final."];
    let rest = ["positional_embedding", "logit_scale", "input_resolution", "context_length", "vocab_size"];
    text.iter().any(|part| name.starts_with(part)) || rest.contains(&name) || name.ends_with(".position_ids")
}

/// (names in the file, canonical name); several names are rows of one tensor.
fn renames(layout: &Layout, depth: i64) -> Vec<(Vec<String>, String)> {
    let mut names: Vec<(Vec<String>, String)> =
        layout.singles.iter().map(|(from, to)| (vec![from.to_string()], to.to_string())).collect();
    for block in 0..depth {
        let (from, to) = (format!("{}.{block}", layout.blocks), format!("blocks.{block}"));
        for kind in ["weight", "bias"] {
            for (own, canonical) in layout.in_block {
                names.push((vec![format!("{from}.{own}.{kind}")], format!("{to}.{canonical}.{kind}")));
            }
            let queries_keys_values = match layout.transposed {
                true => vec![format!("{from}.attn.in_proj_{kind}")],
                false => ["q", "k", "v"].map(|part| format!("{from}.self_attn.{part}_proj.{kind}")).to_vec(),
            };
            names.push((queries_keys_values, format!("{to}.attn.qkv.{kind}")));
        }
    }
    names
}
