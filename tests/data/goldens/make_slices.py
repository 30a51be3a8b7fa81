"""Writes transition.safetensors, the parts of the large golden files that tests of the transition, the objective and
AdamW need.   usage: python make_slices.py PUBLIC_SET   (the folder that holds goldens/ and sd2-tiny/)"""
import sys
from safetensors.torch import load_file, save_file

root = sys.argv[1]
ddim, rl = load_file(f"{root}/goldens/sd2/ddim10.safetensors"), load_file(f"{root}/goldens/sd2/rl.safetensors")
weights = load_file(f"{root}/sd2-tiny/unet/diffusion_pytorch_model.safetensors")
kept = {f"ddim10.{n}": ddim[n] for n in ("x_T", "noise", "eta1.latents", "eta1.logp_mean")}
kept["ddim10.eta0.latents"] = ddim["eta0.latents"][:2]
for name in ("step_index", "timesteps", "rewards", "advantages", "logp_mean", "old_logp_mean", "mean.ratio",
             "mean.per_sample", "mean.loss", "mean.clip_fraction", "mean.approx_kl", "mean.grad_eps_cond",
             "mean.grad_eps_uncond", "mean.grad_total_norm", "clip_coef.max_norm_1", "clip_coef.max_norm_0.0871517"):
    kept[f"rl.{name}"] = rl[name]
for name in ("x_t", "x_prev"):
    kept[f"rl.{name}"] = rl[name][:1]
for name in ("conv_in.weight", "conv_norm_out.weight", "conv_out.weight", "conv_out.bias", "mid_block.resnets.1.norm1.weight"):
    kept[f"initial.{name}"] = weights[name]
    for prefix in ("grad", "lr1e-4.after1", "lr2e-6.after1"):
        kept[f"rl.{prefix}.{name}"] = rl[f"{prefix}.{name}"]
save_file({n: t.contiguous() for n, t in kept.items()}, "transition.safetensors")
