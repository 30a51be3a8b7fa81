//! Damaged and foreign models: one line that names the file and the key, code 2, never a panic.
//!
//! The models are the embedded miniature, written to disk and damaged.

mod common;

use std::{
    fs,
    panic::{catch_unwind, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{run_within, Finished};
use rldiff::{
    miniature::EMBEDDED_MODEL,
    models::{
        folder::{ModelFiles, ModelLocation},
        pipeline::Pipeline,
        weights::{read_safetensors, write_safetensors},
    },
};
use serde_json::{json, Value};
use tch::{Device, Kind, Tensor};

const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

fn write_model(dir: &Path) {
    for (path, bytes) in EMBEDDED_MODEL {
        fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
        fs::write(dir.join(path), bytes).unwrap();
    }
}

fn sample(model: &Path, more: &[&str]) -> Finished {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rldiff"));
    command.args(["sample", "--steps", "1", "--out"]).arg(model.with_extension("out")).arg("--model").arg(model);
    command.args(more).env("OMP_NUM_THREADS", "1");
    run_within(command, Duration::from_secs(120))
}

/// Damages the model, samples from it, and expects one line with all of `words` and code 2.
fn refused(damage: impl Fn(&Path), words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model);
    damage(&model);
    let result = sample(&model, &["--prompt", "x"]);
    let error = &result.stderr;
    assert_eq!(result.status.code(), Some(2), "{words:?}: {error}");
    assert!(error.starts_with("error: ") && error.lines().count() == 1, "{words:?}: {error}");
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    assert!(!model.with_extension("out").exists(), "something was written");
}

fn edit<'a>(path: &'a str, change: impl Fn(&mut Vec<u8>) + 'a) -> impl Fn(&Path) + 'a {
    move |model: &Path| {
        let path = model.join(path);
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
}

/// Sets `key` in a JSON file.
fn set(path: &'static str, key: &'static str, value: Value) -> impl Fn(&Path) {
    move |model: &Path| {
        let path = model.join(path);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json[key] = value.clone();
        fs::write(path, json.to_string()).unwrap();
    }
}

/// Replaces the U-Net's tensors by what `change` makes of them.
fn change_tensors(model: &Path, change: impl Fn(&mut std::collections::BTreeMap<String, Tensor>)) {
    let mut tensors = read_safetensors(&fs::read(model.join(UNET)).unwrap(), "unet").unwrap();
    change(&mut tensors);
    fs::write(model.join(UNET), write_safetensors(&tensors, Kind::Float).unwrap()).unwrap();
}

fn header(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &[0; 16]].concat()
}

#[test]
fn damaged_safetensors() {
    refused(edit(UNET, |b| b.truncate(b.len() - 1)), &[UNET, "not a sound safetensors file"]);
    refused(edit(UNET, |b| b.truncate(100)), &[UNET]);
    refused(edit(UNET, |b| b.clear()), &[UNET]);
    refused(edit(UNET, |b| b[3] ^= 0x40), &[UNET]);
    refused(edit(UNET, |b| b[8] ^= 1), &[UNET]);
    refused(edit(UNET, |b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes())), &[UNET]);
    let overlap = r#"{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
                      "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}"#;
    refused(edit(UNET, |b| *b = header(overlap)), &[UNET]);
    let short = r#"{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}"#;
    refused(edit(UNET, |b| *b = header(short)), &[UNET]);
    refused(|m| fs::remove_file(m.join(UNET)).unwrap(), &[UNET, "missing"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    refused(edit(UNET, |b| *b = pointer.into()), &[UNET, "Git LFS pointer", "git lfs pull"]);
    refused(edit("tokenizer/vocab.json", |b| *b = pointer.into()), &["tokenizer/vocab.json", "Git LFS pointer"]);
}

#[test]
fn wrong_tensors() {
    let without = |m: &Path| change_tensors(m, |t| drop(t.remove("conv_in.weight")));
    refused(without, &["unet", "tensor conv_in.weight is missing"]);
    let misshapen = |m: &Path| change_tensors(m, |t| drop(t.insert("conv_in.bias".into(), Tensor::from(1.0f32))));
    refused(misshapen, &["unet", "tensor conv_in.bias has shape []", "the config asks for ["]);
    let integers =
        |m: &Path| change_tensors(m, |t| drop(t.insert("conv_in.bias".into(), t["conv_in.bias"].to_kind(Kind::Int64))));
    refused(integers, &["unet", "tensor conv_in.bias has type Int64"]);
}

#[test]
fn pickles_with_foreign_objects() {
    let evil = b"\x80\x02cposix\nsystem\nX\x10\0\0\0touch /tmp/rldiff\x85R.";
    refused(edit(UNET, |b| *b = evil.to_vec()), &[UNET, "posix.system"]);
    refused(edit(UNET, |b| *b = zip("a/data.pkl", evil)), &[UNET, "posix.system"]);
    for name in ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.pt"] {
        for contents in [evil.to_vec(), zip("a/data.pkl", evil)] {
            let instead = |m: &Path| {
                fs::remove_file(m.join(UNET)).unwrap();
                fs::write(m.join("unet").join(name), &contents).unwrap();
            };
            refused(instead, &[name, "posix.system"]);
        }
    }
}

/// A ZIP archive of one stored file.
fn zip(name: &str, data: &[u8]) -> Vec<u8> {
    let size = (data.len() as u32).to_le_bytes();
    let common = [
        &[0u8; 6][..],
        &crc32fast::hash(data).to_le_bytes(),
        &size,
        &size,
        &(name.len() as u16).to_le_bytes(),
        &[0; 2],
    ]
    .concat();
    let mut out = [&b"PK\x03\x04\x14\0\0\0"[..], &common, name.as_bytes(), data].concat();
    let start = out.len() as u32;
    let directory = [&b"PK\x01\x02\0\0\x14\0\0\0"[..], &common, &[0; 14], name.as_bytes()].concat();
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0\x01\0\x01\0");
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0; 2]);
    out
}

