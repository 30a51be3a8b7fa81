//! Checkpoints of the reward networks with random weights: the tensors, names and shapes of the published files, at any
//! size. Written from the descriptions of the files, independently of what reads them.

use std::{collections::BTreeMap, path::Path};

use rldiff::models::weights::save_safetensors;
use tch::{Device, Kind, Tensor};

/// Names and shapes in the order of a file.
pub type Shapes = Vec<(String, Vec<i64>)>;

/// Random tensors for `shapes`, the same for the same names whatever else there is: weights of LayerNorm and BatchNorm
/// around 1, variances positive, others small enough that signals neither vanish nor explode.
pub fn random(shapes: &Shapes, seed: u64) -> BTreeMap<String, Tensor> {
    let tensor = |name: &str, shape: &[i64]| {
        let hash =
            name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let count = shape.iter().product::<i64>() as usize;
        let mut state = hash | 1;
        let mut uniform = || {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..count).map(|_| uniform()).collect();
        let inputs = shape.iter().skip(1).product::<i64>().max(1) as f64;
        let values = Tensor::from_slice(&values).view(shape);
        match (name.ends_with("running_var"), shape.len()) {
            (true, _) => values * 0.3 + 1.0,
            (false, 1) if name.ends_with("weight") && is_norm(name) => values * 0.2 + 1.0,
            (false, 1) => values * 0.1,
            _ => values * (2.0 / inputs).sqrt(),
        }
    };
    shapes.iter().map(|(name, shape)| (name.clone(), tensor(name, shape))).collect()
}

fn is_norm(name: &str) -> bool {
    ["norm", "LayerNorm", "layrnorm", "ln_", ".bn0.", ".bn1."].iter().any(|part| name.contains(part))
}

pub fn save(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    save_safetensors(path, tensors, Kind::Float).unwrap();
}

struct List(Shapes);

impl List {
    fn one(&mut self, name: &str, shape: &[i64]) {
        self.0.push((name.to_string(), shape.to_vec()));
    }

    fn linear(&mut self, name: &str, outputs: i64, inputs: i64) {
        self.one(&format!("{name}.weight"), &[outputs, inputs]);
        self.one(&format!("{name}.bias"), &[outputs]);
    }

    fn norm(&mut self, name: &str, width: i64) {
        self.one(&format!("{name}.weight"), &[width]);
        self.one(&format!("{name}.bias"), &[width]);
    }

    fn batch_norm(&mut self, name: &str, width: i64) {
        for part in ["weight", "bias", "running_mean", "running_var"] {
            self.one(&format!("{name}.{part}"), &[width]);
        }
    }

    /// `shape` is outputs, inputs, side of the kernel.
    fn conv_norm(&mut self, name: &str, [outputs, inputs, kernel]: [i64; 3]) {
        self.one(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel]);
        self.batch_norm(&format!("{name}.norm"), outputs);
    }

    fn conv_bias(&mut self, name: &str, [outputs, inputs, kernel]: [i64; 3]) {
        self.one(&format!("{name}.weight"), &[outputs, inputs, kernel, kernel]);
        self.one(&format!("{name}.bias"), &[outputs]);
    }

    fn head(&mut self, prefix: &str, numbers: [i64; 5], widths: [i64; 5]) {
        let outputs = widths[1..].iter().copied().chain([1]);
        for ((number, inputs), outputs) in numbers.iter().zip(widths).zip(outputs) {
            self.linear(&format!("{prefix}layers.{number}"), outputs, inputs);
        }
    }
}

/// A transformer's sizes.
#[derive(Clone, Copy)]
pub struct Vit {
    pub width: i64,
    pub hidden: i64,
    pub depth: i64,
    pub patch: i64,
    /// Side of the picture in patches.
    pub grid: i64,
    /// CLIP's projection.
    pub outputs: i64,
}

pub const VIT_L_16: Vit = Vit { width: 1024, hidden: 4096, depth: 24, patch: 16, grid: 14, outputs: 256 };
pub const VIT_L_14: Vit = Vit { width: 1024, hidden: 4096, depth: 24, patch: 14, grid: 16, outputs: 768 };
pub const SMALL_BLIP: Vit = Vit { width: 128, hidden: 192, depth: 2, patch: 8, grid: 3, outputs: 32 };
pub const SMALL_CLIP: Vit = Vit { width: 128, hidden: 256, depth: 3, patch: 7, grid: 4, outputs: 24 };

/// BERT's sizes.
#[derive(Clone, Copy)]
pub struct Bert {
    pub vocabulary: i64,
    pub positions: i64,
    pub width: i64,
    pub hidden: i64,
    pub depth: i64,
}

