//! `rldiff score`: what a reward says of image files.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::{device_args::DeviceArgs, numbers::whole, Failure, OrMistake};
use crate::{
    comm::{agree, all_made, Communicator},
    config::{bounds, needs::ensure_here, validate::validate_reward, RewardConfig},
    excerpt::{one_line, IN_MESSAGES},
    folders::{can_be_file, outputs},
    image_file,
    prompts::Prompt,
    python_json,
    rewards::{
        registry::{build, Place},
        Reward,
    },
    telemetry::{write_atomic, Estimate},
    text_file,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// A reward as in a config: its name, or a table such as '{ name = "torchscript", path = "reward.pt" }'.
    #[arg(long, value_name = "REWARD")]
    reward: String,
    /// A folder of images (JPEG, PNG, WebP; in the order of their names), or one image.
    #[arg(value_name = "IMAGES")]
    images: PathBuf,
    /// File with a prompt per image, or with one for all of them: plain lines, or JSON lines as
    /// {"text": "a cat near a dog", "objects": ["cat", "dog"]}.
    #[arg(value_name = "PROMPTS")]
    prompts: PathBuf,
    /// Consecutive images that a reward over groups (parity) judges together; they must be of one size.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
    group: usize,
    /// Images given to the reward at once; a multiple of --group is used.
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
    batch: usize,
    /// Also write the figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

const ENDINGS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// A batch's result on its way to rank 0; bits, because JSON has no NaN.
#[derive(Serialize, Deserialize)]
struct Judged {
    first: usize,
    rewards: Vec<u32>,
    diagnostics: Vec<(String, Vec<u32>)>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let json = args.json.as_deref().filter(|_| comm.rank() == 0);
    agree(comm, json.map_or(Ok(()), can_be_file)).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    let (files, prompts, mut reward) = all_made(comm, prepare(&args, device)).or_mistake()?;

    let per_batch = args.batch.next_multiple_of(args.group);
    let mut mine = Vec::new();
    for (number, first) in (0..files.len()).step_by(per_batch).enumerate() {
        if number % comm.size() == comm.rank() {
            let end = files.len().min(first + per_batch);
            judge(&files, &prompts, first..end, args.group, reward.as_mut(), &mut mine)?;
        }
    }
    let gathered = comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
    agree(comm, if comm.rank() == 0 { report(&args, &files, &prompts, &gathered) } else { Ok(()) })?;
    Ok(())
}

type Prepared = (Vec<PathBuf>, Vec<Prompt>, Box<dyn Reward>);

fn prepare(args: &Args, device: Device) -> Result<Prepared> {
    let config = parse_reward(&args.reward).with_context(|| format!("--reward {}", args.reward))?;
    let files = list(&args.images)?;
    args.json.as_ref().map_or(Ok(()), |path| {
        outputs::may_replace(path, outputs::is_json_with(&["reward", "mean", "stderr", "images"]))
    })?;
    ensure!(
        files.len() % args.group == 0,
        "{} images do not make whole groups of {} (--group)",
        files.len(),
        args.group
    );
    let mut prompts = read_prompts(&args.prompts)?;
    if prompts.len() == 1 {
        prompts = vec![prompts[0].clone(); files.len()];
    }
    ensure!(prompts.len() == files.len(), "{} prompts for {} images", prompts.len(), files.len());
    let place = Place { task: "score", index: 0, seed: 0, device, group: args.group };
    let of_reward = || format!("--reward {}", args.reward);
    ensure_here(&config.needs("reward")).with_context(of_reward)?;
    let mut reward = build(&config, place).with_context(of_reward)?;
    check_against(reward.as_mut(), &files, &prompts).with_context(of_reward)?;
    Ok((files, prompts, reward))
}

/// Whether the reward can judge these prompts, and pictures of every size that the images have.
fn check_against(reward: &mut dyn Reward, files: &[PathBuf], prompts: &[Prompt]) -> Result<()> {
    let objects: BTreeSet<&String> = prompts.iter().flat_map(|prompt| &prompt.objects).collect();
    let objects: Vec<String> = objects.into_iter().cloned().collect();
    let nameless = prompts.iter().find(|prompt| prompt.objects.is_empty()).map(|prompt| prompt.text.as_str());
    reward.check_objects(&objects, nameless.filter(|_| !objects.is_empty()))?;
    let mut seen = BTreeSet::new();
    for file in files {
        let (width, height) = image_file::dimensions(file).with_context(|| file.display().to_string())?;
        if seen.insert((width, height)) {
            reward.check_size(i64::from(height), i64::from(width)).with_context(|| file.display().to_string())?;
        }
    }
    Ok(())
}

/// A name or an inline table.
fn parse_reward(text: &str) -> Result<RewardConfig> {
    #[derive(Deserialize)]
    struct Wrapped {
        reward: RewardConfig,
    }
    let value = match text.trim_start().starts_with('{') {
        true => text.to_string(),
        false => format!("{{ name = {text:?} }}"),
    };
    let wrapped: Wrapped = toml::from_str(&format!("reward = {value}"))
        .map_err(|e| anyhow::anyhow!("{}", e.message().split_whitespace().collect::<Vec<_>>().join(" ")))?;
    bounds::check(&wrapped.reward, "reward")?;
    validate_reward(&wrapped.reward, true)?;
    Ok(wrapped.reward)
}

fn list(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let entries = std::fs::read_dir(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut files = entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| {
        let ending = file.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str()))
    });
    files.sort();
    ensure!(!files.is_empty(), "there is no image ({}) in {}", ENDINGS.join(", "), path.display());
    Ok(files)
}

fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let lines = text_file::lines(path)?;
    ensure!(!lines.is_empty(), "{} holds no prompt", path.display());
    if let Some((number, _)) = lines.iter().enumerate().map(|(i, (number, _))| (*number, i + 1)).find(|(n, i)| n != i) {
        log::warn!("{}: blank lines, the first before line {number}, are no prompts of images", path.display());
    }
    let prompt = |(number, line): (usize, String)| match line.starts_with('{') {
        true => python_json::read(line.as_bytes()).with_context(|| format!("{}: line {number}", path.display())),
        false => Ok(Prompt { text: line, objects: Vec::new() }),
    };
    lines.into_iter().map(prompt).collect()
}

/// Scores a range of images, as many at once as have the same size.
fn judge(
    files: &[PathBuf],
    prompts: &[Prompt],
    range: std::ops::Range<usize>,
    group: usize,
    reward: &mut dyn Reward,
    results: &mut Vec<Judged>,
) -> Result<()> {
    let read = |index: usize| {
        let path = &files[index];
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        image_file::decode_whole(&bytes).with_context(|| path.display().to_string())
    };
    let images = range.clone().map(read).collect::<Result<Vec<_>>>()?;
    let mut start = 0;
    while start < images.len() {
        let size = images[start].dimensions();
        let mut end = start + images[start..].iter().take_while(|image| image.dimensions() == size).count();
        if end < images.len() && end % group != 0 {
            let other = range.start + end;
            end -= end % group;
            ensure!(end > start, "{}: another size than the first image of its group", files[other].display());
        }
        let first = range.start + start;
        let pixels: Vec<u8> = images[start..end].iter().flat_map(|image| image.as_raw().iter().copied()).collect();
        let shape = [(end - start) as i64, i64::from(size.1), i64::from(size.0), 3];
        let batch = Tensor::from_slice(&pixels).view(shape).permute([0, 3, 1, 2]).to_kind(Kind::Float) / 255.0;
        let ids: Vec<String> = files[first..range.start + end].iter().map(|f| f.display().to_string()).collect();
        let scores = reward.score_with_ids(&batch.contiguous(), &prompts[first..range.start + end], &ids)?;
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        let diagnostics = scores.diagnostics.into_iter().map(|(name, values)| (name, bits(values))).collect();
        results.push(Judged { first, rewards: bits(scores.rewards), diagnostics });
        start = end;
    }
    Ok(())
}

