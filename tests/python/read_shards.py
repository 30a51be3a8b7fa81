"""Reads with h5py what tests/runs.rs made rldiff write, and checks it against the documented layout."""

import json
import sys
from pathlib import Path

import h5py
import numpy as np

root = Path(sys.argv[1])



def check_trajectories(run, ranks, latents, number):
    samples = 0
    for rank in range(ranks):
        with h5py.File(root / run / f"trajectories/iteration-000001/preference-rank-{rank:03}.h5") as file:
            assert file.attrs["format"] == "rldiff trajectories 1" and file.attrs["task"] == "preference"
            assert (file.attrs["rank"], file.attrs["iteration"], file.attrs["eta"]) == (rank, 1, 1.0)
            n = 8 // ranks
            assert list(file["global_sample"]) == list(range(rank * n, (rank + 1) * n))
            assert file["prompts"].shape == (n,) and file["prompts"].asstr()[0].startswith("a")
            assert file["timesteps"].shape == (6,) and file["log_probs"].shape == (n, 6)
            assert np.isfinite(file["log_probs"][:]).all()
            assert file["rewards"].shape == file["advantages"].shape == (n,)
            if latents == "all":
                assert file["latents"].shape == (n, 7, 4, 8, 8) and file["latents"].dtype == number
                assert abs(float(np.std(file["latents"][:, 0].astype("f8"))) - 1) < 0.1, "x_T is N(0, 1)"
            else:
                k = len(file["selected_steps"])
                assert k == 5 and file["x_t"].shape == file["x_prev"].shape == (n, k, 4, 8, 8)
                assert file["x_t"].dtype == number
            samples += n
    assert samples == 8


def check_checkpoint(run, ranks):
    folder = root / run / "checkpoints/iteration-000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) == ranks
    parts = []
    for shard in manifest["shards"]:
        with h5py.File(folder / shard["file"]) as file:
            assert file.attrs["format"] == "rldiff checkpoint 1" and file.attrs["first"] == sum(map(len, parts))
            assert list(file["vectors"].asstr()) == ["weights", "exp_avg", "exp_avg_sq"]
            parts.append(file["weights"][:])
            if shard is manifest["shards"][0]:
                layout = json.loads(file["layout"].asstr()[()])
                assert json.loads(file["meta"].asstr()[()])["optimizer_steps"] == 20
                assert "[rollout]" in file["config"].asstr()[()]
    weights = np.concatenate(parts)
    assert len(weights) == manifest["elements"]
    entry = next(e for e in layout if e["name"] == "conv_in.weight")
    assert entry["shape"][1:] == [4, 3, 3] and np.abs(weights[entry["offset"] :][:36]).max() > 0


check_trajectories("selected", 2, "selected", np.float32)
check_trajectories("all", 1, "all", np.float16)
check_checkpoint("selected", 2)
check_checkpoint("all", 1)
print("all shards are as documented")
