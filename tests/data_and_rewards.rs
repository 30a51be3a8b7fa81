//! A user's own prompts, pairs and rewards in whole runs: a reward written in Python, shards of pairs, sums of rewards,
//! `rldiff score`.

mod common;

use std::{
    fs,
    io::Cursor,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{empty_folder, one_at_a_time, rldiff, run_within, set, Finished, SMALL};
use image::{ImageFormat, Rgb, RgbImage};
use rldiff::telemetry::{read_metrics, RunFiles};

const LIMIT: Duration = Duration::from_secs(240);

fn run(ranks: usize, folder: &Path, args: &[&str]) -> Finished {
    let _alone = one_at_a_time();
    let mut command = rldiff(ranks, folder);
    command.args(args);
    run_within(command, LIMIT)
}

fn train(ranks: usize, folder: &Path, out: &str, settings: &[&str]) -> Finished {
    let settings: Vec<&str> = SMALL.iter().copied().chain(settings.iter().copied()).collect();
    run(ranks, folder, &[&["--out", out][..], &set(&settings)].concat())
}

/// All values of the last iteration that are no times.
fn last_metrics(out: &Path) -> Vec<(String, f64)> {
    let all = read_metrics(&RunFiles::new(out).metrics()).unwrap();
    let timed = |name: &str| name.starts_with("seconds/") || name.starts_with("background/");
    let measured = |name: &str| timed(name) || ["samples_per_second", "tflops"].contains(&name);
    let kept = all.last().unwrap().iter().filter(|(name, _)| !measured(name));
    kept.map(|(name, value)| (name.to_string(), value)).collect()
}

fn python_reward(restarts: usize) -> String {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/command_reward.py");
    format!(
        "{{ name = \"command\", command = [\"python3\", {:?}], timeout_seconds = 30.0, start_timeout_seconds = 30.0, \
         restarts = {restarts} }}",
        example.display().to_string()
    )
}

fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: there is no python3");
    }
    found
}

/// The example as a reward of a training run: the same bits at one and two ranks.
#[test]
fn a_reward_in_python_trains() {
    if !has_python() {
        return;
    }
    let folder = empty_folder("python-reward");
    let reward = format!("task.preference.reward={}", python_reward(0));
    train(1, &folder, "one", &[&reward]).expect_success("1 rank");
    train(2, &folder, "two", &[&reward]).expect_success("2 ranks");
    let one = last_metrics(&folder.join("one"));
    let mean = one.iter().find(|(name, _)| name.contains("preference") && name.contains("reward_mean"));
    let mean = mean.unwrap_or_else(|| panic!("{one:?}")).1;
    assert!(mean > 0.05 && mean < 0.95, "brightness {mean}");
    assert_eq!(one, last_metrics(&folder.join("two")));
}

/// The shipped programs by themselves: the judge by a vision-language model against a server that misbehaves in every way, the others
/// against doubles of what they need; with RLDIFF_GOLDENS naming a set of rewards also against its tables of rules.
#[test]
fn the_shipped_rewards_bear_with_what_they_ask() {
    if !has_python() {
        return;
    }
    for script in ["judge_reward.py", "example_rewards.py"] {
        let mut command = Command::new("python3");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(script));
        let set = std::env::var_os("RLDIFF_GOLDENS").map(|dir| Path::new(&dir).join("goldens/rules.json"));
        command.args(set.filter(|rules| rules.is_file()));
        let done = run_within(command, Duration::from_secs(400)).expect_success(script);
        print!("{}", done.stdout);
    }
}

