#!/usr/bin/env python3
"""The work of `rldiff bench rollout` and `rldiff bench update`, done by PyTorch with diffusers' U-Net: what rldiff is
compared with. `bench/gpu.sh` and `bench/compare.sh` run both in turn.

roll-out: classifier-free guidance with both halves in one call, DDIM transition (eta 1), log-probability of each step.
update:   the same call with gradients, clipped surrogate, backward pass, one fused AdamW step.

Weights are random (the time does not depend on them), with scaled dot-product attention. Three choices:

--memory-format  contiguous (NCHW, as diffusers builds it) or channels-last
--weights        bf16: weights, moments and everything else in bf16; masters: f32 weights and moments, the network under
                 autocast in bf16 (what a training at small learning rates needs); f32. By default bf16 on a GPU, f32 on a
                 CPU
--compile        torch.compile, in a mode of its own (default, max-autotune, max-autotune-no-cudagraphs, ...); else eager.
                 The first call compiles, in the warm-up, whose seconds are printed too

What, memory format and weights may be lists (rollout,update): every combination is measured, a line of JSON for each as
soon as it is known.
"""
import argparse
import contextlib
import gc
import itertools
import json
import math
import resource
import statistics
import time

import torch
from diffusers import UNet2DConditionModel

GUIDANCE = 7.0
CLIP_RANGE = 1e-4


def listed(*known):
    def parse(text):
        values = text.split(",")
        if not set(values) <= set(known):
            raise argparse.ArgumentTypeError(f"{text} is not of {', '.join(known)}")
        return values
    return parse


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="unet/config.json of a diffusers folder")
    parser.add_argument("--what", type=listed("rollout", "update"), required=True)
    parser.add_argument("--batch", type=int, default=16, help="samples; each is two rows")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of the roll-out")
    parser.add_argument("--tokens", type=int, default=77)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-format", type=listed("contiguous", "channels-last"))
    parser.add_argument("--weights", type=listed("bf16", "masters", "f32"))
    parser.add_argument("--compile", nargs="?", const="max-autotune", metavar="MODE", help="torch.compile's mode")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    args.weights = args.weights or ["bf16" if args.device == "cuda" else "f32"]
    # a compiled network is measured in its best layout
    args.memory_format = args.memory_format or ["channels-last" if args.compile else "contiguous"]
    return args


def schedule(steps):
    """Timestep and alpha_bar before and after each step: leading spacing, offset 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).tolist()
    stride = 1000 // steps
    times = [k * stride + 1 for k in reversed(range(steps))]
    return [(t, alpha_bar[t], alpha_bar[max(t - stride, 0)]) for t in times]


class Work:
    def __init__(self, args, memory_format, weights):
        self.args, self.weights = args, weights
        # inputs of the network; autocast takes any
        self.dtype = torch.bfloat16 if weights == "bf16" else torch.float32
        with open(args.config) as file:
            config = json.load(file)
        torch.manual_seed(1)
        with torch.device(args.device):
            self.unet = UNet2DConditionModel.from_config(config).to(self.dtype)
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if memory_format == "channels-last":
            self.unet.to(memory_format=torch.channels_last)
        self.call = torch.compile(self.unet, mode=args.compile) if args.compile else self.unet
        size, width = config["sample_size"], config["cross_attention_dim"]
        shape = (args.batch, config["in_channels"], size, size)
        self.shape, self.steps = shape, schedule(args.steps)
        self.text = torch.randn(2 * args.batch, args.tokens, width, device=args.device, dtype=self.dtype)
        self.advantage = torch.randn(args.batch, device=args.device)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=2e-6, fused=True)

    def numbers(self):
        """Autocast keeps the weights that it has cast until its end, so that a roll-out casts them once."""
        if self.weights == "masters":
            return torch.autocast(self.args.device, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def transition(self, x_t, step):
        """Mean and standard deviation of x_prev."""
        t, bar, bar_prev = step
        both = torch.cat([x_t, x_t]).to(self.dtype)
        out = self.call(both, torch.tensor(t, device=x_t.device), encoder_hidden_states=self.text).sample.float()
        uncond, cond = out.chunk(2)
        eps = uncond + GUIDANCE * (cond - uncond)
        sigma = math.sqrt((1 - bar_prev) / (1 - bar) * (1 - bar / bar_prev))
        x_0 = (x_t - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        return math.sqrt(bar_prev) * x_0 + math.sqrt(1 - bar_prev - sigma**2) * eps, sigma

    @staticmethod
    def log_prob(x_prev, mean, sigma):
        density = -((x_prev - mean) ** 2) / (2 * sigma**2) - math.log(sigma) - 0.5 * math.log(2 * math.pi)
        return density.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def rollout(self):
        with self.numbers():
            x = torch.randn(self.shape, device=self.args.device)
            for step in self.steps:
                mean, sigma = self.transition(x, step)
                x = mean + sigma * torch.randn_like(x)
                self.log_prob(x, mean, sigma)

    def update(self):
        step = self.steps[len(self.steps) // 2]
        x_t, x_prev = (torch.randn(self.shape, device=self.args.device) for _ in range(2))
        with self.numbers():
            mean, sigma = self.transition(x_t, step)
        log_prob = self.log_prob(x_prev, mean, sigma)
        ratio = torch.exp(log_prob - log_prob.detach())
        clipped = torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
        torch.maximum(-self.advantage * ratio, -self.advantage * clipped).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def memory(device):
    """GB, by the names of `rldiff bench`."""
    seen = {"host_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        seen["peak_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        seen["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        seen["card_used_gb"] = (total - free) / 1e9
        seen["card_gb"] = total / 1e9
    return seen


def measure(args, what, memory_format, weights):
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    work = Work(args, memory_format, weights)
    run = {"rollout": work.rollout, "update": work.update}[what]
    seconds, warm_up = [], []
    for i in range(args.warm_up + args.repeats):
        if args.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        (warm_up if i < args.warm_up else seconds).append(time.perf_counter() - started)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    return {
        "what": what, "device": name, "batch": args.batch, "steps": args.steps, "compiled": args.compile,
        "memory_format": memory_format, "weights": weights, "gradient_checkpointing": args.gradient_checkpointing,
        "warm_up_seconds": warm_up, "seconds": seconds, "median_seconds": statistics.median(seconds),
        "memory": memory(args.device), "torch": torch.__version__,
    }


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    for combination in itertools.product(args.what, args.memory_format, args.weights):
        print(json.dumps(measure(args, *combination)), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
