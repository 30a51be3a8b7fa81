//! The U-Net and the text encoder with adapters of every layout: the second golden set (RLDIFF_GOLDENS2), on the model of
//! the first.

use std::{collections::BTreeMap, path::PathBuf};

use rldiff::{
    comm::Local,
    models::{
        folder::{ModelFiles, ModelLocation},
        lora::adapter::Adapter,
        pipeline::Pipeline,
        weights::read_safetensors,
    },
};
use tch::{Device, Tensor};

use super::goldens::{goldens, json, Goldens};

/// The second set's folder, and the checks of the first with the tolerances of the second.
fn both() -> Option<(PathBuf, Goldens)> {
    let goldens = goldens()?;
    let Some(second) = std::env::var_os("RLDIFF_GOLDENS2").map(PathBuf::from) else {
        eprintln!("SKIPPED: RLDIFF_GOLDENS2 is not set (folder of reference numbers with adapters)");
        return None;
    };
    let tolerances = json(&second.join("TOLERANCES.json"))["gaps"].take();
    Some((second, Goldens { tolerances, ..goldens }))
}

#[test]
fn adapters_of_every_layout() {
    let Some((second, mut goldens)) = both() else { return };
    let model = ModelLocation::Disk(goldens.dir.join("sd2-tiny"));
    let path = second.join("goldens/lora/sd2.safetensors");
    let reference: BTreeMap<String, Tensor> =
        read_safetensors(&std::fs::read(&path).unwrap(), &path.display().to_string()).unwrap();
    let mut compared = 0;
    for (name, expected) in &reference {
        let Some(name) = name.strip_prefix("eps.") else { continue };
        let (file, scale) = name.strip_suffix(".x0.5").map_or((name, 1.0), |file| (file, 0.5));
        let mut files = ModelFiles::read(&model).unwrap();
        if file != "base" {
            let adapter = Adapter::read(&second.join(format!("lora/sd2.{file}.safetensors")), &Local).unwrap();
            assert!(adapter.guesses.is_empty(), "{file}: {:?}", adapter.guesses);
            let merged = adapter.merge_into(&mut files, scale).unwrap();
            assert!(merged.changed && merged.without_layer.is_empty(), "{file}: {merged:?}");
        }
        let pipeline = Pipeline::from_files(files, Device::Cpu).unwrap();
        let _no_grad = tch::no_grad_guard();
        let eps =
            pipeline.unet.forward(&reference["sample"], &reference["timestep"], &reference["encoder_hidden_states"]);
        goldens.compare_values(&format!("lora/sd2/eps.{name}"), &eps, expected);
        if let Some(text) = reference.get(&format!("text.{name}")) {
            let embedding = pipeline.text_encoder.forward(&reference["input_ids"]);
            goldens.compare_values(&format!("lora/sd2/text.{name}"), &embedding, text);
        }
        compared += 1;
    }
    let adapters = std::fs::read_dir(second.join("lora")).unwrap();
    let adapters = adapters.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("sd2."));
    // each file once, the base, and one file at half its strength
    assert_eq!(compared, adapters.count() + 2);
    goldens.finish();
}

/// The original code's names of all layers, as the files of single checkpoints have them.
#[test]
fn names_of_the_original_code() {
    let Some((second, goldens)) = both() else { return };
    let maps = json(&second.join("single_file/KEYMAP.json"))["maps"].take();
    for variant in ["sd15", "sd2"] {
        let files = ModelFiles::read(&ModelLocation::Disk(goldens.dir.join(format!("{variant}-tiny")))).unwrap();
        let paths: Vec<String> =
            files.weights["unet"].keys().filter_map(|name| Some(name.strip_suffix(".weight")?.to_string())).collect();
        let ours = rldiff::models::lora::ldm_names::layers(paths.iter());
        let mut compared = 0;
        for (theirs, path) in maps[variant].as_object().unwrap() {
            let theirs = theirs.strip_prefix("model.diffusion_model.").and_then(|name| name.strip_suffix(".weight"));
            let (Some(theirs), Some(path)) = (theirs, path.as_str().unwrap().strip_suffix(".weight")) else { continue };
            assert_eq!(ours.get(theirs).map(String::as_str), Some(path), "{variant}: {theirs}");
            compared += 1;
        }
        assert_eq!(compared, paths.len(), "{variant}");
    }
}
