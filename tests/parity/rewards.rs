//! The rewards on CLIP against numbers made with transformers, open_clip and torchvision: pictures, prompts, features, scores
//! and gradients. The folder is RLDIFF_GOLDENS where that is a set of rewards, else the part of one in `tests/data/rewards`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use rldiff::{
    config::{Middle, Resizing, RewardConfig},
    models::{
        folder::{ModelFiles, ModelLocation},
        tokenizer::{TextRules, Tokenizer},
    },
    prompts::Prompt,
    rewards::{
        clip::{towers::unit, ClipReward},
        clip_input::{ClipInput, Fit, Resample},
        clip_score, hps, pick_score, Reward,
    },
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::goldens::{gaps, json, reward_goldens, File, Goldens};

/// Pictures f32 `[1, 3, H, W]` by name, in the set's order; None where the file is not in the set.
struct Inputs {
    pictures: Vec<(String, Option<Tensor>)>,
    prompts: Vec<String>,
}

fn decode(path: &Path) -> Option<Tensor> {
    let image = image::open(path).ok()?.to_rgb8();
    let size = [1, i64::from(image.height()), i64::from(image.width()), 3];
    let pixels = Tensor::from_slice(image.as_raw()).view(size).permute([0, 3, 1, 2]);
    Some((pixels.to_kind(Kind::Float) / 255.0).contiguous())
}

impl Inputs {
    fn of(goldens: &Goldens) -> Inputs {
        let listing = json(&goldens.dir.join("goldens/pictures.json"));
        let data = std::env::var_os("RLDIFF_TEST_DATA").map(PathBuf::from);
        let picture = |entry: &Value| {
            let name = entry["name"].as_str().unwrap().to_string();
            let path = match name.ends_with(".webp") {
                true => data.as_ref().map(|data| data.join(&name)),
                false => Some(goldens.dir.join(format!("pictures/{name}.png"))),
            };
            let found = path.and_then(|path| decode(&path));
            if found.is_none() {
                eprintln!("SKIPPED: picture {name} (RLDIFF_TEST_DATA names no folder with it)");
            }
            (name, found)
        };
        let pictures = listing["pictures"].as_array().unwrap().iter().map(picture).collect();
        Inputs { pictures, prompts: serde_json::from_value(listing["prompts"].clone()).unwrap() }
    }

    fn here(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.pictures.iter().filter_map(|(name, picture)| Some((name.as_str(), picture.as_ref()?)))
    }

    /// The rows of a reference tensor `[pictures, …]` whose pictures are here.
    fn rows(&self, reference: &Tensor) -> Tensor {
        let rows = self.pictures.iter().enumerate().filter(|(_, (_, picture))| picture.is_some());
        reference.index_select(0, &Tensor::from_slice(&rows.map(|(i, _)| i as i64).collect::<Vec<_>>()))
    }

    fn prompts(&self) -> Vec<Prompt> {
        self.prompts.iter().map(|text| Prompt { text: text.clone(), objects: Vec::new() }).collect()
    }

    /// Scores f64 `[pictures, prompts]`.
    fn scores(&self, reward: &mut ClipReward) -> Tensor {
        let prompts = self.prompts();
        let n = prompts.len() as i64;
        let one = |picture: &Tensor| {
            let size = picture.size();
            let images = picture.expand([n, 3, size[2], size[3]], false).contiguous();
            Tensor::from_slice(&reward.score(&images, &prompts).unwrap().rewards).to_kind(Kind::Double)
        };
        Tensor::stack(&self.here().map(|(_, picture)| picture).map(one).collect::<Vec<_>>(), 0)
    }
}

/// One of the small models of a set.
struct Model {
    file: File,
    folder: PathBuf,
    inputs: Inputs,
}

