//! The reward networks against other people's: transformers, torchvision, Pillow (RLDIFF_TEST_PYTHON names a Python with
//! them; `make test` sets it up), with small networks of random weights in the layouts of the published files.

mod common;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{empty_folder, reward_files as files, run_within};
use rldiff::{
    config::{AestheticSettings, ImageRewardSettings},
    prompts::Prompt,
    rewards::{
        aesthetic::Aesthetic,
        image_reward::ImageReward,
        pil::{self, Filter},
        Reward,
    },
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const PROMPTS: [&str; 4] =
    ["a kite next to the book", "Painting of an ocean, with clouds!", "", "a portrait of a nurse and a dinosaur"];

fn python() -> Option<PathBuf> {
    let python = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|p| !p.is_empty()).map(PathBuf::from);
    if python.is_none() {
        eprintln!("SKIPPED: RLDIFF_TEST_PYTHON is not set (a Python with transformers and torchvision)");
    }
    python
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn prompts() -> Vec<Prompt> {
    PROMPTS.iter().map(|&text| Prompt { text: text.into(), objects: vec![] }).collect()
}

/// What the Python networks say of the files in `folder`.
fn reference(python: &Path, kind: &str, folder: &Path, pictures: &Tensor) -> Value {
    files::save(&folder.join("pictures.safetensors"), &BTreeMap::from([("pictures".to_string(), pictures.copy())]));
    std::fs::write(folder.join("prompts.json"), serde_json::to_vec(&PROMPTS).unwrap()).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/reward_networks.py");
    let mut command = Command::new(python);
    command.args([script, kind, &text(folder)]);
    let done = run_within(command, Duration::from_secs(240)).expect_success(kind);
    let line = done.stdout.lines().rfind(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{}", done.stdout));
    serde_json::from_str(line).unwrap()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn assert_near(got: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(got.len(), wanted.len());
    let gap = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest difference {gap:e}: {got:?} {wanted:?}");
    assert!(gap < tolerance, "{gap}: {got:?} {wanted:?}");
    // numbers that are all alike would hide a picture or a prompt that is not looked at
    for (i, a) in wanted.iter().enumerate() {
        assert!(wanted[..i].iter().all(|b| (a - b).abs() > 20.0 * tolerance), "{wanted:?}");
    }
}

fn image_reward(folder: &Path, weights: &str) -> anyhow::Result<ImageReward> {
    let settings =
        ImageRewardSettings { weights: text(&folder.join(weights)), vocabulary: text(&folder.join("vocab.txt")) };
    ImageReward::load(&settings, Device::Cpu)
}

#[test]
fn image_reward_is_that_of_transformers_blip() {
    let Some(python) = python() else { return };
    let folder = empty_folder("image-reward");
    files::write_image_reward(&folder, 1);
    // neither square nor of the networks' size
    let pictures = files::pictures(4, 61, 83);
    let wanted = numbers(&reference(&python, "image_reward", &folder, &pictures)["scores"]);
    for weights in ["image_reward.safetensors", "ImageReward.pt"] {
        let mut reward = image_reward(&folder, weights).unwrap();
        // f32 in another order of summation; observed 3e-7
        assert_near(&reward.score(&pictures, &prompts()).unwrap().rewards, &wanted, 2e-5);
    }
}

fn aesthetic(folder: &Path, clip: &str, head: &str) -> anyhow::Result<Aesthetic> {
    let head = if head.is_empty() { String::new() } else { text(&folder.join(head)) };
    Aesthetic::load(&AestheticSettings { clip: text(&folder.join(clip)), head }, Device::Cpu)
}

#[test]
fn the_aesthetic_score_is_that_of_transformers_clip_in_every_layout() {
    let Some(python) = python() else { return };
    let folder = empty_folder("aesthetic");
    files::write_aesthetic(&folder, 2);
    files::save(&folder.join("relu.safetensors"), &files::random(&files::aesthetic_head(24, true), 2));
    let pictures = files::pictures(4, 40, 40);
    let wanted = reference(&python, "clip", &folder, &pictures);
    for (clip, head, key) in [
        ("clip.safetensors", "head.safetensors", "scores"),
        ("clip.safetensors", "relu.safetensors", "relu"),
        ("ViT-L-14.pt", "head.safetensors", "scores"),
        ("repack.bin", "", "scores"),
    ] {
        let mut reward = aesthetic(&folder, clip, head).unwrap_or_else(|e| panic!("{clip}: {e:#}"));
        // f32 in another order of summation; observed 0 to 3e-8
        assert_near(&reward.score(&pictures, &prompts()).unwrap().rewards, &numbers(&wanted[key]), 5e-7);
    }
}

/// The differentiable paths: near the exact ones, and with the gradient of finite differences.
#[test]
fn gradients_reach_the_pictures() {
    let folder = empty_folder("reward-gradients");
    files::write_image_reward(&folder, 3);
    files::write_aesthetic(&folder, 3);
    let (mut preference, mut beauty) = (
        image_reward(&folder, "image_reward.safetensors").unwrap(),
        aesthetic(&folder, "clip.safetensors", "head.safetensors").unwrap(),
    );
    let pictures = files::pictures(4, 48, 48);
    let exact =
        [preference.score(&pictures, &prompts()), beauty.score(&pictures, &prompts())].map(|s| s.unwrap().rewards);
    let rewards: [&mut dyn Reward; 2] = [&mut preference, &mut beauty];
    for (reward, exact) in rewards.into_iter().zip(&exact) {
        let smooth = reward.differentiable().expect("it is");
        let mut reward = |x: &Tensor| smooth.rewards(x, &prompts()).unwrap();
        let x = pictures.copy().set_requires_grad(true);
        let scores = reward(&x);
        let smooth: Vec<f32> = Vec::try_from(&scores).unwrap();
        let spread = exact.iter().cloned().fold(f32::MIN, f32::max) - exact.iter().cloned().fold(f32::MAX, f32::min);
        let gap = smooth.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        println!("differentiable against exact: {gap:e} of a spread of {spread:e}");
        // pictures that differ by about a grey level
        assert!(gap < 0.1 * spread, "{smooth:?} {exact:?}");
        scores.sum(Kind::Float).backward();
        let gradient = x.grad();
        for picture in 0..4 {
            assert!(gradient.get(picture).abs().max().double_value(&[]) > 0.0, "picture {picture} has no gradient");
        }
        let direction = (&gradient / gradient.norm()).detach();
        let step = 0.05;
        let mut at =
            |s: f64| tch::no_grad(|| reward(&(pictures.copy() + &direction * s)).sum(Kind::Double).double_value(&[]));
        let slope = (at(step) - at(-step)) / (2.0 * step);
        let wanted = gradient.norm().double_value(&[]);
        println!("slope {slope} of {wanted}");
        // central differences over a step of 0.05 in f32; observed 0.1 %
        assert!((slope - wanted).abs() < 0.02 * wanted, "{slope} {wanted}");
    }
}

#[test]
fn published_files_have_these_tensors() {
    // 624 tensors of 446.9 M numbers: ImageReward.pt's size
    let shapes = files::image_reward(files::VIT_L_16, files::BERT_BASE, [768, 1024, 128, 64, 16]);
    let count: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    assert_eq!(shapes.len(), 624);
    assert_eq!(count / 1_000_000, 446);
    let shapes = files::clip_hugging_face(files::VIT_L_14);
    assert_eq!(shapes.len(), 3 + 2 + 24 * 16 + 2 + 1);
    let count: i64 = shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    assert_eq!(count / 1_000_000, 303);
}

/// The published sizes with random weights: they load, and score a picture of 512 × 512.
#[test]
#[ignore = "writes files of 1.8 GB and 1.2 GB"]
fn networks_of_the_published_size() {
    let folder = empty_folder("full-size");
    // 30,522 words, to which BLIP adds two
    let mut words = files::vocabulary();
    words.extend((words.len()..30_522).map(|i| format!("word{i}")));
    std::fs::write(folder.join("vocab.txt"), words.join("\n")).unwrap();
    let shapes = files::image_reward(files::VIT_L_16, files::BERT_BASE, [768, 1024, 128, 64, 16]);
    files::save(&folder.join("image_reward.safetensors"), &files::random(&shapes, 1));
    files::save(&folder.join("clip.safetensors"), &files::random(&files::clip_hugging_face(files::VIT_L_14), 1));
    files::save(&folder.join("head.safetensors"), &files::random(&files::aesthetic_head(768, false), 1));
    let (pictures, prompts) = (files::pictures(4, 512, 512), prompts());
    let judge = |name: &str, load: &dyn Fn() -> Box<dyn Reward>| {
        let started = std::time::Instant::now();
        let mut reward = load();
        let loaded = started.elapsed().as_secs_f64();
        let scores = reward.score(&pictures, &prompts).unwrap().rewards;
        let scored = started.elapsed().as_secs_f64() - loaded;
        println!("{name}: loaded in {loaded:.1} s, 4 pictures in {scored:.1} s: {scores:?}");
        assert!(scores.iter().all(|s| s.is_finite()) && scores[0] != scores[1]);
    };
    judge("image_reward", &|| Box::new(image_reward(&folder, "image_reward.safetensors").unwrap()));
    judge("aesthetic", &|| Box::new(aesthetic(&folder, "clip.safetensors", "head.safetensors").unwrap()));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Wrong checkpoints: one line that names file and tensor.
#[test]
fn wrong_checkpoints_are_one_line() {
    let folder = empty_folder("bad-reward-files");
    files::write_image_reward(&folder, 4);
    files::write_aesthetic(&folder, 4);
    let all = files::random(&files::image_reward(files::SMALL_BLIP, files::small_bert(), [64, 48, 24, 12, 6]), 4);
    let with = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let mut tensors = all.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        change(&mut tensors);
        files::save(&folder.join("changed.safetensors"), &tensors);
        format!("{:#}", image_reward(&folder, "changed.safetensors").err().expect("an error"))
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let e = with(&|t| {
        t.remove("blip.visual_encoder.blocks.0.attn.qkv.bias");
        t.insert("blip.visual_encoder.blocks.0.attn.q_bias".into(), zeros(&[3]));
    });
    assert!(e.contains("tensors are missing: blip.visual_encoder.blocks.0.attn.qkv.bias; 1 are not known: "), "{e}");
    let e = with(&|t| drop(t.insert("mlp.layers.4.bias".into(), zeros(&[7]))));
    assert!(e.contains("mlp.layers.4.bias has shape [7]") && e.contains("[12]"), "{e}");
    let e = with(&|t| drop(t.remove("blip.visual_encoder.pos_embed")));
    assert!(e.contains("pos_embed is missing"), "{e}");
    let e = with(&|t| drop(t.insert("blip.visual_encoder.pos_embed".into(), zeros(&[1, 9, 128]))));
    assert!(e.contains("9 positions are no square"), "{e}");
    std::fs::write(folder.join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\n[SEP]\n").unwrap();
    let e = format!("{:#}", image_reward(&folder, "image_reward.safetensors").err().unwrap());
    assert!(e.contains("vocab.txt: 6 tokens with the two that BLIP adds") && e.contains("embeddings of 32"), "{e}");

    let e = format!("{:#}", aesthetic(&folder, "head.safetensors", "").err().unwrap());
    assert!(e.contains("no CLIP model with a picture tower"), "{e}");
    let e = format!("{:#}", aesthetic(&folder, "clip.safetensors", "").err().unwrap());
    assert!(e.contains("layers.{0,2,4,6,7}"), "{e}");
    let e = format!("{:#}", aesthetic(&folder, "none.pt", "").err().unwrap());
    assert!(e.contains("none.pt: there is no such file") && !e.contains('\n'), "{e}");
    let mut clip = files::random(&files::clip_hugging_face(files::SMALL_CLIP), 4);
    clip.remove("vision_model.encoder.layers.1.self_attn.k_proj.bias");
    files::save(&folder.join("clip.safetensors"), &clip);
    let e = format!("{:#}", aesthetic(&folder, "clip.safetensors", "head.safetensors").err().unwrap());
    assert!(e.contains("1 tensors are missing: vision_model.encoder.layers.1.self_attn.k_proj.bias"), "{e}");
}

/// Both filters, up and down, odd sizes and pixels at random: Pillow's bytes, all of them.
#[test]
fn resizing_is_pillows_to_the_byte() {
    let Some(python) = python() else { return };
    let folder = empty_folder("resize");
    tch::manual_seed(5);
    let noise = Tensor::rand([1, 3, 97, 131], (Kind::Float, Device::Cpu));
    let (pictures, sizes) =
        (Tensor::cat(&[noise, files::pictures(1, 97, 131)], 0), [[24, 24], [131, 40], [200, 97], [333, 501], [1, 1]]);
    std::fs::write(folder.join("sizes.json"), serde_json::to_vec(&sizes).unwrap()).unwrap();
    let expected = reference(&python, "resize", &folder, &pictures);
    let bytes = (pictures * 255.0).round().to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous();
    let mut compared = 0;
    for (name, filter) in [("bilinear", Filter::Bilinear), ("bicubic", Filter::Bicubic)] {
        for picture in 0..2 {
            let rgb: Vec<u8> = Vec::try_from(bytes.get(picture).view([-1])).unwrap();
            for (i, to) in sizes.into_iter().enumerate() {
                let wanted: Vec<u8> = serde_json::from_value(expected[name][picture as usize][i].clone()).unwrap();
                assert!(pil::resize(&rgb, [131, 97], to, filter) == wanted, "{name}, picture {picture}, {to:?}");
                compared += wanted.len();
            }
        }
    }
    println!("{compared} bytes are equal");
}

/// The package's README, for whoever has the weights.
#[test]
fn published_scores() {
    let Some(weights) = std::env::var_os("RLDIFF_IMAGE_REWARD").map(PathBuf::from) else {
        eprintln!(
            "SKIPPED: RLDIFF_IMAGE_REWARD does not name a folder with ImageReward.pt, vocab.txt and 1.webp to 4.webp"
        );
        return;
    };
    let mut reward = image_reward(&weights, "ImageReward.pt").unwrap();
    let prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect";
    // the README of the authors' package
    let wanted = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492];
    for (number, wanted) in wanted.into_iter().enumerate() {
        let image = image::open(weights.join(format!("{}.webp", number + 1))).unwrap().to_rgb8();
        let size = [1, i64::from(image.height()), i64::from(image.width()), 3];
        let pixels = Tensor::from_slice(image.as_raw()).view(size).permute([0, 3, 1, 2]).to_kind(Kind::Float) / 255.0;
        let prompt = Prompt { text: prompt.into(), objects: vec![] };
        let got = reward.score(&pixels.contiguous(), &[prompt]).unwrap().rewards[0];
        // f32 on other hardware
        assert!((got - wanted).abs() < 1e-3, "picture {}: {got} {wanted}", number + 1);
    }
}
