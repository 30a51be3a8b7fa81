# What the rows of output.toml share; they begin with `. "$CORPUS/files/output.sh"`.

# tiny ARGUMENTS…: a training of one iteration in about two seconds, into ./run or what OUT names.
tiny() {
    rldiff "$SMALL" --out "${OUT:-run}" --set run.lanes=2 --set run.iterations=1 --set rollout.steps=3 --set method.timesteps=1 \
        --set evaluation.pictures=1 --set evaluation.every=0 --set task.composition.samples=2 \
        --set task.parity.samples=4 --set task.preference.samples=2 --set task.composition.evaluation_samples=2 \
        --set task.parity.evaluation_samples=4 --set task.preference.evaluation_samples=2 "$@"
}

# on_disk SIZE SCRIPT: runs a line of bash where ./disk is a file system of its own. The mount is in a namespace of that
# bash alone, so it is gone when that ends.
on_disk() {
    mkdir -p disk
    unshare --mount bash -o pipefail -c 'mount -t tmpfs -o "size=$0" tmpfs disk && eval "$1"' "$1" "$2"
}

# to_nobody COMMAND…: runs it with its standard output a pipe whose reader has gone.
to_nobody() {
    exec 3> >(:)
    wait $!
    "$@" >&3 3>&-
    local code=$?
    exec 3>&-
    return $code
}

# codes WANTED COMMANDS…: each ends with that code, or its name and code are said and this fails.
codes() {
    local wanted=$1 code command
    shift
    for command in "$@"; do
        eval "$command"
        code=$?
        [ "$code" = "$wanted" ] || { echo "WRONG: $command ended with $code, not with $wanted" >&2; return 99; }
    done
}
