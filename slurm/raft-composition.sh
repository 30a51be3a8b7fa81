#!/bin/bash
# RAFT on object composition alone, to compare with slurm/composition.sh.
# `sbatch slurm/raft-composition.sh`, from the project's folder. The job goes on by itself when its time is up or when it is
# preempted; a second submission waits for the first and finds it done (singleton goes by the job's name).
#SBATCH --job-name=raft-composition
#SBATCH --nodes=16 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120 --requeue --open-mode=append --dependency=singleton
#SBATCH --output=%x-%j.out
# shellcheck source=slurm/lib.sh
source "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/lib.sh" || exit 2
train raft-composition
