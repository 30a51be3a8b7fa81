"""Writes the adapters of the embedded miniature in this folder, and reference.safetensors: what the U-Net and the text
encoder give with each.

    python make_adapters.py MODEL     (MODEL: src/miniature/base; diffusers, peft, transformers, safetensors)

The layouts that a library writes are written by it. The reference is a float64 run, with the adapters applied by PEFT
where it can (Python's own words for the rest: lora_mid, diff).
"""

import json
import math
import os
import shutil
import sys

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

MODEL = sys.argv[1]
HERE = os.path.dirname(os.path.abspath(__file__))
RANK = 2
ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
UNET = [f"{ATTENTION}.{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")]
WIDE = ["mid_block.attentions.0.proj_in", f"{ATTENTION}.ff.net.0.proj", f"{ATTENTION}.ff.net.2", "mid_block.resnets.0.conv1",
        "mid_block.resnets.0.time_emb_proj", "up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv",
        "conv_in", "time_embedding.linear_1"]
TEXT = [f"encoder.layers.0.{p}" for p in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]


def unet():
    return UNet2DConditionModel.from_pretrained(f"{MODEL}/unet", torch_dtype=torch.float32)


def text_encoder():
    return CLIPTextModel.from_pretrained(f"{MODEL}/text_encoder", torch_dtype=torch.float32)