/// The example as a server that all ranks share: what the process of each rank computes. It is gone and comes back in a
/// second run, which waits for it.
#[test]
fn a_reward_server_is_shared_by_the_ranks() {
    if !has_python() {
        return;
    }
    let folder = empty_folder("reward-server");
    let socket = format!("unix:{}", folder.join("s").display());
    // a port that was free a moment ago
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let by_http = format!("http://{port}/");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/command_reward.py");
    let start = |address: &str| Ended(Command::new("python3").arg(&example).arg(address).spawn().unwrap());
    let reward = |address: &str| {
        format!(
            "task.preference.reward={{ name = \"server\", address = {address:?}, timeout_seconds = 30.0, \
             start_timeout_seconds = 30.0, restarts = 1 }}"
        )
    };
    let server = start(&socket);
    train(2, &folder, "two", &[&reward(&socket)]).expect_success("2 ranks");
    drop(server);
    let _ = fs::remove_file(folder.join("s"));
    let _servers = [start(&socket), start(&by_http)];
    train(1, &folder, "one", &[&reward(&socket)]).expect_success("1 rank");
    train(2, &folder, "http", &[&reward(&by_http)]).expect_success("2 ranks by HTTP");
    train(1, &folder, "process", &[&format!("task.preference.reward={}", python_reward(0))]).expect_success("process");
    let two = last_metrics(&folder.join("two"));
    for other in ["one", "http", "process"] {
        assert_eq!(two, last_metrics(&folder.join(other)), "{other}");
    }
}

/// A process that is ended with the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Four pictures of known brightness, one of another size.
fn pictures(folder: &Path) -> PathBuf {
    let images = folder.join("images");
    fs::create_dir_all(&images).unwrap();
    for (name, size, value) in [("a.png", 20, 0), ("b.png", 20, 51), ("c.webp", 30, 102), ("d.png", 20, 255)] {
        RgbImage::from_pixel(size, size, Rgb([value; 3])).save(images.join(name)).unwrap();
    }
    fs::write(folder.join("prompts"), "one\ntwo\nthree\nfour\n").unwrap();
    images
}

#[test]
fn score_judges_files_at_every_number_of_ranks() {
    if !has_python() {
        return;
    }
    let folder = empty_folder("score");
    pictures(&folder);
    for ranks in [1, 2] {
        let args = ["score", "--reward", &python_reward(0), "--batch", "2", "--json", "out.json", "images", "prompts"];
        let done = run(ranks, &folder, &args).expect_success("score");
        assert_eq!(done.stdout.lines().count(), 5, "{}", done.stdout);
        let found: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("out.json")).unwrap()).unwrap();
        let rewards: Vec<f64> = (0..4).map(|i| found["images"][i]["reward"].as_f64().unwrap()).collect();
        for (reward, expected) in rewards.iter().zip([0.0, 0.2, 0.4, 1.0]) {
            // f32 on its way back
            assert!((reward - expected).abs() < 1e-6, "{rewards:?}");
        }
        assert_eq!(found["images"][2]["prompt"], "three");
        assert!((found["mean"].as_f64().unwrap() - 0.4).abs() < 1e-6);
    }
    for name in ["jpeg_compressibility", "jpeg_incompressibility", "colorfulness"] {
        run(1, &folder, &["score", "--reward", name, "images", "prompts"]).expect_success(name);
    }
}

#[test]
fn mistakes_are_one_line_and_exit_code_2() {
    let folder = empty_folder("data-mistakes");
    pictures(&folder);
    fs::write(folder.join("empty"), "\n").unwrap();
    fs::write(folder.join("bad.csv"), "id,text\n1,x\n").unwrap();
    let csv =
        r#"{ source = "csv", path = "bad.csv", column = "prompt", held_out = 0, split_seed = 1, drop_words = "" }"#;
    let text = r#"{ source = "text", path = "empty", key = "", held_out = 0, split_seed = 1, drop_words = "" }"#;
    let shards = "{ source = \"webdataset\", folder = \"images\", score_column = \"\", score_min = 0.0, \
                  drop_words = \"\", threads = 1, prefetch = 1 }";
    let command = "{ name = \"command\", command = [\"false\"], timeout_seconds = 1.0, start_timeout_seconds = 5.0, \
                   restarts = 3 }";
    let train_with = |setting: &str| ["--set".to_string(), setting.to_string()].to_vec();
    let score = |reward: &str| ["score", "--reward", reward, "images", "prompts"].map(String::from).to_vec();
    for (args, wanted) in [
        (train_with(&format!("task.preference.prompts={csv}")), "columns are id, text"),
        (train_with(&format!("task.preference.prompts={text}")), "there are no prompts: empty: 1 line"),
        (train_with(&format!("pretrain.data={shards}")), "there is no .tar file in images"),
        (
            train_with(&format!("task.preference.reward={command}")),
            "reward command \"false\": at its start (start_timeout_seconds = 5): it has ended: exit code 1",
        ),
        (train_with("task.preference.reward={ name = \"torchscript\", path = \"prompts\" }"), "no TorchScript module"),
        (train_with("task.preference.reward={ name = \"sum\", normalise = true, parts = [] }"), "parts must name"),
        (score("beauty"), "unknown variant `beauty`"),
        (score("{ name = \"torchscript\", path = \"none.pt\" }"), "reward.path: none.pt does not exist"),
        (["score", "--reward", "colorfulness", "images", "none"].map(String::from).to_vec(), "cannot read none"),
        (
            ["score", "--reward", "colorfulness", "images/a.png", "prompts"].map(String::from).to_vec(),
            "4 prompts for 1",
        ),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = run(1, &folder, &args);
        assert_eq!(done.status.code(), Some(2), "{args:?}\n{}\n{}", done.stdout, done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}\n{}", done.stderr);
        assert!(done.stderr.contains(wanted), "{args:?}: no {wanted:?} in {}", done.stderr);
    }
    let mixed = run(1, &folder, &["score", "--reward", "colorfulness", "--group", "2", "images", "prompts"]);
    assert!(!mixed.status.success() && mixed.stderr.contains("d.png: another size"), "{}", mixed.stderr);
}

