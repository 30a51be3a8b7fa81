#!/usr/bin/env bash
# Roll-out and update of rldiff and of PyTorch with diffusers, in turn on the same machine, and the ratio of the medians.
#   bench/compare.sh MODEL [SAMPLES] [STEPS] [ROUNDS]      MODEL is a diffusers folder
# PYTHON is a Python with torch 2.11 and diffusers; COMPILE=1 also compiles the peer (on a GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 samples=${2:-16} steps=${3:-50} rounds=${4:-3}
python=${PYTHON:-.venv-tests/bin/python-for-tests}
for what in rollout update; do
    for round in $(seq "$rounds"); do
        target/release/rldiff bench "$what" --model "$model" --samples "$samples" --steps "$steps" --json ${BF16:+--bf16}
        "$python" bench/peer_diffusers.py --what "$what" --config "$model/unet/config.json" --batch "$samples" \
            --steps "$steps" ${COMPILE:+--compile} 2>/dev/null
    done
done | tee /dev/stderr | "$python" -c '
import json, statistics, sys
runs = {}
for line in sys.stdin:
    run = json.loads(line)
    runs.setdefault((run["what"], "compiled" in run), []).append(run["median_seconds"])
for what in "rollout", "update":
    ours, peer = (statistics.median(runs[what, is_peer]) for is_peer in (False, True))
    print(f"{what}: rldiff {ours:.3f} s, diffusers {peer:.3f} s, ratio {peer / ours:.2f}")
'
