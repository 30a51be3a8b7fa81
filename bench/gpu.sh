#!/usr/bin/env bash
# What a GPU that is lent for minutes is asked: does it work, how fast, beside what. In two parts, each one call on a
# machine that is started for it; with 90 s for each start both take 12 minutes:
#   bench/gpu.sh 1 --out DIR       270 s: versions, correctness, kernels, roll-out and update with and without graphs, an
#                                  iteration with decoding, PyTorch with diffusers eager in both memory formats, with
#                                  bf16 weights and with f32 masters under autocast
#   bench/gpu.sh 2 --out DIR       270 s: the same peer compiled (--seconds 420 where there is time for max-autotune)
#   bench/gpu.sh report DIR        the table and the JSON again, from the parts that lie in DIR
# DIR gets part-N.jsonl (a row per step, with every measured value), part-N.smi.csv (clocks, power, temperature and memory
# every 500 ms), part-N.log (what the steps printed), and of all its parts gpu.txt, the table, and gpu.json.
#
#   --seconds N   when the part ends; a step that has no time left is a row that says so. Of 15 minutes, 300 and 420
#   --device cpu  without a GPU; --tiny: the miniature, a step or two of everything, no compiled peer. `make test` does both
#
# A step that fails, is not installed or takes longer than its limit is a row too. The exit code is 1 where one of rldiff's
# own failed; the peer's do not count.
#
# RLDIFF is the program (target/release/rldiff), PYTHON a Python with torch 2.11 and diffusers, TESTS a folder with the test
# executables gpu_kernels-* and gpu-* (target/release/deps). For another machine: `make bundle`, `cargo test --no-run`, and
# the two stripped executables beside the bundle's libexec/rldiff; there RLDIFF=…/rldiff TESTS=…/libexec bench/gpu.sh 1.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    echo "usage: bench/gpu.sh 1|2 [--out DIR] [--device cuda|cpu] [--tiny] [--seconds N]; bench/gpu.sh report DIR" >&2
    exit 2
}

python=${PYTHON:-python3}
report() { "$python" bench/gpu_report.py "$@"; }
part=${1:-}
case $part in
1 | 2) shift ;;
report) [ $# = 2 ] || usage; report table "$2"; exit ;;
*) usage ;;
esac
out=${OUT:-target/gpu} device=cuda tiny='' budget=270
while [ $# -gt 0 ]; do
    case $1 in
    --tiny) tiny=yes; shift; continue ;;
    --out) out=${2:?}; ;;
    --device) device=${2:?}; ;;
    --seconds) budget=${2:?}; ;;
    *) usage ;;
    esac
    shift 2
done
[[ $device = cuda || $device = cpu ]] && [[ $budget =~ ^[0-9]+$ ]] || usage
mkdir -p "$out" || exit 74
rows=$out/part-$part.jsonl log=$out/part-$part.log smi=$out/part-$part.smi.csv
rm -f "$rows" "$log" "$smi"
program=${RLDIFF:-target/release/rldiff} tests=${TESTS:-target/release/deps}
deadline=$((SECONDS + budget)) failed=''

work=$(mktemp -d)
logger=''
leave() {
    [ -z "$logger" ] || kill "$logger" 2>/dev/null
    rm -rf "$work"
}
trap leave EXIT
trap 'exit 143' TERM INT

# one row: row NAME [OPTION...] -- COMMAND
row() { report add "$rows" --part "$part" --name "$@"; }

left_out() {
    local name=$1 why=$2
    shift 2
    row "$name" --why "$why" -- "$@"
}

# step NAME LIMIT COMMAND: one row, from what the command prints; LIMIT in seconds, less where less is left
step() {
    local name=$1 limit=$2 left=$((deadline - SECONDS)) code=0 begun
    shift 2
    if [ "$left" -lt 3 ]; then
        left_out "$name" "no time left" "$@"
        return
    fi
    # limits are a GPU's; a busy CPU needs longer
    [ "$device" = cuda ] || limit=$((5 * limit))
    [ "$limit" -le "$left" ] || limit=$left
    begun=$(date +%s.%N)
    timeout --kill-after=2 "$limit" "$@" > "$work/stdout" 2> "$work/stderr" || code=$?
    row "$name" --begun "$begun" --ended "$(date +%s.%N)" --limit "$limit" --code "$code" --stdout "$work/stdout" \
        --stderr "$work/stderr" -- "$@"
    { echo "== $name: $*"; cat "$work/stdout" "$work/stderr"; } >> "$log"
    # the peer's failures are its own, and what had too little time has not failed
    case $name:$code in
    peer*:* | *:0 | *:124 | *:137) ;;
    *) failed=yes ;;
    esac
}

on_gpu() {
    if [ "$device" = cuda ]; then
        step "$@"
    else
        left_out "$1" "needs a GPU" "${@:3}"
    fi
}

# a test executable NAME of $tests, the newest
test_program() {
    local found
    found=$(find "$tests" -maxdepth 1 -name "$1-*" -type f -perm -u+x ! -name '*.d' -printf '%T@ %p\n' 2>/dev/null |
        grep -E "/$1-[0-9a-f]{16}\$" | sort -rn | head -n 1 | cut -d' ' -f2-)
    if [ -z "$found" ]; then
        left_out "test $1" "no $1-* in $tests" "$@"
        return
    fi
    step "test $1" 90 env "${test_environment[@]}" "$found" --nocapture --test-threads=1 "${@:2}"
}