impl Model {
    /// None, said aloud, where the set has no such model.
    fn of(goldens: &Goldens, name: &str) -> Option<Model> {
        let folder = goldens.dir.join(format!("{name}-tiny"));
        if !folder.is_dir() {
            eprintln!("SKIPPED: {} holds no {name}-tiny", goldens.dir.display());
            return None;
        }
        Some(Model { file: goldens.flat_file(name), folder, inputs: Inputs::of(goldens) })
    }

    fn load(&self, name: &str, settings: &str) -> ClipReward {
        let file = if name == "hps" { "HPS_v2_compressed.pt" } else { "model.safetensors" };
        let weights = self.folder.join(file).display().to_string();
        let config: RewardConfig =
            toml::from_str(&format!("name = '{name}'\nweights = '{weights}'\n{settings}")).unwrap();
        match config {
            RewardConfig::PickScore(settings) => pick_score::load(&settings, Device::Cpu),
            RewardConfig::Hps(settings) => hps::load(&settings, Device::Cpu),
            RewardConfig::ClipScore(settings) => clip_score::load(&settings, Device::Cpu),
            other => panic!("{other:?}"),
        }
        .unwrap()
    }

    /// Under the tolerance of the name, rows of pictures that are not here left out.
    fn compare_rows(&self, goldens: &mut Goldens, name: &str, got: &Tensor) {
        let expected = self.inputs.rows(self.file.get(name));
        goldens.compare_values(&format!("{}/{name}", self.file.prefix), got, &expected);
    }

    /// Features, cosines, exp(logit_scale), and the features of given token ids.
    fn features(&self, goldens: &mut Goldens, reward: &mut ClipReward, tokens: &Value, ids_of: &str) {
        let clip = &mut reward.clip;
        let inputs = self.inputs.here().map(|(_, picture)| clip.input.exact(picture, Device::Cpu).unwrap().input);
        let inputs = Tensor::cat(&inputs.collect::<Vec<_>>(), 0);
        let pictures = tch::no_grad(|| clip.picture_features(&inputs));
        let texts = clip.text_features(&self.inputs.prompts).unwrap();
        self.compare_rows(goldens, "image_features", &pictures);
        goldens.compare(&self.file, "text_features", &texts);
        self.compare_rows(goldens, "cosine", &unit(&pictures).matmul(&unit(&texts).tr()));
        let scale = Tensor::from_slice(&[clip.logit_scale]);
        // the same exponential of the same f32 or f16
        goldens.compare_within(&self.file, "logit_scale_exp", &scale, 1e-10);

        let mut others: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
        for entry in tokens["prompts"].as_array().unwrap() {
            let prompt = entry["prompt"].as_str().unwrap();
            let wanted: Vec<i64> = serde_json::from_value(entry[ids_of].clone()).unwrap();
            let got: Vec<i64> = Vec::try_from(clip.ids(prompt).unwrap().view([-1])).unwrap();
            let end = wanted.iter().position(|id| Some(id) == wanted.iter().max()).unwrap();
            assert_eq!(got, wanted[..=end], "{prompt:?}");
            for kind in ["slow_ftfy", "slow_plain"] {
                let ids: Vec<i64> = serde_json::from_value(entry[kind].clone()).unwrap();
                if ids != wanted && self.file.tensors.contains_key(&format!("text_features.{kind}")) {
                    let row = clip.features_of_ids(&Tensor::from_slice(&ids).view([1, -1]));
                    others.entry(kind.to_string()).or_default().push(row);
                }
            }
        }
        for (kind, rows) in others {
            let name = format!("text_features.{kind}");
            let tolerance = format!("{}/text_features", self.file.prefix);
            goldens.compare_values(&tolerance, &Tensor::cat(&rows, 0), self.file.get(&name));
        }
    }

