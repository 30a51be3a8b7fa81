#!/bin/bash
# Scores models on prompt sets, with the same noise for all. `sbatch slurm/evaluation.sh` evaluates the models and sets of
# slurm/eval-preference.toml; RLDIFF_CONFIG names another evaluation (eval-parity.toml, eval-composition.toml), or a training
# experiment, whose tasks are then the sets. `sbatch slurm/evaluation.sh runs/joint runs/parity` compares these with the
# model that they started from. Submitted again, it goes on where it was cut off.
#SBATCH --job-name=evaluation
#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue --open-mode=append
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2

config=${RLDIFF_CONFIG:-slurm/eval-preference.toml}
out=${RLDIFF_OUT:-$RLDIFF_RUNS/evaluation-$(basename "$config" .toml)}
models=()
if [ $# -gt 0 ]; then
    base=${RLDIFF_MODEL:-$(sed -n 's/^path = "\(.*\)"/\1/p' "$config" | head -n 1)}
    for model in "${base:?the model of $config}" "$@"; do models+=(--model "$model"); done
fi
mkdir -p "$out" || exit 2
say "$config: ${models[*]:-its models}"
# shellcheck disable=SC2086
launch "$SLURM_NTASKS" eval "$config" --device "$device" ${models[@]+"${models[@]}"} --out "$out" --json "$out/evaluation.json" $RLDIFF_ARGS
exit "$code"
