"""Reads what two runs of the same training left, as any program with h5py would: python read_hdf5.py A B

A stored the selected transitions in f32, B the whole trajectories in f16. Prints "ok" or fails.
"""
import json
import pathlib
import sys

import h5py
import numpy as np


def shards(run, iteration, task):
    folder = pathlib.Path(run, "trajectories", f"iteration-{iteration:06d}")
    return [h5py.File(path, "r") for path in sorted(folder.glob(f"{task}-rank-*.h5"))]


def joined(files, name):
    return np.concatenate([file[name][()] for file in files])


def trajectories(a, b, iteration, task):
    first, second = shards(a, iteration, task), shards(b, iteration, task)
    for files in first, second:
        assert files and all(f.attrs["format"] == "rldiff trajectories 1" and f.attrs["task"] == task for f in files)
        assert [int(f.attrs["rank"]) for f in files] == list(range(len(files)))
        assert all(int(f.attrs["iteration"]) == iteration and float(f.attrs["eta"]) == 1.0 for f in files)
        n, steps = len(joined(files, "prompts")), len(files[0]["timesteps"])
        assert joined(files, "global_sample").tolist() == list(range(n))
        assert joined(files, "log_probs").shape == (n, steps) and joined(files, "log_probs").dtype == np.float32
        assert np.all(np.diff(files[0]["timesteps"][()]) < 0)
        assert abs(joined(files, "advantages").mean()) < 1e-4 and joined(files, "rewards").shape == (n,)
        assert all(isinstance(text, str) and text for text in files[0]["prompts"].asstr())
    for name in "prompts", "log_probs", "rewards", "advantages":
        assert np.array_equal(joined(first, name), joined(second, name)), name
    chosen = first[0]["selected_steps"][()]
    path = joined(second, "latents")
    assert path.dtype == np.float16 and path.shape[:2] == (n, steps + 1) and "latents" not in first[0]
    for name, at in ("x_t", chosen), ("x_prev", chosen + 1):
        selected = joined(first, name)
        assert selected.dtype == np.float32 and np.array_equal(selected.astype(np.float16), path[:, at]), name


def checkpoint(run, iteration):
    folder = pathlib.Path(run, "checkpoints", f"iteration-{iteration:06d}")
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"]
    files = [h5py.File(folder / shard["file"], "r") for shard in manifest["shards"]]
    vectors = {name: joined(files, name) for name in ("weights", "exp_avg", "exp_avg_sq")}
    assert all(v.shape == (manifest["elements"],) and np.isfinite(v).all() for v in vectors.values())
    layout = json.loads(files[0]["layout"].asstr()[()])
    ends = [0] + [entry["offset"] + int(np.prod(entry["shape"])) for entry in layout]
    # parameters begin at aligned offsets
    assert all(entry["offset"] >= end for entry, end in zip(layout, ends)) and ends[-1] <= manifest["elements"]
    assert "[run]" in files[0]["config"].asstr()[()] and json.loads(files[0]["meta"].asstr()[()])["optimizer_steps"] > 0
    return vectors


a, b = sys.argv[1:]
for iteration in range(4):
    for task in "composition", "parity", "preference":
        trajectories(a, b, iteration, task)
left, right = checkpoint(a, 4), checkpoint(b, 4)
assert all(np.array_equal(left[name], right[name]) for name in left)
print("ok")
