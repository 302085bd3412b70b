#!/usr/bin/env bash
# A GPU for 15 minutes, in two commands of at most 10. Parts in order of worth, each cut at its own limit; what a part
# has is written at once, as at most 8 files right in $OUT. A second script makes tables of them: scripts/gpu_tables.py.
#
#   scripts/gpu_check.sh first              build, smoke test, digits whole, chains against plain PyTorch, memory checker
#   BUDGET=330 scripts/gpu_check.sh second  64 x 64 training with pictures and KID, ops, profile, a compiled baseline
#   DEVICE=cpu scripts/gpu_check.sh all       the same at small size, without a GPU
#
# No network is needed, and no build isolation: the image's own setuptools, pybind11 and ninja build it. What the image
# lacks is taken from wheels in .whl/, where there are any. BUDGET: seconds for this command, by default 580; the parts of
# `first` take 490 at most, so that a lease of 15 minutes that counts its start leaves some 330 to `second`.
# Exit status: 0, or 1 where a part failed; a part that ran out of time is listed, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1
export scratch
scratch=$(mktemp -d)
export OUT=${OUT:-build/gpu_check} MGEBM_CACHE=${MGEBM_CACHE:-$scratch/cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
small=0 images=512 tiny=() few=() groups=() per_test=() compiled=(--against compile_bf16)
ops=(langevin_step edge_step dense_chain batch_norm_act bias_act noise pyramid upsample)
if [ "$DEVICE" = cpu ]; then
    small=1 images=32 tiny=(--tiny) few=(--set steps=3 --set batch_size=8 --set langevin.steps=2) groups=(dense plans4none captured)
    compiled=() ops=(noise)
fi
# Without a GPU the limits would only cut a busy machine short.
budget=${BUDGET:-$((small ? 3600 : 580))} failed=0 what=${1:-all}
exec 3>&1 4>&2 > >(tee -a "$OUT/log.txt") 2>&1
logger=$!

said() { # what an exit status means
    case $1 in
        0) echo "done" ;;
        124 | 137) echo cut ;;
        *) echo "failed with $1" ;;
    esac
}

record() { printf '{"part": "run", "name": "%s", "status": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$OUT/results.jsonl"; }

# part NAME MOST COMMAND...: never more than MOST seconds, nor all parts together more than the budget.
part() {
    local name=$1 most=$2 left=$((budget - SECONDS)) begin=$SECONDS status=0
    shift 2
    most=$((small ? 6 * most : most))
    if ((left < 5)); then
        record "$name" "no time left" 0
        return 1
    fi
    echo "== $name, at $SECONDS s"
    # Training saves, and pytest reports, where they are interrupted.
    timeout --signal=INT --kill-after=8 "$((most < left ? most : left))" "$@" || status=$?
    record "$name" "$(said "$status")" "$((SECONDS - begin))"
    echo "== $name: $(said "$status") after $((SECONDS - begin)) s"
    case $(said "$status") in failed*) failed=1 ;; esac
    return "$status"
}