    /// Pictures in floating-point numbers: input, score and gradient by the differentiable path.
    fn gradients(&self, goldens: &mut Goldens, reward: &mut ClipReward) {
        for name in self.file.names("float.").into_iter().filter(|name| name.ends_with(".picture")) {
            let case = name.trim_end_matches(".picture");
            let picture = self.file.get(&name).unsqueeze(0).set_requires_grad(true);
            let input = reward.clip.input.differentiable(&picture).squeeze_dim(0);
            goldens.compare(&self.file, &format!("{case}.pixel_values"), &input.detach());
            let score = format!("{case}.score");
            let path = format!("goldens/{}.safetensors", self.file.prefix);
            let entry = goldens.listing.iter().find(|e| e["file"] == path.as_str() && e["name"] == score.as_str());
            let meaning = entry.and_then(|e| e["meaning"].as_str()).expect("MANIFEST.json: what prompt it is for");
            let number: usize = meaning.rsplit(' ').next().unwrap().parse().unwrap();
            let prompt = Prompt { text: self.inputs.prompts[number].clone(), objects: Vec::new() };
            let value = reward.differentiable().unwrap().rewards(&picture, &[prompt]).unwrap();
            value.sum(Kind::Float).backward();
            goldens.compare(&self.file, &score, &value.detach());
            goldens.compare(&self.file, &format!("{case}.grad"), &picture.grad().squeeze_dim(0));
        }
    }
}

#[test]
fn pick_score_and_its_scales() {
    let mut goldens = reward_goldens();
    let Some(model) = Model::of(&goldens, "pickscore") else { return };
    let tokens = json(&goldens.dir.join("goldens/tokens_tiny.json"));
    let mut reward = model.load("pick_score", "");
    model.features(&mut goldens, &mut reward, &tokens, "fast");
    model.compare_rows(&mut goldens, "score", &model.inputs.scores(&mut reward));
    for (name, settings) in
        [("score_over_26", format!("scale = {}", 1.0 / 26.0)), ("score_18_8", "scale = 0.125\noffset = -2.25".into())]
    {
        let mut other = model.load("pick_score", &settings);
        model.compare_rows(&mut goldens, name, &model.inputs.scores(&mut other));
    }
    // Pillow's bytes, all of them
    let input = reward.clip.input;
    for (row, (name, picture)) in model.inputs.pictures.iter().enumerate() {
        let Some(picture) = picture else { continue };
        let expected = model.file.get("resized_u8").get(row as i64);
        same_bytes(&mut goldens, &format!("pickscore/resized_u8 {name}"), &bytes(input, picture), &expected);
    }
    model.gradients(&mut goldens, &mut reward);
    goldens.all_used(&model.file);
    goldens.finish();
}

/// The bytes [S, S, 3] before means and standard deviations are applied.
fn bytes(input: ClipInput, picture: &Tensor) -> Tensor {
    let row = |values: &[f32; 3]| Tensor::from_slice(values).view([3, 1, 1]);
    let prepared = input.exact(picture, Device::Cpu).unwrap().input.get(0);
    let bytes = ((prepared * row(&input.std) + row(&input.mean)) * 255.0).round();
    bytes.permute([1, 2, 0]).to_kind(Kind::Uint8)
}

fn same_bytes(goldens: &mut Goldens, name: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.size(), expected.size(), "{name}");
    goldens.judge(name, "largest", gaps(got, expected).0, 0.0);
}

#[test]
fn human_preference_score_with_and_without_antialiasing() {
    let mut goldens = reward_goldens();
    let Some(model) = Model::of(&goldens, "hpsv2") else { return };
    let tokens = json(&goldens.dir.join("goldens/tokens_tiny.json"));
    let mut reward = model.load("hps", "");
    let mut sharp = model.load("hps", "antialias = false");
    model.features(&mut goldens, &mut reward, &tokens, "open_clip_without_padding");
    model.compare_rows(&mut goldens, "score", &model.inputs.scores(&mut reward));
    model.compare_rows(&mut goldens, "score.no_antialias", &model.inputs.scores(&mut sharp));
    for name in model.file.names("pixel_values.") {
        let (picture, input) = match name.strip_prefix("pixel_values.no_antialias.") {
            Some(picture) => (picture, sharp.clip.input),
            None => (name.trim_start_matches("pixel_values."), reward.clip.input),
        };
        let expected = model.file.get(&name);
        let Some((_, picture)) = model.inputs.here().find(|(own, _)| *own == picture) else { continue };
        let got = input.exact(picture, Device::Cpu).unwrap().input.get(0);
        goldens.compare_values("hpsv2/pixel_values", &got, expected);
    }
    model.gradients(&mut goldens, &mut reward);
    goldens.all_used(&model.file);
    goldens.finish();
}