pub const BERT_BASE: Bert = Bert { vocabulary: 30524, positions: 512, width: 768, hidden: 3072, depth: 12 };

/// `ImageReward.pt`.
pub fn image_reward(vit: Vit, bert: Bert, head: [i64; 5]) -> Shapes {
    let mut l = List(Vec::new());
    let v = "blip.visual_encoder";
    l.one(&format!("{v}.cls_token"), &[1, 1, vit.width]);
    l.one(&format!("{v}.pos_embed"), &[1, vit.grid * vit.grid + 1, vit.width]);
    l.one(&format!("{v}.patch_embed.proj.weight"), &[vit.width, 3, vit.patch, vit.patch]);
    l.one(&format!("{v}.patch_embed.proj.bias"), &[vit.width]);
    for i in 0..vit.depth {
        let b = format!("{v}.blocks.{i}");
        l.norm(&format!("{b}.norm1"), vit.width);
        l.linear(&format!("{b}.attn.qkv"), 3 * vit.width, vit.width);
        l.linear(&format!("{b}.attn.proj"), vit.width, vit.width);
        l.norm(&format!("{b}.norm2"), vit.width);
        l.linear(&format!("{b}.mlp.fc1"), vit.hidden, vit.width);
        l.linear(&format!("{b}.mlp.fc2"), vit.width, vit.hidden);
    }
    l.norm(&format!("{v}.norm"), vit.width);
    let t = "blip.text_encoder";
    l.one(&format!("{t}.embeddings.word_embeddings.weight"), &[bert.vocabulary, bert.width]);
    l.one(&format!("{t}.embeddings.position_embeddings.weight"), &[bert.positions, bert.width]);
    l.norm(&format!("{t}.embeddings.LayerNorm"), bert.width);
    for i in 0..bert.depth {
        let b = format!("{t}.encoder.layer.{i}");
        for (part, context) in [("attention", bert.width), ("crossattention", vit.width)] {
            l.linear(&format!("{b}.{part}.self.query"), bert.width, bert.width);
            l.linear(&format!("{b}.{part}.self.key"), bert.width, context);
            l.linear(&format!("{b}.{part}.self.value"), bert.width, context);
            l.linear(&format!("{b}.{part}.output.dense"), bert.width, bert.width);
            l.norm(&format!("{b}.{part}.output.LayerNorm"), bert.width);
        }
        l.linear(&format!("{b}.intermediate.dense"), bert.hidden, bert.width);
        l.linear(&format!("{b}.output.dense"), bert.width, bert.hidden);
        l.norm(&format!("{b}.output.LayerNorm"), bert.width);
    }
    l.linear("blip.vision_proj", vit.outputs, vit.width);
    l.linear("blip.text_proj", vit.outputs, bert.width);
    l.head("mlp.", [0, 2, 4, 6, 7], head);
    l.0
}

/// The vision half of Hugging Face's CLIP.
pub fn clip_hugging_face(vit: Vit) -> Shapes {
    let mut l = List(Vec::new());
    let v = "vision_model";
    l.one(&format!("{v}.embeddings.class_embedding"), &[vit.width]);
    l.one(&format!("{v}.embeddings.patch_embedding.weight"), &[vit.width, 3, vit.patch, vit.patch]);
    l.one(&format!("{v}.embeddings.position_embedding.weight"), &[vit.grid * vit.grid + 1, vit.width]);
    l.norm(&format!("{v}.pre_layrnorm"), vit.width);
    for i in 0..vit.depth {
        let b = format!("{v}.encoder.layers.{i}");
        for part in ["q", "k", "v", "out"] {
            l.linear(&format!("{b}.self_attn.{part}_proj"), vit.width, vit.width);
        }
        l.norm(&format!("{b}.layer_norm1"), vit.width);
        l.linear(&format!("{b}.mlp.fc1"), vit.hidden, vit.width);
        l.linear(&format!("{b}.mlp.fc2"), vit.width, vit.hidden);
        l.norm(&format!("{b}.layer_norm2"), vit.width);
    }
    l.norm(&format!("{v}.post_layernorm"), vit.width);
    l.one("visual_projection.weight", &[vit.outputs, vit.width]);
    l.0
}

/// Sizes of CLIP's text tower.
#[derive(Clone, Copy)]
pub struct ClipText {
    pub width: i64,
    pub hidden: i64,
    pub depth: i64,
    pub vocabulary: i64,
}