#[test]
fn foreign_classes_and_configs() {
    let index = "model_index.json";
    refused(set(index, "_class_name", json!("StableDiffusionXLPipeline")), &[index, "StableDiffusionXLPipeline"]);
    refused(set(index, "unet", json!(["diffusers", "UNet3DConditionModel"])), &[index, "UNet3DConditionModel"]);
    refused(set(index, "text_encoder_2", json!(["transformers", "CLIPTextModel"])), &[index, "text_encoder_2"]);
    let unet = "unet/config.json";
    refused(set(unet, "_class_name", json!("UNet1DModel")), &[unet, "_class_name is UNet1DModel"]);
    refused(set(unet, "block_out_channels", json!("x")), &[unet, "block_out_channels"]);
    refused(set(unet, "norm_num_groups", json!(0)), &[unet, "norm_num_groups"]);
    refused(set(unet, "in_channels", json!(9)), &[unet, "in_channels"]);
    refused(set(unet, "cross_attention_dim", json!(7)), &[unet, "cross_attention_dim = 7", "hidden_size"]);
    refused(set("vae/config.json", "_class_name", json!("VQModel")), &["vae/config.json", "VQModel"]);
    refused(set("vae/config.json", "latent_channels", json!(5)), &["vae/config.json", "latent_channels = 5"]);
    let text = "text_encoder/config.json";
    refused(set(text, "hidden_act", json!("swish")), &[text, "hidden_act"]);
    refused(set(text, "vocab_size", json!(3)), &[text, "vocab_size = 3", "the id"]);
    let scheduler = "scheduler/scheduler_config.json";
    let flow = json!("FlowMatchEulerDiscreteScheduler");
    refused(set(scheduler, "_class_name", flow), &[scheduler, "FlowMatchEulerDiscreteScheduler"]);
    refused(set(scheduler, "prediction_type", json!("sample")), &[scheduler, "prediction_type"]);
    refused(edit(unet, |b| b.truncate(20)), &[unet, "not JSON"]);
    refused(edit(unet, |b| b[5] = 0xff), &[unet, "not UTF-8"]);
}

#[test]
fn missing_files() {
    let files = ["model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json"];
    for file in files.into_iter().chain(["unet/config.json", "scheduler/scheduler_config.json"]) {
        refused(|m| fs::remove_file(m.join(file)).unwrap(), &[file, "missing"]);
    }
    refused(|m| fs::remove_dir_all(m).unwrap(), &["does not exist"]);
}

#[test]
fn prompts_of_every_length_and_files_that_are_no_text() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model);
    let empty = sample(&model, &["--prompt", ""]).expect_success("the empty prompt");
    assert_eq!(empty.stderr, "");
    let long = sample(&model, &["--prompt", &"circle red ".repeat(909)]).expect_success("10,000 characters");
    assert!(long.stderr.contains("tokens are cut") && long.stderr.lines().count() == 1, "{}", long.stderr);
    let prompts = dir.path().join("prompts.txt");
    fs::write(&prompts, b"good\n\xff\xfe\n").unwrap();
    let broken = sample(&model, &["--prompts", prompts.to_str().unwrap()]);
    assert_eq!(broken.status.code(), Some(2));
    assert!(broken.stderr.contains("prompts.txt: line 2 is not UTF-8"), "{}", broken.stderr);
}

#[test]
fn weights_that_are_not_numbers_are_named_and_work_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model);
    change_tensors(&model, |t| drop(t["conv_out.bias"].get(0).fill_(f64::NAN)));
    let result = sample(&model, &["--prompt", "x"]);
    let named =
        result.stderr.lines().any(|line| line.starts_with("warn") && line.contains("unet: tensor conv_out.bias"));
    assert!(named && !result.stderr.contains("panicked"), "{}", result.stderr);
}

