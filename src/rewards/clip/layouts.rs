//! CLIP from either published layout (Hugging Face's, or OpenAI's, which is open_clip's too): the picture tower with the
//! names of [`crate::rewards::vision_transformer`], the text tower with those of [`crate::models::text_encoder`].

use anyhow::{ensure, Context, Result};
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

/// Names of OpenAI's text tower and of ours.
const OPENAI_TEXT: [(&str, &str); 4] = [
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
];
const OPENAI_TEXT_BLOCK: [(&str, &str); 5] = [
    ("ln_1", "layer_norm1"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
];

/// The text tower's tensors under canonical names, `text_projection` as `[outputs, width]`. In ViT-H it is square, so that the
/// layout alone tells which side is which.
///
/// # Errors
/// No text tower, or tensors of it that are missing: the first few are named as the file would.
pub fn canonical_text(mut checkpoint: Checkpoint) -> Result<Checkpoint> {
    let hugging_face = checkpoint.tensors.keys().any(|name| name.starts_with("text_model."));
    if hugging_face || checkpoint.has("text_projection.weight") {
        let needed = ["text_projection.weight", "text_model.embeddings.token_embedding.weight"].map(String::from);
        checkpoint.ensure_all(needed.iter())?;
        let projection = checkpoint.tensors.remove("text_projection.weight");
        checkpoint.tensors.extend(projection.map(|tensor| ("text_projection".to_string(), tensor)));
        return Ok(checkpoint);
    }
    ensure!(
        checkpoint.has("token_embedding.weight") || checkpoint.has("text_projection"),
        "{}: neither text_projection.weight nor token_embedding.weight is there: no CLIP model with a text tower",
        checkpoint.path
    );
    let mut names: Vec<(String, String)> = OPENAI_TEXT.map(|(from, to)| (from.to_string(), to.to_string())).to_vec();
    let (mut fused, depth) = (Vec::new(), checkpoint.blocks("transformer.resblocks"));
    for block in 0..depth {
        let (from, to) = (format!("transformer.resblocks.{block}"), format!("text_model.encoder.layers.{block}"));
        for kind in ["weight", "bias"] {
            let own = OPENAI_TEXT_BLOCK.iter();
            names.extend(own.map(|(own, ours)| (format!("{from}.{own}.{kind}"), format!("{to}.{ours}.{kind}"))));
            fused.push((format!("{from}.attn.in_proj_{kind}"), to.clone(), kind));
        }
    }
    let projection = "text_projection".to_string();
    let all = names.iter().map(|(from, _)| from).chain(fused.iter().map(|(from, ..)| from)).chain([&projection]);
    checkpoint.ensure_all(all)?;
    for (from, to) in names {
        let tensor = checkpoint.tensors.remove(&from);
        checkpoint.tensors.extend(tensor.map(|tensor| (to, tensor)));
    }
    for (from, to, kind) in fused {
        let Some(tensor) = checkpoint.tensors.remove(&from) else { continue };
        let rows = tensor.size().first().copied().unwrap_or_default();
        ensure!(
            rows > 0 && rows % 3 == 0,
            "{}: tensor {from} has {rows} rows, three parts are wanted",
            checkpoint.path
        );
        for (part, rows) in ["q", "k", "v"].into_iter().zip(tensor.chunk(3, 0)) {
            checkpoint.tensors.insert(format!("{to}.self_attn.{part}_proj.{kind}"), rows.contiguous());
        }
    }
    let [_, _] = checkpoint.shape(&projection)?;
    let turned = checkpoint.tensors[&projection].tr().contiguous();
    checkpoint.tensors.insert(projection, turned);
    Ok(checkpoint)
}

/// What neither tower needs: buffers, and what OpenAI's archive says of itself.
pub fn ignored_by_both(name: &str) -> bool {
    let rest = ["logit_scale", "input_resolution", "context_length", "vocab_size"];
    rest.contains(&name) || name.ends_with(".position_ids")
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
