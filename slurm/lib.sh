# shellcheck shell=bash
# What the batch scripts of this folder share. They source it by the folder that sbatch was called in (Slurm runs a copy
# of a batch script, so its own place says nothing), or by RLDIFF_HOME.
#
# RLDIFF_CONFIG=FILE   another TOML than the script's own: RLDIFF_CONFIG=slurm/miniature-joint.toml sbatch slurm/joint.sh
# RLDIFF_OUT=DIR       another folder for the results than runs/NAME-OF-THE-TOML

cd "${RLDIFF_HOME:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}" || exit 2
source slurm/cluster.sh
set -u

# what Slurm says of the job's GPUs on a node: a number ("8", "h200:8"), a list of them, or nothing
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_JOB_GPUS:+1}}}
[ "${gpus##*:}" != 0 ] || gpus=''
device=${RLDIFF_DEVICE:-${gpus:+cuda}}
device=${device:-auto}

say() { echo "[$(date '+%F %T')] $*"; }

# may this script put its job back into the queue? Not where somebody has cancelled it (that would bring it back) or
# where Slurm has requeued it already: the job is COMPLETING then, as it is when its time is up, but for the reason
may_requeue() {
    timeout 20 scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -qE 'JobState=RUNNING|Reason=TimeLimit'
}

newest_checkpoint() { find "$out/checkpoints" -maxdepth 1 -name 'iteration-*[0-9]' 2>/dev/null | sort | tail -n 1; }

# A signal to the batch script (USR1 before the time limit and before preemption, TERM when time is up) goes on to all
# ranks. It is repeated, because a launcher that is still starting may lose it; the program does not mind.
launcher='' reminder='' signalled='' code=''
ask_to_stop() {
    signalled=yes
    say "asked to stop ($1)"
    [ -n "$launcher" ] || return
    kill -USR1 "$launcher" 2>/dev/null
    [ -n "$reminder" ] || {
        while sleep 10; do kill -USR1 "$launcher" 2>/dev/null || break; done &
        reminder=$!
    }
    # time is up: Slurm kills this script within seconds, whether the ranks have saved or not
    [ "$1" != TERM ] || ! may_requeue || go_on_or_leave 143
}

# what srun leaves with when it cannot start the ranks, so that it is not taken for the program's own 1
export SLURM_EXIT_ERROR=70

# Starts `rldiff ARGUMENTS` on $1 ranks and waits for it; leaves its exit code in $code.
launch() {
    local ranks=$1 command
    local per_node=$(((SLURM_NTASKS + SLURM_JOB_NUM_NODES - 1) / SLURM_JOB_NUM_NODES))
    shift
    # the flags are lists of words
    # shellcheck disable=SC2206
    case $RLDIFF_LAUNCHER in
        # a rank that dies takes the others along after --wait; --kill-on-bad-exit would do so at once, and also kill
        # those that are a moment later than the first to leave with code 75
        srun) command=(srun --ntasks="$ranks" --nodes=$(((ranks + per_node - 1) / per_node))
            --kill-on-bad-exit=0 --wait=30 $RLDIFF_SRUN_FLAGS) ;;
        mpirun) command=("$RLDIFF_MPIRUN" $RLDIFF_MPIRUN_FLAGS -n "$ranks") ;;
        *) say "RLDIFF_LAUNCHER=$RLDIFF_LAUNCHER is neither srun nor mpirun (slurm/cluster.sh)"; exit 2 ;;
    esac
    "${command[@]}" "$RLDIFF" "$@" &
    launcher=$!
    while :; do
        signalled=''
        wait "$launcher"
        code=$?
        # a trapped signal interrupts `wait`, which then gives 128 + the signal's number
        [ -n "$signalled" ] && [ "$code" -gt 128 ] || break
    done
    launcher=''
    [ -z "$reminder" ] || kill "$reminder" 2>/dev/null
    reminder=''
}

# Ends the script after the run has ended with code $1, or puts the job back into the queue.
go_on_or_leave() {
    local tries
    case $1 in
        0) say "$out: done"; rm -f "$out.tries"; exit 0 ;;
        # a failure at work, a mistake, a panic: it would fail again
        1 | 2 | 101) say "$out: failed with code $1; not started again"; exit "$1" ;;
        75) say "$out: saved, to be continued" ;;
        # ended from outside: a rank, a node, the time limit, a launcher that could not start it
        *)
            tries=0
            [ "$(newest_checkpoint)" != "$started_from" ] || tries=$(($(cat "$out.tries" 2>/dev/null || echo 0) + 1))
            if [ "$tries" -ge 3 ]; then
                rm -f "$out.tries"
                say "$out: ended with code $1; three starts without a new checkpoint, not started again"
                exit "$1"
            fi
            echo "$tries" > "$out.tries"
            say "$out: ended with code $1; goes on from $(newest_checkpoint)"
            ;;
    esac
    if may_requeue; then
        if timeout 60 scontrol requeue "$SLURM_JOB_ID"; then
            say "requeued"
        elif may_requeue; then
            say "cannot requeue: submit the script again to go on"
        fi
    else
        say "the job is being ended or requeued by Slurm"
    fi
    exit 75
}

# Trains the experiment $1 until its iterations are done, however often the job is interrupted.
train() {
    local config=${RLDIFF_CONFIG:-slurm/$1.toml} arguments
    out=${RLDIFF_OUT:-$RLDIFF_RUNS/$(basename "$config" .toml)}
    mkdir -p "$(dirname "$out")" || exit 2
    started_from=$(newest_checkpoint)
    # shellcheck disable=SC2206
    arguments=(train "$config" --device "$device" --resume auto --out "$out" $RLDIFF_ARGS)
    [ -z "$RLDIFF_MODEL" ] || arguments+=(--set "model.path=$RLDIFF_MODEL")
    trap 'ask_to_stop USR1' USR1
    trap 'ask_to_stop TERM' TERM
    say "$config on $SLURM_NTASKS ranks (--device $device), start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID"
    launch "$SLURM_NTASKS" "${arguments[@]}"
    go_on_or_leave "$code"
}
