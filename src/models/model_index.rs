//! `model_index.json`: which classes a model is made of, and whether they are ones that are built here.

use anyhow::{ensure, Context, Result};
use serde_json::Value;

const PIPELINES: &[&str] =
    &["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"];

/// Components and the classes they may have.
const COMPONENTS: &[(&str, &[&str])] = &[
    ("text_encoder", &["CLIPTextModel"]),
    ("tokenizer", &["CLIPTokenizer", "CLIPTokenizerFast"]),
    ("unet", &["UNet2DConditionModel"]),
    ("vae", &["AutoencoderKL"]),
];

/// Components of larger models (SDXL, SD 3, image prompts), without which these do not work.
const FOREIGN: &[&str] = &["text_encoder_2", "text_encoder_3", "transformer", "prior"];

/// Samplers of models that were trained with a table of β, which is all that is read from their config.
const SCHEDULERS: &[&str] = &[
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
];

/// Fails where `index` (model_index.json) asks for a class that is not built here.
pub fn ensure_supported_pipeline(index: &Value) -> Result<()> {
    ensure_one_of("_class_name", index.get("_class_name"), PIPELINES)?;
    for (component, classes) in COMPONENTS {
        if let Some(entry) = index.get(*component) {
            let class = entry.get(1);
            ensure!(class.is_some_and(Value::is_string), "{component} is {entry}, which names no class");
            ensure_one_of(component, class, classes)?;
        }
    }
    for component in FOREIGN {
        let class = index.get(*component).and_then(|entry| entry.get(1)).unwrap_or(&Value::Null);
        ensure!(class.is_null(), "{component} = {class} is not supported");
    }
    Ok(())
}

/// Fails unless `scheduler` (scheduler_config.json) belongs to a model trained with a table of β.
pub fn ensure_supported_scheduler(scheduler: &Value) -> Result<()> {
    ensure!(scheduler.is_object(), "it holds no JSON object");
    ensure_one_of("_class_name", scheduler.get("_class_name"), SCHEDULERS)
}

fn ensure_one_of(key: &str, value: Option<&Value>, accepted: &[&str]) -> Result<()> {
    let Some(value) = value else { return Ok(()) };
    let class = value.as_str().with_context(|| format!("{key} = {value} is no name of a class"))?;
    ensure!(accepted.contains(&class), "{key} = {class} is not supported (only {})", accepted.join(", "));
    Ok(())
}
