//! `rldiff sample`: pictures from prompts.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::{device_args::DeviceArgs, drawing_args::DrawingArgs, numbers::whole, Failure, OrMistake};
use crate::{
    cannot_write::{make_folder, CannotWrite},
    comm::{agree, Communicator},
    cut_prompts,
    draw::{Drawing, Painter},
    excerpt::{bounded, WHOLE},
    folders::{can_be_folder, outputs, FolderLock},
    memory,
    run::load_with_adapter,
    telemetry::{image_grid, save_png, GridRow, Picture},
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
    /// `miniature`, a diffusers folder, or a run's folder (its tuned model).
    #[arg(long, default_value = "miniature", value_name = "DIR")]
    model: String,
    /// Folder for the pictures; those of an earlier sample there are replaced.
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
    /// LoRA adapter to add to the model's weights: a file, or the folder that diffusers or PEFT saved.
    #[arg(long, value_name = "PATH")]
    lora: Option<PathBuf>,
    /// Number that the adapter is multiplied by.
    #[arg(long, value_name = "S", default_value_t = 1.0, requires = "lora", allow_negative_numbers = true)]
    lora_scale: f64,
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
    let check = || can_be_folder(&args.out).and_then(|()| earlier(&args.out).map(drop));
    let _lock = FolderLock::hold(comm, &args.out, "sample", check).or_mistake()?;
    let device = args.device.choose(comm).or_mistake()?;
    tch::set_num_threads(1);
    let (drawing, taken_from) = args.drawing.drawing(&[&args.model], comm).or_mistake()?;
    let adapter = args.lora.as_deref().map(|path| (path, args.lora_scale));
    let pipeline = load_with_adapter(&args.model, adapter, comm, device).or_mistake()?;
    let painter = Painter::new(&pipeline, &args.model, &drawing).or_mistake()?;
    if comm.rank() == 0 {
        say!("{taken_from}");
        let texts = prompts.iter().map(String::as_str).chain([drawing.negative.as_str()]);
        cut_prompts::warn("", &pipeline.tokenizer, texts)?;
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

/// The name of a picture.
fn file_name(prompt: usize, image: usize) -> String {
    format!("{prompt:04}-{image:02}.png")
}

const GRID: &str = "grid.png";

/// The pictures that an earlier sample has left in `out`.
///
/// # Errors
/// A file is called like one and is none.
fn earlier(out: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(out) else { return Ok(Vec::new()) };
    let is_called = |name: &str| {
        let numbers = name.strip_suffix(".png").and_then(|name| name.split_once('-'));
        let number = |text: &str, digits| text.len() >= digits && text.bytes().all(|b| b.is_ascii_digit());
        name == GRID || numbers.is_some_and(|(prompt, image)| number(prompt, 4) && number(image, 2))
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read {}", out.display()))?.path();
        if is_called(&path.file_name().unwrap_or_default().to_string_lossy()) {
            outputs::may_replace(&path, outputs::is_own_png)?;
            found.push(path);
        }
    }
    Ok(found)
}

/// One PNG per picture and the grid of all; the others of an earlier sample go.
fn write(args: &Args, drawing: &Drawing, prompts: &[String], gathered: &[Vec<u8>]) -> Result<()> {
    let mut drawn: Vec<Drawn> = Vec::new();
    for bytes in gathered {
        drawn.extend(serde_json::from_slice::<Vec<Drawn>>(bytes)?);
    }
    drawn.sort_by_key(|d| d.sample);
    make_folder(&args.out)?;
    let settings = |prompt: &str, sample: Option<usize>| {
        let mut all = vec![
            ("prompt".to_string(), bounded(prompt, WHOLE).into_owned()),
            ("negative_prompt".to_string(), drawing.negative.clone()),
            ("model".to_string(), args.model.clone()),
            ("seed".to_string(), drawing.seed.to_string()),
            ("steps".to_string(), drawing.steps.to_string()),
            ("guidance_scale".to_string(), drawing.guidance_scale.to_string()),
            ("eta".to_string(), drawing.eta.to_string()),
            ("software".to_string(), format!("rldiff {}", crate::CODE_VERSION)),
        ];
        if let Some(lora) = &args.lora {
            all.push(("lora".to_string(), lora.display().to_string()));
            all.push(("lora_scale".to_string(), args.lora_scale.to_string()));
        }
        all.extend(sample.map(|s| ("sample".to_string(), s.to_string())));
        all
    };
    let mut rows: Vec<GridRow> = prompts.iter().map(|p| GridRow { caption: p.clone(), pictures: Vec::new() }).collect();
    for d in drawn {
        let picture = Picture::new(d.width, d.height, d.rgb)?;
        let prompt = d.sample / args.images;
        let path = args.out.join(file_name(prompt, d.sample % args.images));
        save_png(&path, &picture, &settings(&prompts[prompt], Some(d.sample)))?;
        rows[prompt].pictures.push(picture);
    }
    save_png(&args.out.join(GRID), &image_grid("", &rows)?, &settings(&prompts.join("\n"), None))?;
    let is_new = |path: &Path| {
        let all = (0..prompts.len()).flat_map(|prompt| (0..args.images).map(move |image| file_name(prompt, image)));
        path.ends_with(GRID) || all.into_iter().any(|name| path.ends_with(name))
    };
    for path in earlier(&args.out)?.iter().filter(|path| !is_new(path)) {
        fs::remove_file(path).context("cannot remove it").context(CannotWrite::file(path))?;
    }
    say!("{} pictures and grid.png in {}", prompts.len() * args.images, args.out.display());
    Ok(())
}