/// Ten pairs in two shards, one of them broken.
fn shards(folder: &Path) {
    for shard in 0..2 {
        let mut builder = tar::Builder::new(fs::File::create(folder.join(format!("{shard:05}.tar"))).unwrap());
        for i in shard * 5..shard * 5 + 5 {
            let mut image = Cursor::new(Vec::new());
            let picture = RgbImage::from_fn(48, 40, |x, y| Rgb([(x * 5) as u8, (y * 6) as u8, (i * 25) as u8]));
            picture.write_to(&mut image, ImageFormat::Jpeg).unwrap();
            let mut image = image.into_inner();
            if i == 4 {
                image.truncate(60);
            }
            for (ending, content) in [("jpg", image), ("txt", format!("an apple number {i}").into_bytes())] {
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                builder.append_data(&mut header, format!("{i:09}.{ending}"), content.as_slice()).unwrap();
            }
        }
        builder.finish().unwrap();
    }
}

/// Pairs from shards: the same bits at one and two ranks and after a resume; the broken picture is named and passed over.
#[test]
fn pairs_from_shards_train() {
    let folder = empty_folder("shards");
    shards(&folder);
    let data = "pretrain.data={ source = \"webdataset\", folder = \".\", score_column = \"\", score_min = 0.0, \
                drop_words = \"\", threads = 2, prefetch = 3 }";
    let settings = [data, "pretrain.steps=3", "trajectories.every=0"];
    let one = train(1, &folder, "one", &settings).expect_success("1 rank");
    assert!(one.stderr.contains("10 pairs in 2 shards"), "{}", one.stderr);
    assert!(one.stderr.contains("00000.tar: 000000004.jpg: broken image: "), "{}", one.stderr);
    train(2, &folder, "two", &settings).expect_success("2 ranks");
    train(1, &folder, "part", &[&settings[..], &["run.iterations=1"]].concat()).expect_success("half");
    let more: Vec<&str> = SMALL.iter().copied().chain(settings).collect();
    run(1, &folder, &[&["--out", "part", "--resume", "auto"][..], &set(&more)].concat()).expect_success("resumed");
    let whole = last_metrics(&folder.join("one"));
    assert!(whole.iter().any(|(name, _)| name.contains("pretrain")), "{whole:?}");
    assert_eq!(whole, last_metrics(&folder.join("two")));
    assert_eq!(whole, last_metrics(&folder.join("part")));
}