pub const VIT_H_14: Vit = Vit { width: 1280, hidden: 5120, depth: 32, patch: 14, grid: 16, outputs: 1024 };
pub const VIT_H_TEXT: ClipText = ClipText { width: 1024, hidden: 4096, depth: 24, vocabulary: 49408 };
pub const VIT_L_TEXT: ClipText = ClipText { width: 768, hidden: 3072, depth: 12, vocabulary: 49408 };

/// The whole of Hugging Face's CLIP, without its buffers of positions.
pub fn clip_with_text(vit: Vit, text: ClipText) -> Shapes {
    let mut l = List(clip_hugging_face(vit));
    let t = "text_model";
    l.one(&format!("{t}.embeddings.token_embedding.weight"), &[text.vocabulary, text.width]);
    l.one(&format!("{t}.embeddings.position_embedding.weight"), &[77, text.width]);
    for i in 0..text.depth {
        let b = format!("{t}.encoder.layers.{i}");
        for part in ["q", "k", "v", "out"] {
            l.linear(&format!("{b}.self_attn.{part}_proj"), text.width, text.width);
        }
        l.norm(&format!("{b}.layer_norm1"), text.width);
        l.linear(&format!("{b}.mlp.fc1"), text.hidden, text.width);
        l.linear(&format!("{b}.mlp.fc2"), text.width, text.hidden);
        l.norm(&format!("{b}.layer_norm2"), text.width);
    }
    l.norm(&format!("{t}.final_layer_norm"), text.width);
    l.one("text_projection.weight", &[vit.outputs, text.width]);
    l.one("logit_scale", &[]);
    l.0
}

/// A CLIP in open_clip's (and OpenAI's) layout with Hugging Face's names.
pub fn clip_from_open_clip(tensors: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let mut out = BTreeMap::new();
    for (name, tensor) in tensors {
        let tensor = tensor.shallow_clone();
        let (block, in_vision) = match name.strip_prefix("visual.transformer.resblocks.") {
            Some(rest) => (Some(rest), true),
            None => (name.strip_prefix("transformer.resblocks."), false),
        };
        let model = if in_vision { "vision_model" } else { "text_model" };
        if let Some((number, part)) = block.and_then(|rest| rest.split_once('.')) {
            let at = format!("{model}.encoder.layers.{number}");
            if let Some(kind) = part.strip_prefix("attn.in_proj_") {
                for (letter, rows) in ["q", "k", "v"].into_iter().zip(tensor.chunk(3, 0)) {
                    out.insert(format!("{at}.self_attn.{letter}_proj.{kind}"), rows.copy());
                }
                continue;
            }
            let part = part.replace("ln_1", "layer_norm1").replace("ln_2", "layer_norm2");
            let part = part.replace("attn.out_proj", "self_attn.out_proj");
            out.insert(format!("{at}.{}", part.replace("c_fc", "fc1").replace("c_proj", "fc2")), tensor);
            continue;
        }
        let (new, turned) = match name.as_str() {
            "visual.class_embedding" => ("vision_model.embeddings.class_embedding", false),
            "visual.positional_embedding" => ("vision_model.embeddings.position_embedding.weight", false),
            "visual.conv1.weight" => ("vision_model.embeddings.patch_embedding.weight", false),
            "visual.ln_pre.weight" => ("vision_model.pre_layrnorm.weight", false),
            "visual.ln_pre.bias" => ("vision_model.pre_layrnorm.bias", false),
            "visual.ln_post.weight" => ("vision_model.post_layernorm.weight", false),
            "visual.ln_post.bias" => ("vision_model.post_layernorm.bias", false),
            "visual.proj" => ("visual_projection.weight", true),
            "token_embedding.weight" => ("text_model.embeddings.token_embedding.weight", false),
            "positional_embedding" => ("text_model.embeddings.position_embedding.weight", false),
            "ln_final.weight" => ("text_model.final_layer_norm.weight", false),
            "ln_final.bias" => ("text_model.final_layer_norm.bias", false),
            "text_projection" => ("text_projection.weight", true),
            "logit_scale" => ("logit_scale", false),
            other => panic!("{other}: not of open_clip's layout"),
        };
        out.insert(new.to_string(), if turned { tensor.tr().contiguous() } else { tensor });
    }
    out
}

/// The aesthetic predictor's head on CLIP's embedding.
pub fn aesthetic_head(inputs: i64, relu: bool) -> Shapes {
    let mut l = List(Vec::new());
    let widths = if inputs == 768 { [768, 1024, 128, 64, 16] } else { [inputs, 40, 20, 10, 5] };
    l.head("", if relu { [0, 3, 6, 9, 11] } else { [0, 2, 4, 6, 7] }, widths);
    l.0
}