if [ -n "$tiny" ]; then
    # two samples of the miniature
    model=() samples=2 many=2 few=2 repeats=1 product=0.3 threads=1 kernels=(--samples 1 --parameters 10000 --launches 2)
    iteration=(--set 'model.path="miniature"' --set rollout.steps=2 --set method.timesteps=1
        --set task.preference.samples=2 --set task.preference.evaluation_samples=2)
else
    model=(--architecture sd2-base) samples=16 many=50 few=20 repeats=5 product=10 threads=16 kernels=()
    iteration=(--architecture sd2-base --set task.preference.samples=16)
fi
on=(--device "$device")
passes=("${on[@]}" "${model[@]}" --samples "$samples" --threads "$threads" --bf16 --json)
graphs=false
test_environment=()
if [ "$device" = cuda ]; then
    graphs=true
    # as the bundle's own wrapper: this machine's PyTorch
    torch=${RLDIFF_TORCH:-$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))' 2>/dev/null)}
    libraries=$torch/lib:$torch/../nvidia/cu13/lib:$torch/../nvidia/nccl/lib
    test_environment=(RLDIFF_REQUIRE_GPU=1 "LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
fi
"$program" bench unet-config "${model[@]}" > "$work/unet.json" || exit
peer=("$python" bench/peer_diffusers.py --config "$work/unet.json" --batch "$samples" --steps "$few" --threads "$threads"
    "${on[@]}" --repeats $((repeats > 3 ? 3 : 1)))

if command -v nvidia-smi > /dev/null; then
    nvidia-smi --query-gpu=timestamp,index,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used \
        --format=csv,noheader,nounits -lms 500 > "$smi" 2>> "$log" &
    logger=$!
else
    left_out "nvidia-smi" "not installed: no clocks, power and temperature" nvidia-smi
fi

rollout() { step "$1" 90 "$program" bench rollout "${passes[@]}" "${@:2}"; }
update() { step "$1" 60 "$program" bench update "${passes[@]}" "${@:2}"; }

step "product" 60 "$program" bench product "${on[@]}" --bf16 --seconds "$product" --threads "$threads" --json
if [ "$part" = 1 ]; then
    step "doctor" 30 "$program" doctor "${on[@]}"
    test_program gpu_kernels
    test_program gpu --skip a_joint_run
    on_gpu "roll-out, graph" 90 "$program" bench rollout "${passes[@]}" --steps "$many" --repeats "$repeats" --cuda-graph
    rollout "roll-out" --steps "$few" --repeats "$repeats"
    update "update" --repeats $((6 * repeats))
    weights=bf16,masters
    [ "$device" = cuda ] || weights=f32,masters
    step "peer eager" 90 "${peer[@]}" --what rollout,update --memory-format contiguous,channels-last --weights "$weights"
    step "iteration" 90 "$program" bench iteration slurm/preference.toml "${on[@]}" --measured $((repeats > 3 ? 3 : 1)) \
        --json --set run.lanes=1 --set run.threads="$threads" --set model.gradient_checkpointing=false \
        --set rollout.cuda_graph=$graphs --set 'pretrain.mode="off"' \
        --set 'task.preference.prompts={ source = "occupations", held_out = 0, split_seed = 1 }' \
        --set 'task.preference.reward={ name = "jpeg_compressibility" }' \
        --set 'task.parity.reward={ name = "jpeg_compressibility" }' \
        --set 'task.composition.reward={ name = "jpeg_compressibility" }' "${iteration[@]}"
    on_gpu "update, graph roll-out" 60 "$program" bench update "${passes[@]}" --repeats "$repeats" --cuda-graph
    update "update, checkpointing" --repeats "$repeats" --gradient-checkpointing
    step "kernels" 60 "$program" bench kernels "${on[@]}" "${kernels[@]}" --json
    on_gpu "roll-out, graph, again" 30 "$program" bench rollout "${passes[@]}" --steps "$many" --repeats 1 --cuda-graph
else
    # the same minutes of the same card
    on_gpu "roll-out, graph" 60 "$program" bench rollout "${passes[@]}" --steps "$few" --repeats "$repeats" --cuda-graph
    [ "$device" = cuda ] || rollout "roll-out" --steps "$few" --repeats "$repeats"
    update "update" --repeats $((2 * repeats))
    compiled=("rollout default bf16 120" "update default masters 150" "rollout max-autotune-no-cudagraphs bf16 220"
        "update max-autotune-no-cudagraphs masters 220")
    for line in "${compiled[@]}"; do
        read -r what mode weights limit <<< "$line"
        command=("${peer[@]}" --what "$what" --compile="$mode" --weights "$weights")
        if [ -n "$tiny" ]; then
            left_out "peer compiled, $what, $mode" "not at tiny size" "${command[@]}"
        else
            step "peer compiled, $what, $mode" "$limit" "${command[@]}"
        fi
    done
fi

[ -z "$logger" ] || kill "$logger" 2>/dev/null
logger=''
report table "$out" || exit
[ -z "$failed" ]