/// One line per image and the mean, on the screen and as JSON.
fn report(args: &Args, files: &[PathBuf], prompts: &[Prompt], gathered: &[Vec<u8>]) -> Result<()> {
    let mut judged: Vec<Judged> = Vec::new();
    for bytes in gathered {
        judged.extend(serde_json::from_slice::<Vec<Judged>>(bytes)?);
    }
    judged.sort_by_key(|j| j.first);
    let values = |bits: &[u32]| bits.iter().map(|&b| f32::from_bits(b)).collect::<Vec<f32>>();
    let rewards: Vec<f32> = judged.iter().flat_map(|j| values(&j.rewards)).collect();
    for ((file, prompt), reward) in files.iter().zip(prompts).zip(&rewards) {
        say!("{reward:>12.5}  {}  {}", file.display(), one_line(&prompt.text, IN_MESSAGES));
    }
    let units: Vec<f64> =
        rewards.chunks(args.group).map(|g| g.iter().map(|&r| f64::from(r)).sum::<f64>() / g.len() as f64).collect();
    let usable: Vec<f64> = units.iter().copied().filter(|r| r.is_finite()).collect();
    let estimate = Estimate::of(&usable);
    match usable.len() {
        0 => say!("{:>12}  mean: no reward is finite", "-"),
        1 => say!("{:>12.5}  mean of 1", estimate.mean),
        count => say!("{:>12.5}  mean ± {:.5} of {count}", estimate.mean, estimate.stderr),
    }
    let mut means: Vec<(String, f64, usize)> = Vec::new();
    for (name, bits) in judged.iter().flat_map(|j| &j.diagnostics) {
        let (sum, count) = values(bits).iter().fold((0.0, 0), |(s, n), &v| (s + f64::from(v), n + 1));
        match means.iter_mut().find(|(known, ..)| known == name) {
            Some(entry) => (entry.1, entry.2) = (entry.1 + sum, entry.2 + count),
            None => means.push((name.clone(), sum, count)),
        }
    }
    for (name, sum, count) in &means {
        say!("{:>12.5}  {name}", sum / *count as f64);
    }
    if let Some(path) = &args.json {
        let images = files.iter().zip(prompts).zip(&rewards).map(|((file, prompt), reward)| {
            json!({"image": file.display().to_string(), "prompt": prompt.text, "reward": reward})
        });
        let means: serde_json::Map<String, serde_json::Value> =
            means.iter().map(|(name, sum, count)| (name.clone(), json!(sum / *count as f64))).collect();
        let all = json!({
            "reward": args.reward, "mean": estimate.mean, "stderr": estimate.stderr, "diagnostics": means,
            "images": images.collect::<Vec<_>>(),
        });
        write_atomic(path, &serde_json::to_vec_pretty(&all)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reward_is_a_name_or_a_table() {
        assert_eq!(parse_reward("colorfulness").unwrap(), RewardConfig::Colorfulness {});
        let table = parse_reward(r#"{ name = "torchscript", path = "x.pt" }"#).unwrap();
        assert_eq!(table, RewardConfig::Torchscript { path: "x.pt".into() });
        for (text, wanted) in [
            ("beauty", "unknown variant `beauty`"),
            ("torchscript", "missing field `path`"),
            ("{ name = ", "inline table"),
            (r#"{ name = "sum", normalise = true, parts = [] }"#, "parts must name rewards"),
            (r#"{ name = "colorfulness", x = 1 }"#, "unknown field `x`"),
        ] {
            let e = format!("{:#}", parse_reward(text).unwrap_err());
            assert!(e.contains(wanted) && !e.contains('\n'), "{text}: {e}");
        }
    }
}
