//! `rldiff sample`: pictures from prompts.

use std::path::PathBuf;

use anyhow::{bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{device_args::DeviceArgs, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    diffusion::schedule::Schedule,
    evaluate::to_picture,
    memory,
    models::pipeline::Pipeline,
    prompts::Prompt,
    run::load_with_adapters,
    task::{NoiseOf, Roller},
    telemetry::{can_be_folder, image_grid, save_png, GridRow, Picture},
    text_file,
};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// What to draw. May be given several times.
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// File with one prompt per line.
    #[arg(long = "prompts", value_name = "FILE")]
    file: Option<PathBuf>,
    /// `embedded`, a diffusers folder, or a run's folder (its tuned model).
    #[arg(long, default_value = "embedded", value_name = "DIR")]
    model: String,
    /// Folder for the pictures.
    #[arg(long, default_value = "samples", value_name = "DIR")]
    out: PathBuf,
    /// Pictures per prompt.
    #[arg(long, default_value_t = 1, value_name = "N")]
    images: usize,
    /// DDIM steps.
    #[arg(long, default_value_t = 50, value_name = "N")]
    steps: usize,
    /// Guidance scale g; 1 for no guidance.
    #[arg(long, default_value_t = 5.0, value_name = "G")]
    guidance: f64,
    /// Noise of the transitions: 0 is deterministic DDIM.
    #[arg(long, default_value_t = 0.0)]
    eta: f64,
    /// What to steer away from.
    #[arg(long, default_value = "", value_name = "TEXT")]
    negative: String,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Height of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS")]
    height: Option<i64>,
    /// Width of the pictures in pixels [default: the model's own].
    #[arg(long, value_name = "PIXELS")]
    width: Option<i64>,
    /// Pictures handed to a rank at once. It never changes a picture: on the CPU each is drawn by itself, since
    /// libtorch's last bits depend on the batch.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Adapters (diffusers' LoRA layout) to add to the U-Net.
    #[arg(long, value_name = "FILE")]
    lora: Option<PathBuf>,
}

/// A picture on its way to rank 0.
#[derive(Serialize, Deserialize)]
struct Drawn {
    sample: usize,
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

pub fn run(args: Args, comm: &dyn Communicator) -> Result<(), Failure> {
    let prompts = prompts(&args).or_mistake()?;
    agree(comm, if comm.rank() == 0 { can_be_folder(&args.out) } else { Ok(()) }).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    tch::set_num_threads(1);
    let pipeline = load_with_adapters(&args.model, args.lora.as_deref(), comm, device).or_mistake()?;
    let latent_shape = latent_shape(&pipeline, &args).or_mistake()?;
    let schedule = Schedule::of_model(&pipeline.scheduler);
    let schedule = schedule.with_context(|| format!("{}: scheduler/scheduler_config.json", args.model)).or_mistake()?;
    if comm.rank() == 0 {
        warn_of_cut_prompts(&pipeline, prompts.iter().map(|p| p.text.as_str()).chain([args.negative.as_str()]))?;
    }
    let steps = schedule.steps(args.steps, args.eta).or_mistake()?;
    let negative = pipeline.embed(&[args.negative.as_str()])?;
    let roller = Roller {
        pipeline: &pipeline,
        unet: &pipeline.unet,
        steps: &steps,
        empty_prompt: &negative,
        guidance_scale: args.guidance,
        latent_shape,
        recorded: None,
    };
    let noise = NoiseOf { seed: args.seed, iteration: u32::MAX, task: u8::MAX };

    let _stage = memory::stage("drawing of a picture", 1, "make it smaller (--height, --width)");
    let mut mine = Vec::new();
    let total = prompts.len() * args.images;
    for first in (comm.rank() * args.batch..total).step_by(comm.size() * args.batch) {
        for sample in first..total.min(first + args.batch) {
            let conditioning = roller.conditioning(&prompts[sample / args.images..][..1])?;
            let trajectory = roller.roll_out(&conditioning, noise, sample, 1)?;
            let picture = to_picture(&tch::no_grad(|| pipeline.vae.decode_scaled(trajectory.x_0())).get(0))?;
            let (width, height) = (picture.width(), picture.height());
            mine.push(Drawn { sample, width, height, rgb: picture.rgb().to_vec() });
        }
    }
    let gathered = comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
    agree(comm, if comm.rank() == 0 { write(&args, &prompts, &gathered) } else { Ok(()) })?;
    Ok(())
}

/// Latents of the asked size.
fn latent_shape(pipeline: &Pipeline, args: &Args) -> Result<[i64; 3]> {
    let [channels, height, width] = pipeline.latent_shape();
    let factor = pipeline.vae.config.downscale();
    let side = |name: &str, wanted: Option<i64>, own: i64| match wanted {
        None => Ok(own),
        Some(pixels) if pixels > 0 && pixels % factor == 0 => Ok(pixels / factor),
        Some(pixels) => bail!("--{name} {pixels} must be a positive multiple of {factor}"),
    };
    Ok([channels, side("height", args.height, height)?, side("width", args.width, width)?])
}

fn warn_of_cut_prompts<'a>(pipeline: &Pipeline, prompts: impl Iterator<Item = &'a str>) -> Result<()> {
    for prompt in prompts {
        let cut = pipeline.tokenizer.encode(prompt)?.cut;
        if cut > 0 {
            let beginning: String = prompt.chars().take(40).collect();
            log::warn!("the prompt that begins {beginning:?} is too long: its last {cut} tokens are cut");
        }
    }
    Ok(())
}

