#!/bin/bash
# Does this cluster run rldiff? `rldiff doctor`, then two iterations of the embedded miniature, on all ranks: minutes.
# `sbatch slurm/smoke.sh`, from the project's folder; `sbatch --nodes=1 slurm/smoke.sh` tries one node. The number of ranks
# divides 128 (up to 8: it divides 8). The results lie in runs/smoke-JOB.
#SBATCH --job-name=smoke
#SBATCH --nodes=16 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=00:30:00
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2

out=${RLDIFF_OUT:-$RLDIFF_RUNS/smoke-$SLURM_JOB_ID}
mkdir -p "$(dirname "$out")" || exit 2
say "doctor on $SLURM_NTASKS ranks (--device $device)"
launch "$SLURM_NTASKS" doctor --device "$device"
[ "$code" = 0 ] || { say "doctor: code $code"; exit "$code"; }
say "two iterations on $SLURM_NTASKS ranks (--device $device)"
# shellcheck disable=SC2086
launch "$SLURM_NTASKS" train --device "$device" --out "$out" --set run.iterations=2 --set evaluation.every=0 $RLDIFF_ARGS
[ "$code" = 0 ] && say "$out: done" || say "training: code $code"
exit "$code"
