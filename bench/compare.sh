#!/usr/bin/env bash
# Roll-out and update of rldiff and of PyTorch with diffusers, in turn on the same machine, and the ratios of the medians.
#   bench/compare.sh MODEL [SAMPLES] [STEPS] [ROUNDS]
# MODEL is a diffusers folder, or sd2-base=CONFIG (also sd1.5=CONFIG): random weights, and the U-Net's config.json for the peer.
# RLDIFF is the program (target/release/rldiff), PYTHON a Python with torch 2.11 and diffusers; BF16=1 for bf16. COMPILE=1
# also runs the peer compiled (torch.compile, max-autotune, channels-last), COMPILE=MODE in another of its modes. What it
# compiled stays in target/inductor for the next round and the next call. A run of the peer that fails or takes longer than
# PEER_LIMIT seconds (1,800) is left out. On a GPU rldiff replays CUDA graphs in the roll-out.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$1 samples=${2:-16} steps=${3:-50} rounds=${4:-3}
python=${PYTHON:-.venv-tests/bin/python-for-tests}
program=${RLDIFF:-target/release/rldiff} limit=${PEER_LIMIT:-1800}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/target/inductor}
case $model in
*=*) ours=(--architecture "${model%%=*}") config=${model#*=} ;;
*) ours=(--model "$model") config=$model/unet/config.json ;;
esac
graph=""
[ -e /dev/nvidia0 ] && graph=--cuda-graph
compiled=${COMPILE:+--compile=${COMPILE/#1/max-autotune}}
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT

# A peer that does not end well is left out, with its last words.
peer() {
    local code=0
    timeout "$limit" "$python" bench/peer_diffusers.py --config "$config" --batch "$samples" --steps "$steps" "$@" \
        2> "$messages" || code=$?
    if [ "$code" = 124 ]; then
        echo "left out, not done within $limit s: diffusers $*" >&2
    elif [ "$code" != 0 ]; then
        tail -n 15 "$messages" >&2
        echo "left out, exit code $code: diffusers $*" >&2
    fi
}

for what in rollout update; do
    for round in $(seq "$rounds"); do
        "$program" bench "$what" "${ours[@]}" --samples "$samples" --steps "$steps" --json ${BF16:+--bf16} \
            $([ "$what" = rollout ] && echo "$graph")
        for how in "" $compiled; do
            peer --what "$what" $how
        done
    done
done | tee /dev/stderr | "$python" -c '
import json, statistics, sys
runs = {}
for line in sys.stdin:
    run = json.loads(line)
    compiled = run.get("compiled")
    who = "rldiff" if "ranks" in run else f"diffusers, compiled ({compiled})" if compiled else "diffusers"
    runs.setdefault((run["what"], who), []).append(run)
for (what, who), of_who in runs.items():
    median = lambda runs: statistics.median(run["median_seconds"] for run in runs)
    seconds, ours = median(of_who), median(runs[what, "rldiff"])
    print(f"{what}: {who} {seconds:.3f} s" + ("" if who == "rldiff" else f", ratio {seconds / ours:.2f}"))
'
