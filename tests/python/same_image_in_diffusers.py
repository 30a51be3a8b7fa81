"""Draws again with Python's diffusers what `rldiff sample` drew, and compares the pictures.

    python same_image_in_diffusers.py MODEL PICTURE… [--lora FILE]

MODEL is a diffusers folder, PICTURE a PNG written by `rldiff sample`, whose text chunks hold prompt, seed, steps,
guidance and eta. The noise is drawn here by an independent Philox4x32-10 with rldiff's counter layout. Prints one JSON
line per picture: largest and mean difference in grey levels (0 to 255). Needs torch, diffusers, transformers, numpy,
pillow (and peft with --lora).
"""

import argparse
import json

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

INITIAL_LATENT, TRANSITION_NOISE = 1, 2
TASK = 255
MASK = 0xFFFFFFFF


def philox(counter, key):
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        low, high = np.uint64(MASK), np.uint64(32)
        c0, c1, c2, c3 = (p1 >> high) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> high) ^ c3 ^ np.uint64(k1), p0 & low
    return np.stack([c0, c1, c2, c3], axis=-1)


def noise(seed, purpose, sample, step, shape):
    count = int(np.prod(shape))
    blocks = np.arange((count + 3) // 4, dtype=np.uint64)
    constant = lambda value: np.full_like(blocks, value)
    tail = purpose << 24 | TASK << 16 | step
    words = philox((blocks, constant(sample), constant(MASK), constant(tail)), (seed & MASK, seed >> 32))
    u = np.minimum((words[:, 0::2].astype(np.float32) + 1) / np.float32(2**32), 1).astype(np.float64)
    angle = words[:, 1::2] / 2.0**32 * 2 * np.pi
    radius = np.sqrt(-2 * np.log(u))
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:count]
    return torch.from_numpy(normal.reshape(shape).astype(np.float32))[None]


@torch.no_grad()
def draw(model, lora, info, size):
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    if lora:
        unet.load_lora_adapter(lora, prefix="unet")

    def embed(text):
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return text_encoder(ids.input_ids)[0]

    text = torch.cat([embed(info["negative_prompt"]), embed(info["prompt"])])
    seed, sample, steps = int(info["seed"]), int(info["sample"]), int(info["steps"])
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    shape = (unet.config.in_channels, size[1] // factor, size[0] // factor)
    x = noise(seed, INITIAL_LATENT, sample, 0, shape)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        eps_uncond, eps_cond = unet(torch.cat([x, x]), t, encoder_hidden_states=text).sample.chunk(2)
        eps = eps_uncond + float(info["guidance_scale"]) * (eps_cond - eps_uncond)
        z = noise(seed, TRANSITION_NOISE, sample, i, shape)
        eta = float(info["eta"])
        x = scheduler.step(eps, t, x, eta=eta, variance_noise=z if eta > 0 else None).prev_sample
    image = vae.decode(x / vae.config.scaling_factor).sample[0]
    return (image / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--lora")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for path in args.pictures:
        with Image.open(path) as picture:
            info, pixels = picture.text, np.asarray(picture.convert("RGB"), dtype=np.float64)
        difference = np.abs(draw(args.model, args.lora, info, picture.size) - pixels)
        print(json.dumps({"picture": path, "largest": float(difference.max()), "mean": float(difference.mean())}))


main()