/// A small WordPiece vocabulary; BLIP adds two tokens to it.
pub fn vocabulary() -> Vec<String> {
    let words = "[PAD] [UNK] [CLS] [SEP] [MASK] a an the of and with next to near on side beside portrait kite book \
                 apple nurse ocean painting cloud ##s , . ' !";
    words.split_whitespace().map(String::from).collect()
}

/// Sizes for `vocabulary()`.
pub fn small_bert() -> Bert {
    Bert { vocabulary: vocabulary().len() as i64 + 2, positions: 40, width: 64, hidden: 96, depth: 2 }
}

/// A small ImageReward and its vocabulary in `folder`: `image_reward.safetensors`, `vocab.txt`.
pub fn write_image_reward(folder: &Path, seed: u64) {
    let shapes = image_reward(SMALL_BLIP, small_bert(), [64, 48, 24, 12, 6]);
    save(&folder.join("image_reward.safetensors"), &random(&shapes, seed));
    std::fs::write(folder.join("vocab.txt"), vocabulary().join("\n") + "\n").unwrap();
}

/// A small CLIP and head in `folder`: `clip.safetensors`, `head.safetensors`.
pub fn write_aesthetic(folder: &Path, seed: u64) {
    save(&folder.join("clip.safetensors"), &random(&clip_hugging_face(SMALL_CLIP), seed));
    save(&folder.join("head.safetensors"), &random(&aesthetic_head(SMALL_CLIP.outputs, false), seed));
}

/// UniDet's sizes.
#[derive(Clone)]
pub struct Detector {
    /// ResNeSt-200's layout instead of ResNet-50's.
    pub split: bool,
    pub stem: [i64; 2],
    /// Blocks, channels inside and after a block of res2 to res5.
    pub stages: [[i64; 3]; 4],
    pub pyramid: i64,
    pub head_convs: i64,
    pub linears: Vec<i64>,
    pub classes: i64,
}

pub fn unidet_r50() -> Detector {
    let stages = [[3, 64, 256], [4, 128, 512], [6, 256, 1024], [3, 512, 2048]];
    Detector {
        split: false,
        stem: [64, 64],
        stages,
        pyramid: 256,
        head_convs: 0,
        linears: vec![1024, 1024],
        classes: 722,
    }
}

pub fn unidet_rs200() -> Detector {
    let stages = [[3, 64, 256], [24, 128, 512], [36, 256, 1024], [3, 512, 2048]];
    Detector { split: true, stem: [64, 128], stages, pyramid: 256, head_convs: 4, linears: vec![1024], classes: 722 }
}

pub fn small_unidet(split: bool) -> Detector {
    let stages = [[1, 4, 10], [2, 4, 12], [1, 8, 16], [2, 8, 24]];
    let (head_convs, linears) = if split { (2, vec![24]) } else { (0, vec![32, 24]) };
    Detector { split, stem: [6, 8], stages, pyramid: 16, head_convs, linears, classes: 722 }
}

