"""What other people's networks make of the reward checkpoints that rldiff reads.

    python reward_networks.py image_reward|clip|resize FOLDER

FOLDER holds the checkpoint written by the test (safetensors, the published names), `pictures.safetensors` with `pictures`
[n, 3, H, W] in 0..1, and `prompts.json`. Networks and preprocessing are transformers', torchvision's and Pillow's. Writes
the same checkpoint in the other published formats and prints one JSON line with the scores. Needs torch, torchvision,
transformers, safetensors, pillow.
"""

import json
import os
import re
import sys

import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def prepare(pictures, side):
    """Pillow's bicubic resize, the middle, normalised: as in the packages of ImageReward and CLIP."""
    transform = Compose([Resize(side, interpolation=InterpolationMode.BICUBIC), CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])
    rows = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return torch.stack([transform(Image.fromarray(row)) for row in rows])


def mlp(x, tensors, prefix, numbers, relu):
    for i, number in enumerate(numbers):
        x = x @ tensors[f"{prefix}layers.{number}.weight"].T + tensors[f"{prefix}layers.{number}.bias"]
        if relu and i + 1 < len(numbers):
            x = x.clamp(min=0)
    return x[:, 0]


def depth(tensors, pattern):
    return 1 + max(int(m.group(1)) for m in (re.match(pattern, name) for name in tensors) if m)


def image_reward(folder, pictures, prompts):
    tensors = load_file(os.path.join(folder, "image_reward.safetensors"))
    vision = {n[len("blip.visual_encoder."):]: t for n, t in tensors.items() if n.startswith("blip.visual_encoder.")}
    text = {n[len("blip.text_encoder."):]: t for n, t in tensors.items() if n.startswith("blip.text_encoder.")}
    width, patch = vision["patch_embed.proj.weight"].shape[0], vision["patch_embed.proj.weight"].shape[2]
    side = round((vision["pos_embed"].shape[1] - 1) ** 0.5) * patch
    layers = depth(vision, r"blocks\.(\d+)\.")
    names = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
             "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
             "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
             "norm.weight": "post_layernorm.weight", "norm.bias": "post_layernorm.bias"}
    parts = {"norm1": "layer_norm1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
             "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for i in range(layers):
        for own, other in parts.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{i}.{own}.{kind}"] = f"encoder.layers.{i}.{other}.{kind}"
    encoder = BlipVisionModel(BlipVisionConfig(
        hidden_size=width, intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0], num_hidden_layers=layers,
        num_attention_heads=width // 64, image_size=side, patch_size=patch, hidden_act="gelu", layer_norm_eps=1e-6))
    encoder.load_state_dict({names[n]: t for n, t in vision.items()}, strict=True)
    words, hidden = text["embeddings.word_embeddings.weight"].shape
    bert = BlipTextModel(BlipTextConfig(
        vocab_size=words, hidden_size=hidden, encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(text, r"encoder\.layer\.(\d+)\."), num_attention_heads=hidden // 64,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0], hidden_act="gelu",
        layer_norm_eps=1e-12, is_decoder=True), add_pooling_layer=False)
    found = bert.load_state_dict(text, strict=False)
    assert not found.unexpected_keys and all(n.endswith("position_ids") for n in found.missing_keys), found
    encoder.eval(), bert.eval()

    tokenizer = BertTokenizer(os.path.join(folder, "vocab.txt"), do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    tokens = encoder(prepare(pictures, side)).last_hidden_state
    out = bert(input_ids=ids.input_ids, attention_mask=ids.attention_mask, encoder_hidden_states=tokens,
               encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long), is_decoder=False).last_hidden_state
    raw = mlp(out[:, 0], tensors, "mlp.", (0, 2, 4, 6, 7), False)

    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(tensors, os.path.join(folder, "ImageReward.pt"))
    return {"scores": ((raw - 0.16717362830052426) / 1.0333394966054072).tolist()}


class Holder(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def torchscript(tensors, path):
    """An archive whose parameters have these names."""
    root = Holder()
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, Holder())
            at = getattr(at, parent)
        at.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    torch.jit.script(root).save(path)


def clip(folder, pictures, _prompts):
    tensors = load_file(os.path.join(folder, "clip.safetensors"))
    v = "vision_model."
    width, _, patch, _ = tensors[v + "embeddings.patch_embedding.weight"].shape
    side = round((tensors[v + "embeddings.position_embedding.weight"].shape[0] - 1) ** 0.5) * patch
    layers = depth(tensors, r"vision_model\.encoder\.layers\.(\d+)\.")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=width, intermediate_size=tensors[v + "encoder.layers.0.mlp.fc1.weight"].shape[0],
        projection_dim=tensors["visual_projection.weight"].shape[0], num_hidden_layers=layers,
        num_attention_heads=width // 64, image_size=side, patch_size=patch, hidden_act="quick_gelu", layer_norm_eps=1e-5))
    found = model.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys and all(n.endswith("position_ids") for n in found.missing_keys), found
    embeddings = model.eval()(prepare(pictures, side)).image_embeds
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    head = load_file(os.path.join(folder, "head.safetensors"))
    relu = load_file(os.path.join(folder, "relu.safetensors"))

    # OpenAI's names: queries, keys and values in one tensor, the projection turned, a text tower
    openai = {"visual.class_embedding": tensors[v + "embeddings.class_embedding"],
              "visual.conv1.weight": tensors[v + "embeddings.patch_embedding.weight"],
              "visual.positional_embedding": tensors[v + "embeddings.position_embedding.weight"],
              "visual.proj": tensors["visual_projection.weight"].T.contiguous(),
              "positional_embedding": torch.zeros(77, 8), "logit_scale": torch.tensor(4.6),
              "token_embedding.weight": torch.zeros(10, 8), "ln_final.weight": torch.ones(8)}
    for own, other in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        for kind in ("weight", "bias"):
            openai[f"visual.{own}.{kind}"] = tensors[f"{v}{other}.{kind}"]
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}
    for i in range(layers):
        own, other = f"visual.transformer.resblocks.{i}.", f"{v}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            openai[f"{own}attn.in_proj_{kind}"] = torch.cat([tensors[f"{other}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            for mine, theirs in parts.items():
                openai[f"{own}{mine}.{kind}"] = tensors[f"{other}{theirs}.{kind}"]
    torchscript(openai, os.path.join(folder, "ViT-L-14.pt"))
    whole = {**tensors, **head, v + "embeddings.position_ids": torch.arange(17)[None]}
    torch.save(whole, os.path.join(folder, "repack.bin"))
    return {"scores": mlp(embeddings, head, "", (0, 2, 4, 6, 7), False).tolist(),
            "relu": mlp(embeddings, relu, "", (0, 3, 6, 9, 11), True).tolist()}


def resize(folder, pictures, _prompts):
    """Pillow's pictures in the sizes [width, height] of `sizes.json`, as lists of bytes."""
    with open(os.path.join(folder, "sizes.json")) as file:
        sizes = json.load(file)
    rows = [Image.fromarray(r) for r in (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()]
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    return {name: [[list(row.resize(size, f).tobytes()) for size in sizes] for row in rows] for name, f in filters.items()}


@torch.no_grad()
def main():
    kind, folder = sys.argv[1:]
    torch.set_num_threads(1)
    pictures = load_file(os.path.join(folder, "pictures.safetensors"))["pictures"]
    with open(os.path.join(folder, "prompts.json")) as file:
        prompts = json.load(file)
    print(json.dumps({"image_reward": image_reward, "clip": clip, "resize": resize}[kind](folder, pictures, prompts)))


main()
