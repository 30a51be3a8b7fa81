#!/bin/bash
# The paper's study at its own size: slurm/study.toml, its runs one after the other on all ranks, then the evaluation and the tables.
# `sbatch slurm/study.sh`, from the project's folder; RLDIFF_CONFIG names another study. The job goes on by itself when its time is
# up or when it is preempted; a second submission waits for the first and finds it done (singleton goes by the job's name).
#SBATCH --job-name=study
#SBATCH --nodes=16 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append --dependency=singleton
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2

config=${RLDIFF_CONFIG:-slurm/study.toml}
out=${RLDIFF_OUT:-$RLDIFF_RUNS/$(basename "$config" .toml)}
# of all its runs
newest_checkpoint() {
    find "$out/runs" -maxdepth 3 -path '*/checkpoints/iteration-*[0-9]' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1
}
mkdir -p "$(dirname "$out")" || exit 2
started_from=$(newest_checkpoint)
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM
say "$config on $SLURM_NTASKS ranks (--device $device), start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID"
# shellcheck disable=SC2086
launch "$SLURM_NTASKS" study "$config" --device "$device" --out "$out" $RLDIFF_ARGS
go_on_or_leave "$code"