/// Pairs that went through VAE and text encoder once: the same shards at one and two ranks, an interrupted command goes
/// on, and a run trains on them with the same bits at one and two ranks and after a resume.
#[test]
fn encoded_pairs_train() {
    let folder = empty_folder("encoded");
    shards(&folder);
    let data = "pretrain.data={ source = \"webdataset\", folder = \".\", score_column = \"\", score_min = 0.0, \
                drop_words = \"\", threads = 2, prefetch = 3 }";
    let encode = |ranks: usize, out: &str, more: &[&str]| {
        let args = [&["encode", "--out", out, "--per-shard", "4"][..], more, &set(&[data])].concat();
        run(ranks, &folder, &args)
    };
    let one = encode(1, "one", &[]).expect_success("1 rank");
    assert!(one.stdout.contains("3 shards written to one"), "{}", one.stdout);
    assert!(
        one.stderr.contains("000000004.jpg: broken image: ") && one.stderr.contains("3 of 4 pairs"),
        "{}",
        one.stderr
    );
    encode(2, "two", &[]).expect_success("2 ranks");
    for shard in ["two/pairs-00001.h5", "two/pairs-00002.h5"] {
        fs::remove_file(folder.join(shard)).unwrap();
    }
    let mut stopped = rldiff(1, &folder);
    stopped.args(["encode", "--out", "two", "--per-shard", "4"]).args(set(&[data]));
    stopped.env("RLDIFF_FAULT", "at=encode,nth=2,kind=term");
    let stopped = run_within(stopped, LIMIT);
    assert_eq!(stopped.status.code(), Some(75), "{}", stopped.stderr);
    for said in ["SIGTERM: leaving at the next batch of pairs", "the same command goes on where this one has stopped"] {
        assert!(stopped.stderr.contains(said), "{}", stopped.stderr);
    }
    assert!(folder.join("two/pairs-00001.h5").exists() && !folder.join("two/pairs-00002.h5").exists());
    let rest = encode(1, "two", &[]).expect_success("the rest");
    assert!(rest.stdout.contains("1 shards written"), "{}", rest.stdout);
    encode(1, "exact", &["--precision", "f32"]).expect_success("f32");
    let other = run(1, &folder, &[&["encode", "--out", "one", "--per-shard", "5"][..], &set(&[data])].concat());
    assert!(
        other.status.code() == Some(2)
            && other.stderr.contains("pairs-00000.h5 is there and was made of something else")
    );

    let encoded = |name: &str| format!("pretrain.data={{ source = \"encoded\", folder = \"{name}\" }}");
    let more = ["pretrain.steps=3", "trajectories.every=0"];
    let settings = |name: &str| [vec![encoded(name)], more.map(String::from).to_vec()].concat();
    let run_on = |ranks: usize, data: &str, out: &str, further: &[&str]| {
        let settings = settings(data);
        let settings: Vec<&str> = settings.iter().map(String::as_str).chain(further.iter().copied()).collect();
        train(ranks, &folder, out, &settings)
    };
    let done = run_on(1, "one", "run-one", &[]).expect_success("1 rank");
    assert!(done.stderr.contains("one: 9 encoded pairs in 3 shards"), "{}", done.stderr);
    run_on(2, "two", "run-two", &[]).expect_success("2 ranks");
    run_on(1, "exact", "run-exact", &[]).expect_success("f32");
    run_on(1, "one", "part", &["run.iterations=1"]).expect_success("half");
    let all: Vec<String> = SMALL.iter().map(|s| s.to_string()).chain(settings("one")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    run(1, &folder, &[&["--out", "part", "--resume", "auto"][..], &set(&all)].concat()).expect_success("resumed");
    let [whole, two, part, exact] =
        ["run-one", "run-two", "part", "run-exact"].map(|out| last_metrics(&folder.join(out)));
    assert_eq!(whole, two);
    assert_eq!(whole, part);
    let loss = |metrics: &[(String, f64)]| {
        metrics.iter().find(|(name, _)| name.contains("pretrain") && name.contains("loss")).unwrap().1
    };
    println!("L_pre {} in f16, {} in f32", loss(&whole), loss(&exact));
    // f16 has 11 bits; observed 2e-5 of it
    assert!((loss(&whole) - loss(&exact)).abs() < 1e-3 * loss(&exact) && whole != exact);

    // another VAE
    let model = folder.join("model");
    for (path, bytes) in rldiff::miniature::EMBEDDED_MODEL {
        let path = model.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut bytes = bytes.to_vec();
        if path.ends_with("vae/diffusion_pytorch_model.safetensors") {
            let last = bytes.len() - 4;
            bytes[last..].copy_from_slice(&0.5f32.to_le_bytes());
        }
        fs::write(path, bytes).unwrap();
    }
    let done = run_on(1, "one", "other", &["model.path=model"]);
    assert!(done.status.code() == Some(2), "{}", done.stderr);
    assert!(
        done.stderr.contains("one was encoded by another VAE or text encoder than the run's model has"),
        "{}",
        done.stderr
    );
}

/// A list of prompts is read once per host: the same run at one and two ranks, nothing stays in the temporary folder, a
/// mistake is one line.
#[test]
fn ranks_share_a_list_of_prompts() {
    let folder = empty_folder("shared-list");
    let temporary = folder.join("tmp");
    fs::create_dir(&temporary).unwrap();
    fs::write(folder.join("list"), (0..50).map(|i| format!("a kite at the beach {i}\n")).collect::<String>()).unwrap();
    let prompts = |file: &str| {
        format!(
            "task.preference.prompts={{ source = \"text\", path = \"{file}\", key = \"\", held_out = 5, \
             split_seed = 1, drop_words = \"\" }}"
        )
    };
    let run_with = |ranks: usize, out: &str, file: &str| {
        let (prompts, _alone) = (prompts(file), one_at_a_time());
        let settings: Vec<&str> = SMALL.iter().copied().chain([prompts.as_str()]).collect();
        let mut command = rldiff(ranks, &folder);
        command.env("TMPDIR", &temporary).args(["--out", out]).args(set(&settings));
        run_within(command, LIMIT)
    };
    run_with(1, "one", "list").expect_success("1 rank");
    run_with(2, "two", "list").expect_success("2 ranks");
    assert_eq!(last_metrics(&folder.join("one")), last_metrics(&folder.join("two")));
    let left: Vec<_> = fs::read_dir(&temporary).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("prompts")), "{left:?}");
    for file in ["none", "tmp/empty"] {
        fs::write(temporary.join("empty"), "").unwrap();
        let done = run_with(2, "bad", file);
        assert_eq!(done.status.code(), Some(2), "{}", done.stderr);
        let lines: Vec<&str> = done.stderr.lines().filter(|line| line.starts_with("error")).collect();
        assert!(lines.len() == 1 && lines[0].contains(file), "{}", done.stderr);
    }
}

