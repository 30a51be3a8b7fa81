//! `rldiff sample`: pictures from prompts.

use std::path::PathBuf;

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{device_args::DeviceArgs, drawing_args::DrawingArgs, numbers::whole, Failure, OrMistake};
use crate::{
    comm::{agree, Communicator},
    draw::{warn_of_cut_prompts, Drawing, Painter},
    memory,
    run::load_with_adapters,
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
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
    images: usize,
    #[command(flatten)]
    drawing: DrawingArgs,
    /// Pictures handed to a rank at once. It never changes a picture: on the CPU each is drawn by itself, since
    /// libtorch's last bits depend on the batch.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = whole::<usize>(1, 65_536))]
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
    let drawing = args.drawing.drawing();
    let prompts = prompts(&args).or_mistake()?;
    agree(comm, if comm.rank() == 0 { can_be_folder(&args.out) } else { Ok(()) }).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    tch::set_num_threads(1);
    let pipeline = load_with_adapters(&args.model, args.lora.as_deref(), comm, device).or_mistake()?;
    let painter = Painter::new(&pipeline, &args.model, &drawing).or_mistake()?;
    if comm.rank() == 0 {
        let texts = prompts.iter().map(String::as_str).chain([drawing.negative.as_str()]);
        warn_of_cut_prompts(&pipeline, texts)?;
    }

    let _stage = memory::stage("drawing of a picture", 1, "make it smaller (--height, --width)");
    let mut mine = Vec::new();
    let total = prompts.len() * args.images;
    for first in (comm.rank() * args.batch..total).step_by(comm.size() * args.batch) {
        for sample in first..total.min(first + args.batch) {
            let picture = painter.picture(&prompts[sample / args.images], sample)?;
            let (width, height) = (picture.width(), picture.height());
            mine.push(Drawn { sample, width, height, rgb: picture.rgb().to_vec() });
        }
    }
    let gathered = comm.all_gather_bytes(&serde_json::to_vec(&mine)?)?;
    agree(comm, if comm.rank() == 0 { write(&args, &drawing, &prompts, &gathered) } else { Ok(()) })?;
    Ok(())
}

fn prompts(args: &Args) -> Result<Vec<String>> {
    let mut texts = args.prompts.clone();
    if let Some(path) = &args.file {
        texts.extend(text_file::lines(path)?.into_iter().map(|(_, line)| line));
    }
    ensure!(!texts.is_empty(), "there is nothing to draw: give --prompt or --prompts");
    Ok(texts)
}

/// One PNG per picture and the grid of all.
fn write(args: &Args, drawing: &Drawing, prompts: &[String], gathered: &[Vec<u8>]) -> Result<()> {
    let mut drawn: Vec<Drawn> = Vec::new();
    for bytes in gathered {
        drawn.extend(serde_json::from_slice::<Vec<Drawn>>(bytes)?);
    }
    drawn.sort_by_key(|d| d.sample);
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {}", args.out.display()))?;
    let settings = |prompt: &str, sample: Option<usize>| {
        let mut all = vec![
            ("prompt".to_string(), prompt.to_string()),
            ("negative_prompt".to_string(), drawing.negative.clone()),
            ("model".to_string(), args.model.clone()),
            ("seed".to_string(), drawing.seed.to_string()),
            ("steps".to_string(), drawing.steps.to_string()),
            ("guidance_scale".to_string(), drawing.guidance_scale.to_string()),
            ("eta".to_string(), drawing.eta.to_string()),
            ("software".to_string(), format!("rldiff {}", crate::CODE_VERSION)),
        ];
        all.extend(sample.map(|s| ("sample".to_string(), s.to_string())));
        all
    };
    let mut rows: Vec<GridRow> = prompts.iter().map(|p| GridRow { caption: p.clone(), pictures: Vec::new() }).collect();
    for d in drawn {
        let picture = Picture::new(d.width, d.height, d.rgb)?;
        let prompt = d.sample / args.images;
        let path = args.out.join(format!("{prompt:04}-{:02}.png", d.sample % args.images));
        save_png(&path, &picture, &settings(&prompts[prompt], Some(d.sample)))?;
        rows[prompt].pictures.push(picture);
    }
    save_png(&args.out.join("grid.png"), &image_grid("", &rows)?, &settings(&prompts.join("\n"), None))?;
    println!("{} pictures and grid.png in {}", prompts.len() * args.images, args.out.display());
    Ok(())
}