/// The same model from shards, half precision and pickles would be loaded; what an index says is checked.
#[test]
fn shards() {
    let split = |m: &Path| {
        let tensors = read_safetensors(&fs::read(m.join(UNET)).unwrap(), "unet").unwrap();
        fs::remove_file(m.join(UNET)).unwrap();
        let mut map = serde_json::Map::new();
        let mut parts = [std::collections::BTreeMap::new(), std::collections::BTreeMap::new()];
        for (i, (name, tensor)) in tensors.into_iter().enumerate() {
            map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
            parts[i % 2].insert(name, tensor);
        }
        for (i, part) in parts.iter().enumerate() {
            let path = m.join(format!("unet/part-{i}.safetensors"));
            fs::write(path, write_safetensors(part, Kind::Float).unwrap()).unwrap();
        }
        let index = json!({"metadata": {}, "weight_map": map}).to_string();
        fs::write(m.join("unet/diffusion_pytorch_model.safetensors.index.json"), index).unwrap();
    };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().to_path_buf();
    write_model(&model);
    let whole = ModelFiles::read(&ModelLocation::Disk(model.clone())).unwrap();
    split(&model);
    let parts = ModelFiles::read(&ModelLocation::Disk(model)).unwrap();
    assert!(whole.weights["unet"].iter().all(|(name, t)| t.equal(&parts.weights["unet"][name])));
    let index = "unet/diffusion_pytorch_model.safetensors.index.json";
    let damaged = |change: &dyn Fn(&Path), words: &[&str]| {
        let both = |m: &Path| {
            split(m);
            change(m);
        };
        refused(both, words);
    };
    damaged(&|m| fs::remove_file(m.join("unet/part-1.safetensors")).unwrap(), &["unet/part-1.safetensors", "missing"]);
    damaged(&|m| fs::write(m.join(index), "{}").unwrap(), &[index, "weight_map"]);
    let foreign = json!({"weight_map": {"a": "../../vae/config.json"}}).to_string();
    damaged(&|m| fs::write(m.join(index), &foreign).unwrap(), &[index, "weight_map.a"]);
    let promised = json!({"weight_map": {"a": "part-0.safetensors"}}).to_string();
    damaged(&|m| fs::write(m.join(index), &promised).unwrap(), &[index, "tensor a is not in part-0"]);
}

#[test]
fn half_precision_variants_load_where_there_is_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().to_path_buf();
    write_model(&model);
    let tensors = read_safetensors(&fs::read(model.join(UNET)).unwrap(), "unet").unwrap();
    fs::write(model.join(UNET), write_safetensors(&tensors, Kind::Float).unwrap()).unwrap();
    let half = write_safetensors(&tensors, Kind::Half).unwrap();
    fs::write(model.join("unet/diffusion_pytorch_model.fp16.safetensors"), half).unwrap();
    let kind = |model: &PathBuf| {
        ModelFiles::read(&ModelLocation::Disk(model.clone())).unwrap().weights["unet"]["conv_in.weight"].kind()
    };
    assert_eq!(kind(&model), Kind::Float);
    fs::remove_file(model.join(UNET)).unwrap();
    assert_eq!(kind(&model), Kind::Half);
}

/// Values of configs replaced by values that make no sense: an error or a model that works. `every` picks a part of
/// the combinations; all of them take minutes.
fn odd_config_values(every: usize) {
    const FILES: [&str; 7] = [
        "model_index.json",
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
    ];
    let odd = json!([0, -1, 3, 1e18, i64::MAX, "x", null, [], [0], [1, 2, 3], true, false, {}]);
    let files = || ModelFiles::read(&ModelLocation::Embedded(EMBEDDED_MODEL)).unwrap();
    let (mut panics, mut tried, mut built, mut number) = (Vec::new(), 0, 0, 0);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for file in FILES {
        let json = files().json(file).unwrap();
        for key in json.as_object().unwrap().keys() {
            for value in odd.as_array().unwrap() {
                number += 1;
                if number % every != 0 {
                    continue;
                }
                let mut changed = json.clone();
                changed[key] = value.clone();
                let mut files = files();
                files.texts.insert(file.to_string(), changed.to_string().into_bytes());
                tried += 1;
                match catch_unwind(AssertUnwindSafe(|| builds_and_works(files))) {
                    Ok(works) => built += usize::from(works),
                    Err(_) => panics.push(format!("{file}: {key} = {value}")),
                }
            }
        }
    }
    std::panic::set_hook(hook);
    println!("{tried} odd values: {built} models that work, {} panics", panics.len());
    assert!(panics.is_empty(), "panics:\n{}", panics.join("\n"));
}

/// False if the model is refused; panics if it is not and then does not work.
fn builds_and_works(files: ModelFiles) -> bool {
    let Ok(pipeline) = Pipeline::from_files(files, Device::Cpu) else { return false };
    let _no_grad = tch::no_grad_guard();
    let text = pipeline.embed(&["a red circle"]).unwrap();
    let x = Tensor::zeros([1, pipeline.latent_shape()[0], 4, 4], (Kind::Float, Device::Cpu));
    let eps = pipeline.unet.forward(&x, &Tensor::from_slice(&[700i64]), &text);
    pipeline.vae.decode_scaled(&eps).size()[1] == 3
}

#[test]
fn no_config_value_is_a_panic() {
    odd_config_values(17);
}

#[test]
#[ignore = "long: every value of every config, one to six minutes"]
fn no_config_value_at_all_is_a_panic() {
    odd_config_values(1);
}