#[test]
fn clip_score_in_everybodys_scale() {
    let mut goldens = reward_goldens();
    let Some(model) = Model::of(&goldens, "clipscore") else { return };
    let tokens = json(&goldens.dir.join("goldens/tokens_tiny.json"));
    let mut reward = model.load("clip_score", "prefix = ''");
    model.features(&mut goldens, &mut reward, &tokens, "fast");
    let logits = "prefix = ''\nclamp = false\nlogit_scale = true\nscale";
    let thirtieth = format!("{logits} = {}", 1.0 / 30.0);
    let float = "resizing = 'float_bilinear'\nmiddle = 'torchvision'";
    for (name, settings) in [
        ("clip_100", "prefix = ''\nscale = 100.0\nclamp = false".to_string()),
        ("clip_100_clamped", "prefix = ''\nscale = 100.0".to_string()),
        ("clipscore_w2.5", "prefix = ''".to_string()),
        // the defaults
        ("clipscore_w2.5.prefixed", String::new()),
        ("logits", format!("{logits} = 1.0")),
        ("logits_over_30", thirtieth.clone()),
        ("logits_over_30.flow_grpo_bilinear", format!("{thirtieth}\n{float}")),
    ] {
        let mut other = model.load("clip_score", &settings);
        model.compare_rows(&mut goldens, name, &model.inputs.scores(&mut other));
    }
    let prefixed = json(&goldens.dir.join("goldens/clipscore_prefixed_ids.json"));
    for (prompt, wanted) in model.inputs.prompts.iter().zip(prefixed["fast"].as_array().unwrap()) {
        let text = format!("{}{prompt}", prefixed["prefix"].as_str().unwrap());
        let got: Vec<i64> = Vec::try_from(reward.clip.ids(&text).unwrap().view([-1])).unwrap();
        assert_eq!(got, serde_json::from_value::<Vec<i64>>(wanted.clone()).unwrap(), "{text:?}");
    }
    model.gradients(&mut goldens, &mut reward);
    goldens.all_used(&model.file);
    goldens.finish();
}

/// The published side: bytes by Pillow and HPSv2's numbers, at every 8th row and column.
#[test]
fn pictures_at_the_published_side() {
    const SIDE: usize = 224;
    let mut goldens = reward_goldens();
    let (file, inputs) = (goldens.flat_file("preprocess224"), Inputs::of(&goldens));
    let clip = ClipInput::new(SIDE, Fit::ShortSide(Middle::Transformers), Resample::Pillow);
    let long = |antialias| ClipInput::new(SIDE, Fit::LongSide, Resample::of(Resizing::FloatBicubic, antialias));
    for name in file.names("") {
        let (kind, rest) = name.split_once('.').unwrap();
        let found = inputs.pictures.iter().find(|(own, _)| rest.starts_with(&own.replace('/', "_")));
        let (picture, tensor) = found.unwrap_or_else(|| panic!("{name}: of no picture of the set"));
        let expected = file.get(&name);
        let Some(tensor) = tensor else { continue };
        let whole = rest == picture.replace('/', "_");
        let every = |t: &Tensor, step, first| {
            t.slice(first, None::<i64>, None::<i64>, step).slice(first + 1, None::<i64>, None::<i64>, step)
        };
        if kind == "clip_u8" {
            let bytes = bytes(clip, tensor);
            let got = if whole { bytes } else { every(&bytes, 8, 0) };
            same_bytes(&mut goldens, &format!("preprocess224/{name}"), &got, expected);
            continue;
        }
        let input = long(!rest.contains("no_antialias")).exact(tensor, Device::Cpu).unwrap().input.get(0);
        let got = match rest.ends_with(".green") {
            true => input.get(1).slice(0, None::<i64>, None::<i64>, 4),
            false => every(&input, 8, 1),
        };
        let tolerance = name.trim_end_matches(".every8").trim_end_matches(".green");
        goldens.compare_values(&format!("preprocess224/{tolerance}"), &got, expected);
    }
    goldens.all_used(&file);
    goldens.finish();
}

