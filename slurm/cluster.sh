# shellcheck shell=bash
# The one file to edit for your cluster; the batch scripts of this folder source it. A value set in the environment of
# sbatch wins over what is set here.
#
# Partition, account and the like: give them to sbatch (`sbatch --partition=gpu --account=abc slurm/joint.sh`), or
# export SBATCH_PARTITION, SBATCH_ACCOUNT in the shell that you submit from. The scripts ask for the paper's machine, 16
# nodes of 8 GPUs; any number of ranks that divides run.lanes computes the same (`sbatch --nodes=2 slurm/joint.sh`).

# Modules and paths that the program needs, for example:
#   module purge; module load openmpi/4.1
#   export LD_LIBRARY_PATH=/opt/libtorch/lib:$LD_LIBRARY_PATH

# The program.
: "${RLDIFF:=target/release/rldiff}"

# How ranks are started: "srun", or "mpirun" inside the allocation.
: "${RLDIFF_LAUNCHER:=srun}"

# srun: which protocol the MPI speaks that rldiff was built with. MPICH (also the one that `make build` installs), Intel
# MPI, MVAPICH: --mpi=pmi2. Open MPI: --mpi=pmix. `srun --mpi=list` shows what the cluster has.
: "${RLDIFF_SRUN_FLAGS:=--mpi=pmi2}"

# mpirun: the launcher of that same MPI, and its flags.
: "${RLDIFF_MPIRUN:=mpirun}"
: "${RLDIFF_MPIRUN_FLAGS:=}"

# What the ranks compute on: "cuda", "cpu" or "auto". Empty: cuda where Slurm has given the job GPUs, so that a node whose
# GPUs do not work ends the job with a message instead of letting all ranks crawl on CPUs; else auto.
: "${RLDIFF_DEVICE:=}"

# Folder of the model to fine-tune (diffusers layout); empty: what the experiment's TOML says.
: "${RLDIFF_MODEL:=}"

# Where results go: every experiment gets a folder below it, named after its TOML.
: "${RLDIFF_RUNS:=runs}"

# More arguments of rldiff for every run, for example "--set run.seed=2"; separated by spaces.
: "${RLDIFF_ARGS:=}"
