//! The detector against the same network on torchvision's operators (tests/python/unidet.py; RLDIFF_TEST_PYTHON names a
//! Python with torch and torchvision, `make test` sets it up).

mod common;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{empty_folder, reward_files as files, run_within};
use rldiff::{
    config::{ChannelOrder, UniDetSettings},
    rewards::{
        composition::Detector,
        unidet::{boxes::nms, roi_align::roi_align, UniDet},
    },
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

fn python(arguments: &[&str]) -> Option<Value> {
    let Some(python) = std::env::var_os("RLDIFF_TEST_PYTHON").filter(|p| !p.is_empty()) else {
        eprintln!("SKIPPED: RLDIFF_TEST_PYTHON is not set (a Python with torch and torchvision)");
        return None;
    };
    let mut command = Command::new(PathBuf::from(python));
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/unidet.py")).args(arguments);
    let done = run_within(command, Duration::from_secs(240)).expect_success("unidet.py");
    let line = done.stdout.lines().rfind(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{}", done.stdout));
    Some(serde_json::from_str(line).unwrap())
}

fn settings(folder: &Path, weights: &str) -> UniDetSettings {
    UniDetSettings {
        weights: folder.join(weights).display().to_string(),
        labels: folder.join("labels.json").display().to_string(),
        threshold: 0.0001,
        top: 0,
        channel_order: ChannelOrder::AsTrained,
        short_side: 150,
        long_side: 190,
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn same_detections(split: bool, order: ChannelOrder) {
    let folder = empty_folder(&format!("unidet-{split}-{order:?}"));
    files::write_unidet(&folder, split, 7);
    // 150 · 97/70 would be 208 wide: the long side decides, 137 × 190
    let pictures = files::pictures(2, 70, 97);
    files::save(&folder.join("pictures.safetensors"), &BTreeMap::from([("pictures".into(), pictures.copy())]));
    let shown = if (order == ChannelOrder::AsTrained) == split { "rgb" } else { "bgr" };
    let Some(wanted) = python(&["detect", folder.to_str().unwrap(), shown, "150", "190", "40"]) else { return };
    for weights in ["unidet.safetensors", "unidet.pth"] {
        let choices = UniDetSettings { channel_order: order, ..settings(&folder, weights) };
        let detector = UniDet::load(&choices, Device::Cpu).unwrap();
        for (i, wanted) in wanted["pictures"].as_array().unwrap().iter().enumerate() {
            let bytes = (pictures.get(i as i64) * 255.0).round().to_kind(Kind::Uint8).permute([1, 2, 0]).contiguous();
            let rgb = Vec::<u8>::try_from(bytes.view([-1])).unwrap();
            let seen = detector.look(&rgb, [97, 70]).unwrap();
            assert_eq!(seen.boxes.size()[0], wanted["boxes"].as_i64().unwrap());
            let best = numbers(&wanted["best"]);
            let got = Vec::<f32>::try_from(seen.confidence.amax(0, false)).unwrap();
            let spread = best.iter().cloned().fold(0.0, f32::max) - best.iter().cloned().fold(1.0, f32::min);
            println!(
                "{weights}, picture {i}: {} boxes, {:e} apart, spread {spread}",
                wanted["boxes"],
                gap(&got, &best)
            );
            // f32 in another order of summation; observed 2e-7
            assert!(gap(&got, &best) < 1e-5 && spread > 0.2);
            let (mut boxes, mut scores) = (0.0f32, 0.0f32);
            let list = seen.list(0.0001, 40).unwrap();
            let wanted = wanted["list"].as_array().unwrap();
            assert_eq!((list.len(), wanted.len()), (40, 40));
            for ((row, class, score), wanted) in list.into_iter().zip(wanted) {
                assert_eq!(class, wanted[1].as_i64().unwrap());
                let found = Vec::<f32>::try_from(seen.boxes.get(row as i64)).unwrap();
                boxes = boxes.max(gap(&found, &numbers(&wanted[0])));
                scores = scores.max((score - wanted[2].as_f64().unwrap() as f32).abs());
            }
            println!("    list of 40: {boxes:e} pixels, {scores:e}");
            // observed 2e-5 pixels
            assert!(boxes < 5e-3 && scores < 1e-5);
        }
    }
}

#[test]
fn resnet_finds_what_torchvision_finds() {
    same_detections(false, ChannelOrder::AsTrained);
}

#[test]
fn resnest_finds_what_torchvision_finds() {
    same_detections(true, ChannelOrder::AsTrained);
}

#[test]
fn channels_in_the_other_order() {
    same_detections(true, ChannelOrder::Bgr);
}

/// ROIAlign and NMS by themselves: boxes inside, across and beyond the border, empty ones, equal ones, large and tiny.
#[test]
fn operators_are_torchvisions() {
    let folder = empty_folder("unidet-operators");
    tch::manual_seed(11);
    let features = Tensor::randn([5, 23, 31], (Kind::Float, Device::Cpu));
    let corner = Tensor::rand([400, 2], (Kind::Float, Device::Cpu)) * 260.0 - 30.0;
    let side = Tensor::rand([400, 2], (Kind::Float, Device::Cpu)).pow_tensor_scalar(3.0) * 250.0;
    let random = Tensor::cat(&[&corner, &(&corner + side)], 1);
    let special = [
        [10.0f32, 10.0, 10.0, 50.0],
        [0.0, 0.0, 248.0, 184.0],
        [240.0, 180.0, 500.0, 500.0],
        [-90.0, -90.0, -40.0, -40.0],
        [8.0, 8.0, 64.0, 64.0],
        [8.0, 8.0, 64.0, 64.0],
    ];
    let boxes = Tensor::cat(&[random, Tensor::from_slice(&special.concat()).view([-1, 4])], 0);
    // few different scores, so that ties occur
    let scores = (Tensor::rand([406], (Kind::Float, Device::Cpu)) * 50.0).floor() / 50.0;
    let given = [("features", &features), ("boxes", &boxes), ("scores", &scores)];
    files::save(&folder.join("operators.safetensors"), &given.map(|(n, t)| (n.to_string(), t.copy())).into());
    let Some(wanted) = python(&["operators", folder.to_str().unwrap()]) else { return };
    let pooled = Vec::<f32>::try_from(roi_align(&features, &boxes, 0.125).view([-1])).unwrap();
    let apart = gap(&pooled, &numbers(&wanted["pooled"]));
    println!("{} pooled numbers, {apart:e} apart", pooled.len());
    // sums of up to 31 bilinear samples of N(0, 1) numbers in f32; observed 5e-7
    assert!(apart < 1e-5);
    for (threshold, wanted) in [0.1, 0.5, 0.7].into_iter().zip(wanted["kept"].as_array().unwrap()) {
        let wanted: Vec<i64> = serde_json::from_value(wanted.clone()).unwrap();
        assert!(wanted.len() > 50 && wanted.len() < 404, "{}", wanted.len());
        assert_eq!(nms(&boxes, &scores, threshold).unwrap(), wanted, "{threshold}");
    }
}

#[test]
fn published_files_have_these_tensors() {
    let count = |shapes: files::Shapes| shapes.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum::<i64>();
    // the published files have 287,883,795 and 483,254,220 bytes, four a number and some for names
    let r50 = count(files::unidet(&files::unidet_r50()));
    let rs200 = count(files::unidet(&files::unidet_rs200()));
    println!("{r50} and {rs200} numbers");
    assert!((287_883_795 - 4 * r50).abs() < 300_000 && (483_254_220 - 4 * rs200).abs() < 1_500_000, "{r50} {rs200}");
}

/// The published sizes with random weights: they load, and look at a picture of 512 × 512 as one of 800 × 800.
#[test]
#[ignore = "writes files of 288 MB and 483 MB, looks for a minute"]
fn networks_of_the_published_size() {
    for (name, sizes) in [("R50", files::unidet_r50()), ("RS200", files::unidet_rs200())] {
        let folder = empty_folder(&format!("unidet-{name}"));
        files::save(&folder.join("unidet.safetensors"), &files::random(&files::unidet(&sizes), 9));
        std::fs::write(folder.join("labels.json"), files::label_space()).unwrap();
        let choices = UniDetSettings { short_side: 800, long_side: 1333, ..settings(&folder, "unidet.safetensors") };
        let started = std::time::Instant::now();
        let mut detector = UniDet::load(&choices, Device::Cpu).unwrap();
        let loaded = started.elapsed().as_secs_f64();
        let objects = ["apple", "book"].map(String::from).to_vec();
        let found = detector.detect(&files::pictures(1, 512, 512), &[&objects]).unwrap();
        let looked = started.elapsed().as_secs_f64() - loaded;
        println!("{name}: loaded in {loaded:.1} s, a picture in {looked:.1} s: {found:?}");
        assert!(found[0].iter().all(|d| (0.0..=1.0).contains(d)));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}

/// Objects by name, broken pictures, and mistakes in one line.
#[test]
fn names_and_mistakes() {
    let folder = empty_folder("unidet-names");
    files::write_unidet(&folder, false, 8);
    let choices = settings(&folder, "unidet.safetensors");
    let mut detector = UniDet::load(&choices, Device::Cpu).unwrap();
    let good = files::pictures(1, 40, 40);
    let images = Tensor::cat(&[&good, &(&good * f64::NAN)], 0);
    let names = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let (two, one) = (names(&["apple", "rifle, gun"]), names(&["zucchini"]));
    let found = detector.detect(&images, &[&two, &one]).unwrap();
    assert!(
        found[0].iter().all(|d| (0.0..=1.0).contains(d)) && found[0].len() == 2 && found[1][0].is_nan(),
        "{found:?}"
    );
    let e = format!("{:#}", detector.detect(&good, &[&names(&["unicorn"])]).unwrap_err());
    assert!(e.contains("labels.json: no class is called \"unicorn\""), "{e}");

    let failing =
        |choices: &UniDetSettings| format!("{:#}", UniDet::load(choices, Device::Cpu).err().expect("an error"));
    let shapes = files::unidet(&files::small_unidet(false));
    let mut tensors = files::random(&shapes, 8);
    tensors.remove("backbone.bottom_up.res4.0.conv2.norm.running_mean");
    tensors.remove("roi_heads.box_head.2.fc1.bias");
    files::save(&folder.join("less.safetensors"), &tensors);
    let e = failing(&settings(&folder, "less.safetensors"));
    assert!(e.contains("2 of ") && e.contains("res4.0.conv2.norm.running_mean, roi_heads.box_head.2.fc1.bias"), "{e}");
    std::fs::write(folder.join("labels.json"), r#"{"categories": [{"id": 0, "name": "_x_"}]}"#).unwrap();
    let e = failing(&choices);
    assert!(e.contains("labels.json names 1 classes") && e.contains("has 722"), "{e}");
    std::fs::write(folder.join("labels.json"), "[]").unwrap();
    assert!(failing(&choices).contains("is no label space"));
}
