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
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
];

/// Pipelines of other kinds by the beginning of their class, in words, the longer beginning first.
const OTHERS: &[(&str, &str)] = &[
    ("StableDiffusionXL", "an SDXL pipeline"),
    ("StableDiffusion3", "a Stable Diffusion 3 pipeline"),
    ("StableDiffusionImageVariation", "a pipeline of image variations, prompted by a picture"),
    ("StableDiffusionInstructPix2Pix", "a pipeline that edits pictures (InstructPix2Pix)"),
    ("StableDiffusionUpscale", "an upscaler"),
    ("StableDiffusionLatentUpscale", "an upscaler"),
    ("StableDiffusionDepth2Img", "a pipeline that takes a depth map"),
    ("StableDiffusionControlNet", "a ControlNet pipeline"),
    ("StableDiffusionGLIGEN", "a GLIGEN pipeline"),
    ("StableUnCLIP", "an unCLIP pipeline"),
    ("StableVideoDiffusion", "a video pipeline"),
    ("StableCascade", "a Stable Cascade pipeline"),
    ("StableAudio", "an audio pipeline"),
    ("AltDiffusion", "an AltDiffusion pipeline (another text encoder)"),
    ("AnimateDiff", "a video pipeline"),
    ("AudioLDM", "an audio pipeline"),
    ("AuraFlow", "an AuraFlow pipeline"),
    ("Chroma", "a Chroma pipeline"),
    ("CogVideo", "a video pipeline"),
    ("CogView", "a CogView pipeline"),
    ("DDIMPipeline", "an unconditional pipeline, without prompts"),
    ("DDPMPipeline", "an unconditional pipeline, without prompts"),
    ("DiTPipeline", "a class-conditional pipeline, without prompts"),
    ("Flax", "a pipeline with weights of Flax"),
    ("Flux", "a Flux pipeline"),
    ("Hunyuan", "a Hunyuan pipeline"),
    ("IFPipeline", "a DeepFloyd IF pipeline"),
    ("IFSuperResolution", "a DeepFloyd IF pipeline"),
    ("IFImg2Img", "a DeepFloyd IF pipeline"),
    ("IFInpainting", "a DeepFloyd IF pipeline"),
    ("Kandinsky", "a Kandinsky pipeline"),
    ("Kolors", "a Kolors pipeline"),
    ("LatentConsistencyModel", "a latent consistency model (distilled)"),
    ("LTX", "a video pipeline"),
    ("Lumina", "a Lumina pipeline"),
    ("Onnx", "a pipeline with weights in ONNX"),
    ("PixArt", "a PixArt pipeline"),
    ("QwenImage", "a Qwen-Image pipeline"),
    ("Sana", "a Sana pipeline"),
    ("TextToVideo", "a video pipeline"),
    ("UnCLIP", "an unCLIP pipeline"),
    ("Wan", "a video pipeline"),
    ("Wuerstchen", "a Würstchen pipeline"),
];

/// What is trained here, for whoever brought something else.
pub const TRAINED: &str = "rldiff trains Stable Diffusion 1.x and 2.x pipelines";

/// A foreign pipeline in words: its kind, its class, what tells it from Stable Diffusion.
fn in_words(class: &str, index: &Value) -> String {
    let kind = OTHERS.iter().find(|(beginning, _)| class.starts_with(beginning)).map(|(_, kind)| *kind);
    let has = |component: &str| index.get(component).and_then(|entry| entry.get(1)).is_some_and(Value::is_string);
    let encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"].iter().filter(|name| has(name)).count();
    let mut details = vec![class.to_string()];
    match encoders {
        2 => details.push("two text encoders".into()),
        3 => details.push("three text encoders".into()),
        _ => {}
    }
    if has("transformer") {
        details.push("a transformer in place of the U-Net".into());
    }
    format!("this is {} ({})", kind.unwrap_or("a pipeline of another kind"), details.join(", "))
}

/// Components of `index` that nobody reads, with their classes; those that every such pipeline may have are left out.
pub fn unread_components(index: &Value) -> Vec<String> {
    let expected = ["scheduler", "safety_checker", "feature_extractor"];
    let known = |name: &str| expected.contains(&name) || COMPONENTS.iter().any(|(component, _)| *component == name);
    let entries = index.as_object().into_iter().flatten();
    let unread = entries.filter(|(name, _)| !name.starts_with('_') && !known(name));
    unread.filter_map(|(name, entry)| Some(format!("{name} ({})", entry.get(1)?.as_str()?))).collect()
}

/// Fails where `index` (model_index.json) asks for a class that is not built here.
pub fn ensure_supported_pipeline(index: &Value) -> Result<()> {
    ensure!(index.is_object(), "holds no JSON object");
    let class = index.get("_class_name").filter(|class| !class.is_null());
    if let Some(class) = class {
        // a class of one's own is a list: the file with its code, the class
        let name = class.as_str().or_else(|| class.get(1)?.as_str());
        let name = name.with_context(|| format!("_class_name = {class} is no name of a class"))?;
        ensure!(
            class.is_string() && PIPELINES.contains(&name),
            "{}; {TRAINED} ({})",
            in_words(name, index),
            PIPELINES.join(", ")
        );
    }
    for (component, classes) in COMPONENTS {
        if let Some(entry) = index.get(*component) {
            let class = entry.get(1);
            ensure!(class.is_some_and(Value::is_string), "{component} is {entry}, which names no class: it is needed");
            ensure_one_of(component, class, classes)?;
        }
    }
    for component in FOREIGN {
        let class = index.get(*component).and_then(|entry| entry.get(1)).unwrap_or(&Value::Null);
        let words = in_words(index["_class_name"].as_str().unwrap_or("no class"), index);
        ensure!(class.is_null(), "{component} = {class} is not supported: {words}; {TRAINED}");
    }
    Ok(())
}

/// Fails unless `scheduler` (scheduler_config.json) belongs to a model trained with a table of β.
pub fn ensure_supported_scheduler(scheduler: &Value) -> Result<()> {
    ensure!(scheduler.is_object(), "holds no JSON object");
    ensure_one_of("_class_name", scheduler.get("_class_name"), SCHEDULERS)
}

fn ensure_one_of(key: &str, value: Option<&Value>, accepted: &[&str]) -> Result<()> {
    let Some(value) = value else { return Ok(()) };
    let class = value.as_str().with_context(|| format!("{key} = {value} is no name of a class"))?;
    ensure!(accepted.contains(&class), "{key} = {class} is not supported (only {})", accepted.join(", "));
    Ok(())
}