fn prompts(args: &Args) -> Result<Vec<Prompt>> {
    let mut texts = args.prompts.clone();
    if let Some(path) = &args.file {
        texts.extend(text_file::lines(path)?.into_iter().map(|(_, line)| line));
    }
    ensure!(!texts.is_empty(), "there is nothing to draw: give --prompt or --prompts");
    ensure!(args.images > 0 && args.steps > 0 && args.batch > 0, "--images, --steps and --batch must be at least 1");
    ensure!((0.0..=1.0).contains(&args.eta) && args.guidance.is_finite(), "--eta is in 0..=1, --guidance finite");
    Ok(texts.into_iter().map(|text| Prompt { text, objects: Vec::new() }).collect())
}

/// One PNG per picture and the grid of all.
fn write(args: &Args, prompts: &[Prompt], gathered: &[Vec<u8>]) -> Result<()> {
    let mut drawn: Vec<Drawn> = Vec::new();
    for bytes in gathered {
        drawn.extend(serde_json::from_slice::<Vec<Drawn>>(bytes)?);
    }
    drawn.sort_by_key(|d| d.sample);
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    let settings = |prompt: &str, sample: Option<usize>| {
        let mut all = vec![
            ("prompt".to_string(), prompt.to_string()),
            ("negative_prompt".to_string(), args.negative.clone()),
            ("model".to_string(), args.model.clone()),
            ("seed".to_string(), args.seed.to_string()),
            ("steps".to_string(), args.steps.to_string()),
            ("guidance_scale".to_string(), args.guidance.to_string()),
            ("eta".to_string(), args.eta.to_string()),
            ("software".to_string(), format!("rldiff {}", env!("CARGO_PKG_VERSION"))),
        ];
        all.extend(sample.map(|s| ("sample".to_string(), s.to_string())));
        all
    };
    let mut rows: Vec<GridRow> =
        prompts.iter().map(|p| GridRow { caption: p.text.clone(), pictures: Vec::new() }).collect();
    for d in drawn {
        let picture = Picture::new(d.width, d.height, d.rgb)?;
        let prompt = d.sample / args.images;
        let path = args.out.join(format!("{prompt:04}-{:02}.png", d.sample % args.images));
        save_png(&path, &picture, &settings(&prompts[prompt].text, Some(d.sample)))?;
        rows[prompt].pictures.push(picture);
    }
    let texts: Vec<&str> = prompts.iter().map(|p| p.text.as_str()).collect();
    save_png(&args.out.join("grid.png"), &image_grid("", &rows)?, &settings(&texts.join("\n"), None))?;
    println!("{} pictures and grid.png in {}", prompts.len() * args.images, args.out.display());
    Ok(())
}