/// A sum of rewards of very different scales, plain and normalised: kilobytes drown colour in the plain one only.
#[test]
fn sums_of_rewards_train() {
    let folder = empty_folder("sums");
    let reward = |normalise: bool| {
        format!(
            "task.preference.reward={{ name = \"sum\", normalise = {normalise}, parts = [ \
             {{ weight = 1.0, reward = {{ name = \"colorfulness\" }} }}, \
             {{ weight = 1.0, reward = {{ name = \"jpeg_compressibility\" }} }} ] }}"
        )
    };
    for (name, ranks, normalise) in [("plain", 1, false), ("one", 1, true), ("two", 2, true)] {
        train(ranks, &folder, name, &[&reward(normalise), "task.preference.samples=8"]).expect_success(name);
    }
    let [plain, one, two] = ["plain", "one", "two"].map(|name| last_metrics(&folder.join(name)));
    assert_eq!(one, two, "1 and 2 ranks");
    assert_ne!(plain, one, "normalising the parts changes the run");
    let value = |metrics: &[(String, f64)], part: &str| {
        let found = metrics.iter().find(|(name, _)| name.contains("preference") && name.ends_with(part));
        found.unwrap_or_else(|| panic!("no {part} in {metrics:?}")).1
    };
    for metrics in [&plain, &one] {
        let parts = value(metrics, "part_0_colorfulness") + value(metrics, "part_1_jpeg_compressibility");
        // both are means over 8 pictures, of f32 and of f64
        assert!((parts - value(metrics, "reward_mean")).abs() < 1e-5);
    }
}

/// The paper's own prompts in a config.
#[test]
fn the_papers_prompts_are_a_source() {
    let folder = empty_folder("paper-prompts");
    let args = [
        &["check"][..],
        &set(&[
            "task.preference.prompts={ source = \"compositions\", held_out = 82, split_seed = 1 }",
            "task.parity.prompts={ source = \"occupations\", held_out = 10, split_seed = 1 }",
        ]),
    ]
    .concat();
    let done = run(1, &folder, &args).expect_success("check");
    assert!(done.stdout.contains("1010250 prompts to train on"), "{}", done.stdout);
    assert!(done.stdout.contains("90 prompts to train on, 10 held out"), "{}", done.stdout);
}
