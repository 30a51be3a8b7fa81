"""Tiny pipelines of random weights as the libraries write them, with what these libraries make of them.

    python make_pipelines.py NAME TOKENIZER

NAME is the folder to make beside this file; TOKENIZER a folder with a CLIP tokenizer (src/miniature/base/tokenizer).
transformers-5 was made with transformers 5.24.0 and diffusers 0.42.1, transformers-4 with transformers 4.57.6 and
diffusers 0.39.0; torch 2.11 both. expected.json holds token ids, and DDIM's latents and their picture from diffusers.
"""
import json
import pathlib
import sys

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import AddedToken
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ["a red circle", "", "a portrait of <my-toy>", "a portrait of<my-toy>, large", "A <Cap> b <cap>",
           "xzyx zyx zyxes ZYX", "two  spaces\tand a tab", "Caf\u00e9 \u2014 na\u00efve \u6771\u4eac", "hey! it's 2026",
           "<|endoftext|> inside <|startoftext|>", "circle square " * 9]
STEPS, PROMPT = 4, "a portrait of <my-toy>"

folder, tokenizer_folder = pathlib.Path(__file__).parent / sys.argv[1], sys.argv[2]
torch.manual_seed(7)
tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, model_max_length=12)
tokenizer.add_tokens([AddedToken("<my-toy>"), AddedToken("zyx", single_word=True),
                      AddedToken("<Cap>", lstrip=True, rstrip=True, normalized=False)])
text_encoder = CLIPTextModel(CLIPTextConfig(
    vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=12, projection_dim=8, bos_token_id=658, eos_token_id=659))
unet = UNet2DConditionModel(
    sample_size=[4, 8], block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
    attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
vae = AutoencoderKL(
    block_out_channels=(8, 8), norm_num_groups=4, sample_size=[8, 16],
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
# steps_offset stays 0: the pipeline makes it 1; the file holds "lambda_min_clipped": -Infinity
scheduler = DPMSolverMultistepScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading")
for module in (text_encoder, unet, vae):
    # initial weights hide mistakes: biases and scales are constants
    module.eval()
    for p in module.parameters():
        p.data += 0.1 * torch.randn_like(p)
pipeline = StableDiffusionPipeline(
    vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
    feature_extractor=None, requires_safety_checker=False)
pipeline.save_pretrained(folder / "model")

pipeline = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
# __init__ sets clip_sample and steps_offset
pipeline = StableDiffusionPipeline(**{**pipeline.components, "scheduler": DDIMScheduler.from_config(pipeline.scheduler.config)},
                                   requires_safety_checker=False)
start = torch.sin(0.37 * torch.arange(4 * 4 * 8)).reshape(1, 4, 4, 8)
with torch.no_grad():
    latents = pipeline(PROMPT, latents=start, num_inference_steps=STEPS, guidance_scale=1.0, eta=0.0,
                       output_type="latent").images
    picture = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
ids = {p: pipeline.tokenizer(p, padding="max_length", truncation=True).input_ids for p in PROMPTS}
rounded = lambda t: [round(x, 6) for x in t.flatten().tolist()]
expected = {"versions": [transformers.__version__, diffusers.__version__], "ids": ids, "steps": STEPS, "prompt": PROMPT,
            "timesteps": pipeline.scheduler.timesteps.tolist(), "latents": rounded(latents), "picture": rounded(picture)}
(folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
print({k: expected[k] for k in ("versions", "ids", "timesteps")})