build() {
    if compgen -G ".whl/*.whl" >/dev/null; then "$PYTHON" -m pip install -q --no-index --no-deps .whl/*.whl; fi
    local how=(-q --no-index --no-build-isolation --no-deps -e .)
    if [ "$DEVICE" = cuda ]; then
        # One architecture. Where nvcc fails, the Triton kernels can still be tried.
        MGEBM_CUDA=1 MGEBM_CUDA_ARCHS=${MGEBM_CUDA_ARCHS:-90} "$PYTHON" -m pip install "${how[@]}" && return
        echo "the CUDA build failed; without it"
    fi
    MGEBM_CUDA=0 "$PYTHON" -m pip install "${how[@]}"
}
export -f build

table() { # table NAME FILE: its rows, if it is there, are appended to bench.csv
    if [ -e "$2" ]; then { echo "# $1 $(basename "$2")"; cat "$2"; } >>"$OUT/bench.csv"; fi
}

bench() { # bench NAME MOST ARGUMENTS...: rows are appended to bench.csv
    local name=$1 most=$2 file
    shift 2
    part "$name" "$most" "$PYTHON" -m mgebm_fast bench "$@" --csv "$scratch/$name"
    for file in "$scratch/$name"/*.csv; do table "$name" "$file"; done
}

train() { # train NAME MOST ARGUMENTS...: pictures, metrics and KID of a run, also of one that was cut
    local name=$1 most=$2 picture
    shift 2
    part "train $name" "$most" "$PYTHON" -m mgebm_fast train "$@" --out "$scratch/$name"
    tail -c 15M "$scratch/$name/metrics.jsonl" >"$OUT/$name.jsonl" 2>/dev/null
    picture=$(find "$scratch/$name" -name '*.png' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d' ' -f2-)
    if [ -n "$picture" ]; then cp "$picture" "$OUT/$name.png"; fi
    if [ ! -e "$scratch/$name/config.toml" ]; then
        record "evaluate $name" "nothing to evaluate" 0
        return
    fi
    sed -n "s/^batch_size = \([0-9]*\)$/{\"part\": \"train\", \"name\": \"$name\", \"batch_size\": \1}/p" \
        "$scratch/$name/config.toml" >>"$OUT/results.jsonl"
    # What `part` says must not come among the results.
    # shellcheck disable=SC2016
    if part "evaluate $name" 60 bash -c '"$PYTHON" -m mgebm_fast evaluate "$1" --num "$2" --json >"$scratch/found.json"' \
        evaluate "$scratch/$name" "$images"; then
        "$PYTHON" -c 'import json, sys
print(json.dumps({"part": "evaluate", "name": sys.argv[1], **json.load(open(sys.argv[2]))}))' "$name" "$scratch/found.json" \
            >>"$OUT/results.jsonl" || failed=1
    fi
}

sanitise() { # the memory checker on one kernel a time at small shapes, all side by side, for at most $1 seconds
    local pair tool filter=--kernel-regex port=49152 worst=0 waiting=() one # --kernel-regex: as it was called before
    if compute-sanitizer --help 2>&1 | grep -q -e --kernel-name; then filter=--kernel-name; fi
    for pair in resident:conv_chain norms:batch_norm_act edge:edge_step dense:dense_chain; do
        for tool in memcheck racecheck; do
            port=$((port + 16))
            (
                status=0
                # Without OUT: what the smoke test found stays as it is.
                OUT='' timeout --kill-after=5 "$1" compute-sanitizer --port "$port" --tool "$tool" --error-exitcode 9 \
                    --print-limit 5 "$filter" "kns=${pair#*:}" "$PYTHON" scripts/gpu_smoke.py "${pair%:*}" \
                    >"$scratch/$tool.${pair%:*}" 2>&1 || status=$?
                record "$tool ${pair%:*}" "$(said "$status")" "$SECONDS"
                echo "-- $tool ${pair%:*}: $(said "$status")"
                tail -n 15 "$scratch/$tool.${pair%:*}"
                [ "$status" = 0 ] || [ "$(said "$status")" = cut ]
            ) &
            waiting+=($!)
        done
    done
    for one in "${waiting[@]}"; do wait "$one" || worst=1; done
    return "$worst"
}
export -f sanitise said record

profile() { # one launch of each kernel, which is not the first of its name
    local pair
    for pair in resident:conv_chain edge:edge_step norms:batch_norm_act_kernel; do
        part "profile ${pair#*:}" 20 env OUT= ncu --csv --clock-control none --launch-skip 1 --launch-count 1 \
            --kernel-name "regex:${pair#*:}" --log-file "$scratch/profile.csv" "$PYTHON" scripts/gpu_smoke.py "${pair%:*}"
        cat "$scratch/profile.csv" >>"$OUT/profile.csv" 2>/dev/null
    done
}

first() {
    if [ "$DEVICE" = cuda ]; then nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader; fi
    if [ -z "${SKIP_BUILD:-}" ]; then part build 90 bash -c build; fi
    part doctor 20 "$PYTHON" -m mgebm_fast doctor
    LIMIT=$((small ? 400 : 75)) part smoke 80 "$PYTHON" scripts/gpu_smoke.py ${groups[@]+"${groups[@]}"}
    train digits 60 digits ${few[@]+"${few[@]}"}
    bench chains 90 chains ${tiny[@]+"${tiny[@]}"}
    if command -v compute-sanitizer >/dev/null; then SMALL=1 part sanitizer 90 bash -c 'sanitise 80'; fi
}

second() {
    local compiling=''
    if [ "$DEVICE" = cuda ]; then
        # Compiling takes minutes: it runs beside the training, and what it made is timed last.
        export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
        "$PYTHON" -m mgebm_fast bench --only cascade --against compile_bf16 >"$scratch/compiling.txt" 2>&1 &
        compiling=$!
    fi
    train grid64 240 cifar10 --set sizes=1,2,4,8,16,32,64 --set batch_size=132 --set steps=100000 \
        --set sample_every=200 --set checkpoint_every=200 ${few[@]+"${few[@]}"}
    if [ -n "$compiling" ]; then
        kill "$compiling" 2>/dev/null
        wait "$compiling" 2>/dev/null
    fi
    local op files=() # in the order of worth; rows are written as they come
    for op in "${ops[@]}"; do files+=("bench/ops/bench_$op.py"); done
    part ops 60 "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-disable -k "$DEVICE" --csv "$scratch/ops.csv" \
        "${files[@]}"
    table ops "$scratch/ops.csv"
    if [ "$DEVICE" = cuda ]; then
        part kernels 45 "$PYTHON" scripts/gpu_profile.py "$scratch/kernels.csv"
        table kernels "$scratch/kernels.csv"
        if command -v ncu >/dev/null; then profile; fi
    fi
    bench training 45 training ${tiny[@]+"${tiny[@]}"}
    bench compiled 120 --only cascade --against mgebm_auto ${compiled[@]+"${compiled[@]}"} ${tiny[@]+"${tiny[@]}"}
    if [ "$DEVICE" = cuda ]; then
        part tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu ${per_test[@]+"${per_test[@]}"} \
            tests/ops tests/kernels tests/gradient tests/sampling tests/learning
    fi
}

# A test that hangs ends its process, and another takes its place.
if "$PYTHON" -c 'import pytest_timeout, xdist' 2>/dev/null; then per_test=(-n 8 --timeout=20 --timeout-method=thread); fi
case $what in
    first | second) "$what" ;;
    all)
        first
        second
        ;;
    *)
        echo "usage: scripts/gpu_check.sh first|second|all" >&2
        exit 2
        ;;
esac
"$PYTHON" scripts/gpu_tables.py "$OUT" || true
echo "all in $SECONDS s; results: $OUT"
exec >&3 2>&4
wait "$logger" # it has written all of the log
exit "$failed"
