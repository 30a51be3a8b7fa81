#!/bin/bash
# Scores models on the held-out prompts of an experiment, with the same noise for all: the model it started from, then
# those named. `sbatch slurm/evaluation.sh runs/joint runs/parity`; without arguments, runs/joint.
#SBATCH --job-name=evaluation
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue --open-mode=append
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2

config=${RLDIFF_CONFIG:-slurm/joint.toml}
out=${RLDIFF_OUT:-$RLDIFF_RUNS/evaluation-$(basename "$config" .toml)}
base=${RLDIFF_MODEL:-$(sed -n '/^\[model\]/,/^\[[a-z]/ s/^path = "\(.*\)"/\1/p' "$config")}
[ $# -gt 0 ] || set -- "$RLDIFF_RUNS/joint"
models=(--model "${base:?the model of $config}")
for model in "$@"; do models+=(--model "$model"); done
mkdir -p "$out" || exit 2
say "$config: $base $*"
# shellcheck disable=SC2086
launch "$SLURM_NTASKS" eval "$config" "${models[@]}" --json "$out/evaluation.json" $RLDIFF_ARGS
exit "$code"
