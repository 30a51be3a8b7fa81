#!/usr/bin/env bash
# Roll-out and update of rldiff and of PyTorch with diffusers, in turn on the same machine, and the ratios of the medians.
#   bench/compare.sh MODEL [SAMPLES] [STEPS] [ROUNDS]
# MODEL is a diffusers folder, or sd2-base=CONFIG (also sd1.5=CONFIG): random weights, and the U-Net's config.json for the peer.
# PYTHON is a Python with torch 2.11 and diffusers; BF16=1 for bf16; COMPILE=1 also runs the peer compiled (max-autotune,
# channels-last; minutes). On a GPU rldiff replays CUDA graphs in the roll-out.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 samples=${2:-16} steps=${3:-50} rounds=${4:-3}
python=${PYTHON:-.venv-tests/bin/python-for-tests}
case $model in
*=*) ours=(--architecture "${model%%=*}") config=${model#*=} ;;
*) ours=(--model "$model") config=$model/unet/config.json ;;
esac
graph=""
[ -e /dev/nvidia0 ] && graph=--cuda-graph
for what in rollout update; do
    for round in $(seq "$rounds"); do
        target/release/rldiff bench "$what" "${ours[@]}" --samples "$samples" --steps "$steps" --json ${BF16:+--bf16} $graph
        for compile in "" ${COMPILE:+--compile}; do
            "$python" bench/peer_diffusers.py --what "$what" --config "$config" --batch "$samples" --steps "$steps" \
                $compile 2>/dev/null
        done
    done
done | tee /dev/stderr | "$python" -c '
import json, statistics, sys
runs = {}
for line in sys.stdin:
    run = json.loads(line)
    who = "rldiff" if "ranks" in run else "diffusers, compiled" if run["compiled"] else "diffusers"
    runs.setdefault((run["what"], who), []).append(run["median_seconds"])
for (what, who), seconds in runs.items():
    ours, median = statistics.median(runs[what, "rldiff"]), statistics.median(seconds)
    print(f"{what}: {who} {median:.3f} s" + ("" if who == "rldiff" else f", ratio {median / ours:.2f}"))
'
