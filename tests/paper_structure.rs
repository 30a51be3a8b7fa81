//! The paper's joint run, slurm/joint.toml, as it stands except for sizes and paths: on the miniature, with ImageReward,
//! UniDet and a classifier of random weights at reduced size, prompts from a parquet file in DiffusionDB's form, pairs
//! from a shard with scores.

mod common;

use std::{
    fs::{self, File},
    io::Cursor,
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::Duration,
};

use common::{descendants, empty_folder, reward_files, rldiff, run_within, runs::assert_same_run, set};
use image::{ImageFormat, Rgb, RgbImage};
use parquet::{
    data_type::{ByteArray, ByteArrayType, FloatType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use rldiff::telemetry::{read_metrics, RunFiles};
use tch::{CModule, Device, Kind, Tensor};

enum Column {
    Text(&'static str, Vec<String>),
    Number(&'static str, Vec<f32>),
}

fn write_parquet(path: &Path, columns: &[Column]) {
    let fields: Vec<String> = columns
        .iter()
        .map(|column| match column {
            Column::Text(name, _) => format!("required binary {name} (UTF8);"),
            Column::Number(name, _) => format!("required float {name};"),
        })
        .collect();
    let schema = Arc::new(parse_message_type(&format!("message m {{ {} }}", fields.join(" "))).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in columns {
        let mut out = group.next_column().unwrap().unwrap();
        match column {
            Column::Text(_, texts) => {
                let texts: Vec<ByteArray> = texts.iter().map(|t| ByteArray::from(t.as_str())).collect();
                out.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
            }
            Column::Number(_, numbers) => {
                out.typed::<FloatType>().write_batch(numbers, None, None).unwrap();
            }
        }
        out.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

/// Everything that slurm/joint.toml names, below `folder`.
fn write_inputs(folder: &Path) {
    reward_files::write_image_reward(folder, 21);
    reward_files::write_unidet(folder, false, 22);
    // four classes from the colours of the quarters
    tch::manual_seed(23);
    let weights = Tensor::randn([4, 12], (Kind::Float, Device::Cpu)) * 4.0;
    let mut classify = |inputs: &[Tensor]| {
        let quarters = inputs[0].adaptive_avg_pool2d([2, 2]).flatten(1, -1) - 0.5;
        vec![quarters.matmul(&weights.tr())]
    };
    let example = Tensor::rand([2, 3, 32, 32], (Kind::Float, Device::Cpu));
    let module = CModule::create_by_tracing("Classifier", "forward", &[example], &mut classify).unwrap();
    module.save(folder.join("classifier.pt")).unwrap();

    let rows = 0..60;
    write_parquet(
        &folder.join("metadata.parquet"),
        &[
            Column::Text("prompt", rows.clone().map(|i| format!("a painting of an ocean, number {i}")).collect()),
            Column::Number("prompt_nsfw", rows.clone().map(|i| if i % 10 == 0 { 2.0 } else { 0.01 }).collect()),
            Column::Number("image_nsfw", rows.map(|_| 0.02).collect()),
        ],
    );
    // the list of words that the run names drops the first
    let people = ["an Asian man with a hat", "a man in a black coat", "a woman on a bench", "two people near a kite"];
    fs::write(folder.join("people.txt"), people.join("\n") + "\n").unwrap();
    let shards = folder.join("pairs");
    fs::create_dir(&shards).unwrap();
    let mut builder = tar::Builder::new(File::create(shards.join("00000.tar")).unwrap());
    let keys: Vec<String> = (0..6).map(|i| format!("{i:09}")).collect();
    for (i, key) in keys.iter().enumerate() {
        let mut image = Cursor::new(Vec::new());
        let picture = RgbImage::from_fn(40, 40, |x, y| Rgb([(x * 6) as u8, (y * 6) as u8, (i * 40) as u8]));
        picture.write_to(&mut image, ImageFormat::Jpeg).unwrap();
        for (ending, content) in [("jpg", image.into_inner()), ("txt", format!("a kite number {i}").into_bytes())] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{key}.{ending}"), content.as_slice()).unwrap();
        }
    }
    builder.finish().unwrap();
    write_parquet(
        &shards.join("00000.parquet"),
        &[
            Column::Text("key", keys),
            Column::Text("status", vec!["success".into(); 6]),
            Column::Number("AESTHETIC_SCORE", vec![6.5, 5.0, 7.0, 6.0, 6.2, 4.0]),
        ],
    );
}

const SIZES: [&str; 32] = [
    "run.iterations=2",
    "run.lanes=2",
    "run.checkpoint_every=1",
    "run.keep_every=0",
    "model.path=embedded",
    "rollout.steps=4",
    "method.timesteps=2",
    // 4 steps have one that is far more sensitive than those of 50
    "method.max_sensitivity=4.0",
    "pretrain.batch_per_lane=2",
    "pretrain.data.folder=pairs",
    "evaluation.pictures=2",
    "evaluation.every=0",
    "trajectories.every=1",
    "task.preference.samples=4",
    "task.preference.evaluation_samples=4",
    "task.preference.prompts.path=metadata.parquet",
    "task.preference.prompts.held_out=8",
    "task.preference.reward.weights=image_reward.safetensors",
    "task.preference.reward.vocabulary=vocab.txt",
    "task.parity.samples=8",
    "task.parity.images_per_prompt=4",
    "task.parity.evaluation_samples=8",
    "task.parity.evaluation_images_per_prompt=4",
    "task.parity.prompts.path=people.txt",
    "task.parity.prompts.held_out=2",
    concat!("task.parity.prompts.drop_words=", env!("CARGO_MANIFEST_DIR"), "/slurm/ethnicity-words.txt"),
    "task.parity.reward.classifier={ name = 'torchscript', path = 'classifier.pt', classes = ['a', 'b', 'c', 'd'] }",
    "task.composition.samples=4",
    "task.composition.evaluation_samples=4",
    "task.composition.reward={ name = 'composition', weights = 'unidet.safetensors', labels = 'labels.json', \
     threshold = 0.0001, top = 0, channel_order = 'as_trained', short_side = 96, long_side = 160 }",
    "task.composition.prompts.held_out=82",
    "run.reward_limit=120.0",
];

#[test]
fn the_joint_run_with_its_three_networks() {
    let folder = empty_folder("paper-structure");
    write_inputs(&folder);
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/joint.toml");
    for ranks in [2, 1] {
        let mut command = rldiff(ranks, &folder);
        command.arg(config).args(set(&SIZES)).args(["--out", &format!("ranks-{ranks}")]);
        let done = run_within(command, Duration::from_secs(240)).expect_success("joint.toml");
        assert!(done.stderr.contains("4 pairs in 1 shards"), "{}", done.stderr);
        assert!(done.stderr.contains("people.txt: 4 lines: 3 prompts (2 held out)"), "{}", done.stderr);
    }
    let files = [2, 1].map(|ranks| RunFiles::new(folder.join(format!("ranks-{ranks}"))));
    assert_same_run(&files[0], &files[1], 2);
    let metrics = read_metrics(&files[0].metrics()).unwrap();
    let last = metrics.last().unwrap();
    let value = |name: &str| last.get(name).unwrap_or_else(|| panic!("no {name}"));
    for task in ["preference", "parity", "composition"] {
        let [mean, deviation] = ["mean", "std"].map(|what| value(&format!("{task}/reward_{what}")));
        println!("{task}: {mean} ± {deviation}");
        assert!(mean.is_finite() && deviation.is_finite());
    }
    assert_eq!(value("bad_rewards"), 0.0);
    let composition = value("composition/reward_mean");
    assert!(composition > 0.0 && composition < 1.0 && value("preference/reward_std") > 0.0);
}

/// The same with the face detector that slurm/joint.toml names, which finds few faces or none in the miniature's portraits of
/// 32×32: a picture without a face is charged √(1 − 1/4), the worst value.
#[test]
fn the_joint_run_with_a_face_detector() {
    let file = "faces/seeta_fd_frontal_v1.0.bin";
    let path = std::env::var_os("RLDIFF_TEST_DATA").map(|folder| Path::new(&folder).join(file));
    let Some(path) = path.filter(|path| path.is_file()) else {
        eprintln!("SKIPPED: RLDIFF_TEST_DATA does not name a folder with {file}");
        return;
    };
    let folder = empty_folder("paper-faces");
    write_inputs(&folder);
    let classifier = format!(
        "task.parity.reward.classifier={{ name = 'skin_tone', face_model = '{}', min_face_pixels = 20, face_score = 2.0, \
         cuts = [-30.0, 10.0, 41.0] }}",
        path.display()
    );
    let mut command = rldiff(2, &folder);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/joint.toml")).args(set(&SIZES));
    command.args(set(&[&classifier])).args(["--out", "faces"]);
    run_within(command, Duration::from_secs(240)).expect_success("faces");
    let metrics = read_metrics(&RunFiles::new(folder.join("faces")).metrics()).unwrap();
    let value = |name: &str| metrics[1].get(name).unwrap_or_else(|| panic!("no {name}"));
    let (missing, reward) = (value("parity/miss_rate"), value("parity/reward_mean"));
    println!("{:.0} % of the pictures without a face, reward {reward}", 100.0 * missing);
    let worst = (1.0f64 - 0.25).sqrt();
    assert!((0.0..=1.0).contains(&missing) && reward <= -worst * missing + 1e-6 && reward >= -worst - 1e-6);
}

/// `rldiff check` opens what the run will open: it counts the rewards' networks, decodes a first batch of pairs, and notices a
/// detector that does not know the prompts' objects.
#[test]
fn check_opens_what_the_run_needs() {
    let folder = empty_folder("paper-check");
    write_inputs(&folder);
    let check = |extra: &[&str]| {
        let mut command = rldiff(1, &folder);
        command.args(["check", concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/joint.toml")]);
        command.args(set(&[&SIZES[..], extra].concat()));
        run_within(command, Duration::from_secs(120))
    };
    let sound = check(&[]).expect_success("check");
    let line =
        |name: &str| sound.stdout.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
    println!("{}\n{}", line("weights of rewards"), line("pretraining pairs"));
    assert!(!line("weights of rewards").ends_with(" 0 B"), "{}", sound.stdout);
    assert!(line("pretraining pairs").ends_with("4 in shards; a first batch was decoded"), "{}", sound.stdout);
    let mistake = |extra: &str, wanted: &str| {
        let done = check(&[extra]);
        let errors = done.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(done.status.code() == Some(2) && errors == 1, "{}", done.stderr);
        assert!(done.stderr.contains(wanted), "{}", done.stderr);
    };
    let space = fs::read_to_string(folder.join("labels.json")).unwrap();
    let first = rldiff::prompts::paper::objects()[0].clone();
    fs::write(folder.join("other.json"), space.replace(&first, "flying saucer")).unwrap();
    mistake(
        "task.composition.reward.labels=other.json",
        &format!("other.json: no class for 1 of the prompts' 532 objects: {first:?}"),
    );
    mistake(
        "task.composition.prompts={ source = 'text', path = 'vocab.txt', held_out = 1, split_seed = 1, key = '', drop_words = '' }",
        "these name none",
    );
    fs::write(folder.join("pairs/00000.tar"), b"no archive").unwrap();
    mistake("run.seed=2", "00000.tar");
}

/// Peak of the proportional memory of all ranks together while the joint run with this list goes on, in MB, and the
/// seconds that it took.
fn peak_with(folder: &Path, ranks: usize, list: &str) -> (u64, f64) {
    let mut command = rldiff(ranks, folder);
    let path = format!("task.preference.prompts.path={list}");
    let settings = [&SIZES[..], &[&path, "run.lanes=4", "task.parity.samples=16"]].concat();
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/slurm/joint.toml")).args(set(&settings));
    command.args(["--out", &format!("with-{list}")]);
    let ended = Arc::new(AtomicBool::new(false));
    let watcher = {
        let ended = ended.clone();
        std::thread::spawn(move || {
            let mut peak = 0;
            while !ended.load(Ordering::Relaxed) {
                let of = |pid: &i32| -> Option<u64> {
                    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
                    text.lines().find(|line| line.starts_with("Pss:"))?.split_whitespace().nth(1)?.parse().ok()
                };
                let own = std::process::id() as i32;
                let all = descendants(own);
                peak = peak.max(all.iter().filter(|pid| **pid != own).filter_map(of).sum::<u64>() / 1024);
                std::thread::sleep(Duration::from_millis(20));
            }
            peak
        })
    };
    let run = run_within(command, Duration::from_secs(280));
    ended.store(true, Ordering::Relaxed);
    let seconds = run.took.as_secs_f64();
    run.expect_success(list);
    (watcher.join().unwrap(), seconds)
}

/// As many prompts as DiffusionDB has, on a host with four ranks: what they add to the memory of all ranks together and
/// to the time of a run.
#[test]
#[ignore = "writes 200 MB, reads them on four ranks"]
fn a_million_and_a_half_prompts_on_a_host() {
    let folder = empty_folder("many-prompts");
    write_inputs(&folder);
    let rows = 0..1_500_000u64;
    let words =
        |n: u64| (0..14u64).map(|k| format!(" {:x}", (n + 1) * (k * 7919 + 104_729) % 999_983)).collect::<String>();
    write_parquet(
        &folder.join("many.parquet"),
        &[
            Column::Text("prompt", rows.clone().map(|i| format!("prompt {i}{}", words(i))).collect()),
            Column::Number("prompt_nsfw", rows.clone().map(|_| 0.01).collect()),
            Column::Number("image_nsfw", rows.map(|_| 0.02).collect()),
        ],
    );
    let (few, few_seconds) = peak_with(&folder, 4, "metadata.parquet");
    let (many, many_seconds) = peak_with(&folder, 4, "many.parquet");
    println!("4 ranks: {few} MB and {few_seconds:.1} s with 60 prompts, {many} MB and {many_seconds:.1} s with 1.5 M");
    assert!(many - few < 1000 && many_seconds - few_seconds < 10.0);
}

/// `rldiff score` with each of the networks, on picture files of two sizes.
#[test]
fn score_judges_files_by_each_network() {
    let folder = empty_folder("score-networks");
    write_inputs(&folder);
    reward_files::write_aesthetic(&folder, 24);
    let images = folder.join("images");
    fs::create_dir(&images).unwrap();
    for (name, side) in [("a.png", 50), ("b.webp", 50), ("c.jpg", 77)] {
        let shade = name.as_bytes()[0] as u32;
        RgbImage::from_fn(side, 60, |x, y| Rgb([(x * 3 + shade) as u8, (y * 4) as u8, (x * y / 9) as u8]))
            .save(images.join(name))
            .unwrap();
    }
    let prompt = r#"{"text": "an apple next to a book", "objects": ["apple", "book"]}"#;
    fs::write(folder.join("prompts"), prompt).unwrap();
    for reward in [
        "{ name = 'image_reward', weights = 'image_reward.safetensors', vocabulary = 'vocab.txt' }",
        "{ name = 'aesthetic', clip = 'clip.safetensors', head = 'head.safetensors' }",
        "{ name = 'composition', weights = 'unidet.safetensors', labels = 'labels.json', threshold = 0.1, top = 0, \
         channel_order = 'rgb', short_side = 64, long_side = 90 }",
    ] {
        let mut command = rldiff(1, &folder);
        command.args(["score", "--reward", reward, "--json", "out.json", "images", "prompts"]);
        run_within(command, Duration::from_secs(120)).expect_success(reward);
        let found: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("out.json")).unwrap()).unwrap();
        let scores: Vec<f64> = (0..3).map(|i| found["images"][i]["reward"].as_f64().unwrap()).collect();
        println!("{scores:?}");
        assert!(scores[0] != scores[2], "{reward}: {scores:?}");
    }
    let mut command = rldiff(1, &folder);
    let wrong = "{ name = 'aesthetic', clip = 'image_reward.safetensors', head = '' }";
    command.args(["score", "--reward", wrong, "images", "prompts"]);
    let done = run_within(command, Duration::from_secs(120));
    assert!(done.status.code() == Some(2) && done.stderr.lines().count() == 1, "{}", done.stderr);
    assert!(done.stderr.contains("image_reward.safetensors: neither visual_projection.weight nor"), "{}", done.stderr);
}

/// The two methods that differentiate through the reward, through ImageReward and through a sum with the aesthetic score.
#[test]
fn refl_and_draft_train_on_the_networks() {
    let folder = empty_folder("differentiable-networks");
    reward_files::write_image_reward(&folder, 25);
    reward_files::write_aesthetic(&folder, 25);
    let image_reward = "{ name = 'image_reward', weights = 'image_reward.safetensors', vocabulary = 'vocab.txt' }";
    let aesthetic = "{ name = 'aesthetic', clip = 'clip.safetensors', head = 'head.safetensors' }";
    let sum = format!(
        "{{ name = 'sum', normalise = false, parts = [{{ weight = 1.0, reward = {image_reward} }}, \
         {{ weight = 0.5, reward = {aesthetic} }}] }}"
    );
    for (method, reward) in [("refl", image_reward), ("draft", &sum)] {
        let config = format!("{}/slurm/miniature-{method}.toml", env!("CARGO_MANIFEST_DIR"));
        let reward = format!("task.preference.reward={reward}");
        let settings = [
            "run.iterations=2",
            "run.lanes=2",
            "rollout.steps=3",
            "evaluation.every=0",
            "evaluation.pictures=1",
            "pretrain.batch_per_lane=1",
            "task.preference.samples=4",
            "task.composition.samples=2",
            "task.parity.samples=32",
            "task.preference.evaluation_samples=2",
            "task.composition.evaluation_samples=2",
            "task.parity.evaluation_samples=16",
            reward.as_str(),
        ];
        let mut command = rldiff(1, &folder);
        command.args(["train", &config]).args(set(&settings)).args(["--out", method]);
        run_within(command, Duration::from_secs(240)).expect_success(method);
        let metrics = read_metrics(&RunFiles::new(folder.join(method)).metrics()).unwrap();
        let norm = metrics.last().unwrap().get("gradient_norm").unwrap();
        println!("{method}: gradient norm {norm}");
        assert!(norm.is_finite() && norm > 0.0);
    }
}