def fill(model):
    """Gives every adapter values that depend on its name's place in the order, and that float16 holds exactly."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)):
            wave = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (0.7 + 0.01 * i) + i).view(p.shape)
            if "magnitude" in name:
                p.copy_(p * (1 + 0.2 * wave))
            else:
                p.copy_((wave * (0.3 if "lora_A" in name else 0.2)).half())


sample = (torch.sin(torch.arange(256, dtype=torch.float64) * 0.37)).view(1, 4, 8, 8).float()
text = (torch.sin(torch.arange(12 * 64, dtype=torch.float64) * 0.11)).view(1, 12, 64).float()
ids = (torch.arange(12) + 300).view(1, 12)
reference = {"sample": sample, "text": text, "ids": ids}


def record(name, u=None, t=None):
    with torch.no_grad():
        if u is not None:
            u = u.double()
            reference[f"eps.{name}"] = u(sample.double(), torch.tensor(501), text.double()).sample.clone()
        if t is not None:
            t = t.double()
            # transformers makes its mask in the default type
            torch.set_default_dtype(torch.float64)
            reference[f"embedding.{name}"] = t(ids).last_hidden_state[:, 8:].clone()
            torch.set_default_dtype(torch.float32)


def write(name, tensors, metadata=None):
    save_file({k: v.contiguous() for k, v in tensors.items()}, f"{HERE}/{name}.safetensors", metadata or {"format": "pt"})


record("base", unet(), text_encoder())

# one adapter of attention, in every layout
u = unet()
u.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=UNET, init_lora_weights=False))
fill(u)
state = get_peft_model_state_dict(u)
write("peft", {f"unet.{k}": v for k, v in state.items()})
write("no-prefix", state)
write("peft-named", {f"base_model.model.{k}".replace(".weight", ".default.weight"): v for k, v in state.items()})
down_up = {f"unet.{k}".replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in state.items()}
write("down-up", down_up)
old = {}
for k, v in down_up.items():
    for p in ("to_q", "to_k", "to_v", "to_out"):
        k = k.replace(f".{p}.0.lora.", f".processor.{p}_lora.").replace(f".{p}.lora.", f".processor.{p}_lora.")
    old[k] = v
write("old-processors", old)
write("oldest-processors", {k.removeprefix("unet."): v for k, v in old.items()})
kohya = convert_state_dict_to_kohya({f"unet.{k}": v for k, v in state.items()})
write("kohya", kohya)
write("kohya-f16", {k: v.half() for k, v in kohya.items()})
write("kohya-ldm-names", {k.replace("mid_block_attentions_0", "middle_block_1"): v for k, v in kohya.items()})
torch.save({f"unet.{k}": v for k, v in state.items()}, f"{HERE}/peft.bin")
record("peft", u)

# alphas and ranks of each layer, all kinds of layers, the text encoder: as diffusers saves it
u, t = unet(), text_encoder()
ranks = {"conv1": 3, "attn2.to_k": 1}
alphas = {"attn2.to_k": 3, "proj_in": 0.5, "conv_in": 4}
u_config = LoraConfig(r=RANK, lora_alpha=6, rank_pattern=ranks, alpha_pattern=alphas, target_modules=UNET + WIDE, init_lora_weights=False)
t_config = LoraConfig(r=RANK, lora_alpha=1, target_modules=TEXT, init_lora_weights=False)
u.add_adapter(u_config)
t.add_adapter(t_config)
fill(u)
fill(t)
wide, words = get_peft_model_state_dict(u), get_peft_model_state_dict(t)
words = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in words.items()}
shutil.rmtree(f"{HERE}/diffusers-folder", ignore_errors=True)
from diffusers.training_utils import _collate_lora_metadata
StableDiffusionPipeline.save_lora_weights(
    f"{HERE}/diffusers-folder", unet_lora_layers=wide, text_encoder_lora_layers=words,
    **_collate_lora_metadata({"unet": u, "text_encoder": t}))
old_text = {k.replace("q_proj", "to_q").replace("out_proj", "to_out").replace(".fc1.", ".fc1.lora_linear_layer."): v for k, v in words.items()}


def true_alpha(path):
    return next((a for end, a in alphas.items() if path.endswith(end)), 6)


def as_kohya(prefix, state, alpha):
    out = {}
    for k, v in state.items():
        path, end = k.split(".lora_")
        name = prefix + path.replace(".", "_")
        out[f"{name}.lora_{ {'A': 'down', 'B': 'up'}[end[0]] }.weight"] = v
        out[f"{name}.alpha"] = torch.tensor(float(alpha(path)))
    return out


write("kohya-wide-and-text", as_kohya("lora_unet_", wide, true_alpha) | as_kohya("lora_te_", words, lambda _: 1))
# diffusers' text encoder layouts, which have no alpha: alpha / rank is in B
half = {k: v * (1 / RANK if ".lora_B" in k else 1) for k, v in words.items()}
linear = {f"text_encoder.{k}".replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up."): v for k, v in half.items()}
write("text-linear-layers", linear)
for new, former in (("q_proj.lora_linear_layer", "to_q_lora"), ("out_proj.lora_linear_layer", "to_out_lora")):
    linear = {k.replace(new, former): v for k, v in linear.items()}
write("text-old", linear)
record("wide", u, t)

# folders of PEFT's save_pretrained, for each network; rank-stabilised
shutil.rmtree(f"{HERE}/peft-folder", ignore_errors=True)
networks = []
for model, layers, name in ((unet(), UNET[:2], "unet"), (text_encoder(), TEXT, "text_encoder")):
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=layers, init_lora_weights=False))
    fill(tuned)
    tuned.save_pretrained(f"{HERE}/peft-folder/{name}")
    os.remove(f"{HERE}/peft-folder/{name}/README.md")
    networks.append(tuned)
record("rslora", networks[0], networks[1])

# DoRA of linear layers and convolutions; biases
for name, options, layers in (
    ("dora", {"use_dora": True}, UNET[:4] + ["mid_block.resnets.0.conv1", "conv_in"]),
    ("biases", {"lora_bias": True}, ["mid_block.resnets.0.conv1", f"{ATTENTION}.ff.net.2"]),
):
    u = unet()
    u.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights=False, **options))
    fill(u)
    write(name, {f"unet.{k}": v for k, v in get_peft_model_state_dict(u).items()})
    record(name, u)

# LoCon with a matrix between (Tucker) and differences of whole weights: no library here reads them
wave = lambda i, *shape: (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (0.9 + i) + i).view(shape) * 0.3).half().float()
u = unet()
down, mid, up = wave(1, 3, 64, 1, 1), wave(2, 3, 3, 3, 3), wave(3, 64, 3, 1, 1)
norm, norm_bias, bias = wave(4, 64), wave(5, 64), wave(6, 32)
m = "lora_unet_mid_block_resnets_0_conv1"
write("locon", {
    f"{m}.lora_down.weight": down, f"{m}.lora_mid.weight": mid, f"{m}.lora_up.weight": up, f"{m}.alpha": torch.tensor(1.5),
    "lora_unet_mid_block_resnets_0_norm1.w_norm": norm, "lora_unet_mid_block_resnets_0_norm1.b_norm": norm_bias,
    "lora_unet_conv_in.diff_b": bias})
u = u.double()
with torch.no_grad():
    # the chain of three convolutions, applied to single pixels, is the kernel that it stands for
    one = torch.zeros(64, 64, 5, 5, dtype=torch.float64)
    one[range(64), range(64), 2, 2] = 1
    conv = torch.nn.functional.conv2d
    kernel = conv(conv(conv(one, down.double()), mid.double()), up.double()).flip(2, 3).transpose(0, 1)
    u.mid_block.resnets[0].conv1.weight += kernel * (1.5 / 3)
    u.mid_block.resnets[0].norm1.weight += norm
    u.mid_block.resnets[0].norm1.bias += norm_bias
    u.conv_in.bias += bias
record("locon", u)

save_file({k: v.contiguous() for k, v in reference.items()}, f"{HERE}/reference.safetensors")
