"""Writes scheduler_variants.json: what diffusers' own DDIMScheduler does with configurations that the other golden
files do not cover.   usage: python make_scheduler_variants.py   (torch 2.11.0 CPU, diffusers 0.39.0, numpy)

For each configuration: entries of its float32 table, the timesteps for several step counts, and for every step one
transition of three numbers x_t, output, noise at eta 0 and 1. The table is taken to float64 before stepping, so all
arithmetic after it is float64."""
import json
import math
import torch
from diffusers import DDIMScheduler

STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                        set_alpha_to_one=False, steps_offset=1)
CONFIGS = {
    "stable_diffusion": STABLE_DIFFUSION,
    "v_prediction": dict(STABLE_DIFFUSION, prediction_type="v_prediction"),
    "v_prediction_trailing_zero_snr": dict(STABLE_DIFFUSION, prediction_type="v_prediction",
                                           timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "trailing": dict(STABLE_DIFFUSION, timestep_spacing="trailing"),
    "linspace_alpha_one": dict(STABLE_DIFFUSION, timestep_spacing="linspace", set_alpha_to_one=True),
    "defaults": dict(clip_sample=False),
    "squared_cosine": dict(beta_schedule="squaredcos_cap_v2", clip_sample=False),
    "trained_betas": dict(num_train_timesteps=8, trained_betas=[0.01, 0.02, 0.03, 0.05, 0.08, 0.13, 0.21, 0.34],
                          clip_sample=False),
    "odd_length": dict(STABLE_DIFFUSION, num_train_timesteps=333),
}
X_T, OUTPUT, NOISE = [0.7, -1.9, 0.05], [-1.3, 0.4, 2.1], [0.3, -0.8, 1.7]


def steps_of(config, count, eta):
    scheduler = DDIMScheduler(**config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(count)
    x_t, output, noise = (torch.tensor(v, dtype=torch.float64) for v in (X_T, OUTPUT, NOISE))
    results = [scheduler.step(output, t, x_t, eta=eta, variance_noise=noise) for t in scheduler.timesteps]
    # null where diffusers itself gives NaN (alpha_bar = 0 and eta = 1: the root of a number rounded below 0)
    defined = [r.prev_sample.tolist() for r in results]
    defined = [None if any(map(math.isnan, prev)) else prev for prev in defined]
    return scheduler.timesteps.tolist(), defined, [r.pred_original_sample.tolist() for r in results]


cases = []
for name, config in CONFIGS.items():
    table = DDIMScheduler(**config).alphas_cumprod
    picked = sorted({0, 1, 2, len(table) // 3, len(table) // 2, len(table) - 2, len(table) - 1})
    runs = []
    for count in (1, 3, 6, 7) if len(table) < 100 else (1, 3, 7, 30):
        timesteps, eta0, x0 = steps_of(config, count, 0.0)
        _, eta1, _ = steps_of(config, count, 1.0)
        runs.append(dict(count=count, timesteps=timesteps, prev_eta0=eta0, prev_eta1=eta1, x0=x0))
    cases.append(dict(name=name, config=config, table={str(i): float(table[i]) for i in picked}, runs=runs))
json.dump(dict(x_t=X_T, output=OUTPUT, noise=NOISE, cases=cases), open("scheduler_variants.json", "w"), allow_nan=False)
