#!/bin/bash
# The reward-weighted likelihood on object composition alone, to compare with slurm/composition.sh.
# `sbatch slurm/reward_weighted-composition.sh`, from the project's folder. The job goes on by itself when its time is up or when it is
# preempted; a second submission waits for the first and finds it done (singleton goes by the job's name).
#SBATCH --job-name=reward_weighted-composition
#SBATCH --nodes=16 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append --dependency=singleton
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2
train reward_weighted-composition