/// UniDet's checkpoints.
pub fn unidet(d: &Detector) -> Shapes {
    let mut l = List(Vec::new());
    let b = "backbone.bottom_up";
    match d.split {
        false => l.conv_norm(&format!("{b}.stem.conv1"), [d.stem[1], 3, 7]),
        true => {
            l.conv_norm(&format!("{b}.stem.conv1_1"), [d.stem[0], 3, 3]);
            l.conv_norm(&format!("{b}.stem.conv1_2"), [d.stem[0], d.stem[0], 3]);
            l.conv_norm(&format!("{b}.stem.conv1_3"), [d.stem[1], d.stem[0], 3]);
        }
    }
    let mut inputs = d.stem[1];
    for (i, [blocks, inner, outputs]) in d.stages.into_iter().enumerate() {
        for number in 0..blocks {
            let at = format!("{b}.res{}.{number}", i + 2);
            if number == 0 {
                l.conv_norm(&format!("{at}.shortcut"), [outputs, inputs, 1]);
            }
            l.conv_norm(&format!("{at}.conv1"), [inner, inputs, 1]);
            if d.split {
                let small = (inner / 2).max(32);
                l.one(&format!("{at}.conv2.conv.weight"), &[2 * inner, inner / 2, 3, 3]);
                l.batch_norm(&format!("{at}.conv2.bn0"), 2 * inner);
                l.conv_bias(&format!("{at}.conv2.fc1"), [small, inner, 1]);
                l.batch_norm(&format!("{at}.conv2.bn1"), small);
                l.conv_bias(&format!("{at}.conv2.fc2"), [2 * inner, small, 1]);
            } else {
                l.conv_norm(&format!("{at}.conv2"), [inner, inner, 3]);
            }
            l.conv_norm(&format!("{at}.conv3"), [outputs, inner, 1]);
            inputs = outputs;
        }
    }
    let p = d.pyramid;
    for level in 3..6 {
        for (part, shape) in [("lateral", [p, d.stages[level - 2][2], 1]), ("output", [p, p, 3])] {
            let name = format!("backbone.fpn_{part}{level}");
            if d.split {
                l.conv_norm(&name, shape);
            } else {
                l.conv_bias(&name, shape);
            }
        }
    }
    for top in ["p6", "p7"] {
        l.conv_bias(&format!("backbone.top_block.{top}"), [p, p, 3]);
    }
    let rpn = "proposal_generator.rpn_head";
    l.conv_bias(&format!("{rpn}.conv"), [p, p, 3]);
    l.conv_bias(&format!("{rpn}.objectness_logits"), [9, p, 1]);
    l.conv_bias(&format!("{rpn}.anchor_deltas"), [36, p, 1]);
    for level in 0..5 {
        l.one(&format!("proposal_generator.anchor_generator.cell_anchors.{level}"), &[9, 4]);
    }
    for stage in 0..3 {
        let head = format!("roi_heads.box_head.{stage}");
        for i in 0..d.head_convs {
            l.conv_norm(&format!("{head}.conv{}", i + 1), [p, p, 3]);
        }
        let mut inputs = p * 49;
        for (i, &outputs) in d.linears.iter().enumerate() {
            l.linear(&format!("{head}.fc{}", i + 1), outputs, inputs);
            inputs = outputs;
        }
        l.linear(&format!("roi_heads.box_predictor.{stage}.cls_score"), d.classes + 1, inputs);
        l.linear(&format!("roi_heads.box_predictor.{stage}.bbox_pred"), 4, inputs);
    }
    l.one("pixel_mean", &[3, 1, 1]);
    l.one("pixel_std", &[3, 1, 1]);
    l.0
}

/// A label space of 722 classes in UniDet's form, the paper's objects among them.
pub fn label_space() -> String {
    let name = |object: &String| match object.split_once(", ") {
        Some((first, second)) => format!("{first}_{second}_"),
        None => format!("_{object}_"),
    };
    let mut names: Vec<String> = rldiff::prompts::paper::objects().iter().map(name).collect();
    names.extend((names.len()..722).map(|i| format!("other {i}__")));
    let categories: Vec<_> =
        names.iter().enumerate().map(|(id, name)| serde_json::json!({"id": id, "name": name})).collect();
    serde_json::json!({"categories": categories, "label_map": {}}).to_string()
}

/// A small UniDet and its label space in `folder`: `unidet.safetensors`, `labels.json`.
pub fn write_unidet(folder: &Path, split: bool, seed: u64) {
    let mut tensors = random(&unidet(&small_unidet(split)), seed);
    for (name, tensor) in &mut tensors {
        // confidences that spread over 0..1, boxes that move by a part of their size, ResNet's input of 0..255
        let factor = match name.as_str() {
            name if name.contains("cls_score.weight") => 12.0,
            name if name.contains("anchor_deltas") => 0.3,
            "backbone.bottom_up.stem.conv1.weight" => 0.01,
            _ => continue,
        };
        *tensor = &*tensor * factor;
    }
    save(&folder.join("unidet.safetensors"), &tensors);
    std::fs::write(folder.join("labels.json"), label_space()).unwrap();
}

/// Pictures f32 `[n, 3, height, width]` with values of whole grey levels: soft blobs of colour, each another.
pub fn pictures(n: i64, height: i64, width: i64) -> Tensor {
    let axis = |length: i64| Tensor::arange(length, (Kind::Float, Device::Cpu)) / length as f64;
    let (y, x) = (axis(height).view([1, 1, -1, 1]), axis(width).view([1, 1, 1, -1]));
    let phase = Tensor::arange(3 * n, (Kind::Float, Device::Cpu)).view([n, 3, 1, 1]);
    let wave = ((&x * 9.0 + &phase * 1.7).sin() * (&y * 7.0 - &phase * 0.6).cos()) * 0.45 + 0.5;
    let steps = ((x * 6.0).floor() + (y * 5.0).floor() + phase).remainder(2.0) * 0.08 - 0.04;
    ((wave + steps).clamp(0.0, 1.0) * 255.0).round() / 255.0
}
