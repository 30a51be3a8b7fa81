#!/bin/bash
# Measures weak and strong scaling on 1, 2, 4, … ranks of the allocation, and predicts it up to 1,024.
# `sbatch slurm/scaling.sh`; the table and the plot lie in runs/scaling-NAME-OF-THE-TOML.
#SBATCH --job-name=scaling
#SBATCH --nodes=16 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --requeue --open-mode=append
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2

config=${RLDIFF_CONFIG:-slurm/joint.toml}
out=${RLDIFF_OUT:-$RLDIFF_RUNS/scaling-$(basename "$config" .toml)}
for ((ranks = 1; ranks <= SLURM_NTASKS; ranks *= 2)); do
    say "$config on $ranks ranks"
    # shellcheck disable=SC2086
    launch "$ranks" bench scaling "$config" ${device:+--device "$device"} --out "$out" $RLDIFF_ARGS
    [ "$code" = 0 ] || exit "$code"
done
# shellcheck disable=SC2086
launch 1 bench scaling --report "$out" ${RLDIFF_NETWORK:-}
exit "$code"