#[test]
fn sizes_corners_and_padding_of_many_pictures() {
    let goldens = reward_goldens();
    let cases = json(&goldens.dir.join("goldens/geometry224.json"));
    let pair = |value: &Value| -> [usize; 2] {
        let [height, width]: [usize; 2] = serde_json::from_value(value.clone()).unwrap();
        [width, height]
    };
    let cases = cases["cases"].as_array().unwrap();
    for case in cases {
        let size = ["width", "height"].map(|key| case[key].as_u64().unwrap() as usize);
        let input = |fit| ClipInput::new(224, fit, Resample::Pillow);
        for (middle, key) in
            [(Middle::Transformers, "corner_transformers"), (Middle::Torchvision, "corner_torchvision")]
        {
            let input = input(Fit::ShortSide(middle));
            assert_eq!((input.resized(size), input.places(size)), (pair(&case["clip_resized"]), pair(&case[key])));
        }
        let long = input(Fit::LongSide);
        let ([width, height], [left, top]) = (long.resized(size), long.places(size));
        assert_eq!([width, height], pair(&case["hps_resized"]), "{size:?}");
        let padding = [top, left, 224 - height - top, 224 - width - left];
        let wanted: [usize; 4] = serde_json::from_value(case["hps_pad_top_left_bottom_right"].clone()).unwrap();
        assert_eq!(padding, wanted, "{size:?}");
    }
    println!("{} sizes", cases.len());
    assert!(cases.len() > 10);
}

/// CLIP's own vocabulary, on prompts where the two tokenizers differ.
#[test]
fn tokens_of_the_real_vocabulary() {
    let goldens = reward_goldens();
    let listing = goldens.dir.join("goldens/tokens_real_vocabulary.json");
    let Some(data) = std::env::var_os("RLDIFF_TEST_DATA").map(PathBuf::from).filter(|_| listing.is_file()) else {
        eprintln!(
            "SKIPPED: tokens_real_vocabulary.json and RLDIFF_TEST_DATA (CLIP's own vocabulary) are not both here"
        );
        return;
    };
    let folder = ModelLocation::Disk(data.join("sd_configs/stable-diffusion-v1-5/tokenizer"));
    let of = |rules| Tokenizer::with_rules(&ModelFiles::read_tokenizer(&folder).unwrap(), rules).unwrap();
    let (fast, open_clip) = (of(TextRules::Fast), of(TextRules::OpenClip));
    let mut wrong = Vec::new();
    let listing = json(&listing);
    for entry in listing["prompts"].as_array().unwrap() {
        let prompt = entry["prompt"].as_str().unwrap();
        for (kind, tokenizer) in [("open_clip", &open_clip), ("transformers_fast", &fast)] {
            let wanted = if entry[kind] == "same" { &entry["open_clip"] } else { &entry[kind] };
            let wanted: Vec<u32> = serde_json::from_value(wanted.clone()).unwrap();
            let got = tokenizer.encode(prompt).unwrap().ids;
            let padded = got[wanted.len().min(got.len())..].iter().all(|&id| id == tokenizer.end());
            println!("{kind:<18} {prompt:.60?}");
            if !(got.starts_with(&wanted) && padded) {
                wrong.push(format!("{kind}: {prompt:?} became {got:?}, not {wanted:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
