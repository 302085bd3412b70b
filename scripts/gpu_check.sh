#!/usr/bin/env bash
# A GPU for 15 minutes, in two commands of at most 10. Parts in order of worth, each cut at its own limit; what a part
# has is written at once, as at most 8 files right in $OUT. A second script makes tables of them: scripts/gpu_tables.py.
#
#   scripts/gpu_check.sh first      build, smoke test, digits whole, chains against plain PyTorch, memory checker
#   scripts/gpu_check.sh second     64 x 64 training with pictures and KID, ops, profile, a compiled baseline
#   DEVICE=cpu scripts/gpu_check.sh all       the same at small size, without a GPU
#
# No network is needed, and no build isolation: the image's own setuptools, pybind11 and ninja build it. What the image
# lacks is taken from wheels in .whl/, where there are any. BUDGET=... seconds for one command.
# Exit status: 0, or 1 where a part failed; a part that ran out of time is listed, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
export OUT=${OUT:-build/gpu_check} MGEBM_CACHE=${MGEBM_CACHE:-$scratch/cache} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
small=0 images=512 tiny=() few=() groups=() per_test=()
if [ "$DEVICE" = cpu ]; then
    small=1 images=32 tiny=(--tiny) few=(--set steps=3 --set batch_size=8 --set langevin.steps=2) groups=(dense plans4none captured)
fi
# Without a GPU the limits would only cut a busy machine short.
budget=${BUDGET:-$((small ? 3600 : 590))} failed=0 what=${1:-all}
exec > >(tee -a "$OUT/log.txt") 2>&1

record() { printf '{"part": "run", "name": "%s", "status": "%s", "seconds": %d}\n' "$1" "$2" "$3" >>"$OUT/results.jsonl"; }

# part NAME MOST COMMAND...: never more than MOST seconds, nor all parts together more than the budget.
part() {
    local name=$1 most=$2 left=$((budget - SECONDS)) begin=$SECONDS status=0 said
    shift 2
    most=$((small ? 6 * most : most))
    if ((left < 5)); then
        record "$name" "no time left" 0
        return 1
    fi
    echo "== $name, at $SECONDS s"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" || status=$?
    case $status in
        0) said=done ;;
        124 | 137) said=cut ;;
        *) said="failed with $status" failed=1 ;;
    esac
    record "$name" "$said" "$((SECONDS - begin))"
    echo "== $name: $said after $((SECONDS - begin)) s"
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

bench() { # bench NAME MOST ARGUMENTS...: rows are appended to bench.csv
    local name=$1 most=$2 file
    shift 2
    part "$name" "$most" "$PYTHON" -m mgebm_fast bench "$@" --csv "$scratch/$name"
    for file in "$scratch/$name"/*.csv; do
        if [ -e "$file" ]; then { echo "# $name $(basename "$file")"; cat "$file"; } >>"$OUT/bench.csv"; fi
    done
}

train() { # train NAME MOST ARGUMENTS...: pictures, metrics and KID of a run, also of one that was cut
    local name=$1 most=$2 picture
    shift 2
    part "train $name" "$most" "$PYTHON" -m mgebm_fast train "$@" --out "$scratch/$name"
    cp "$scratch/$name/metrics.jsonl" "$OUT/$name.jsonl" 2>/dev/null
    picture=$(find "$scratch/$name" -name '*.png' -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d' ' -f2-)
    if [ -n "$picture" ]; then cp "$picture" "$OUT/$name.png"; fi
    if [ ! -e "$scratch/$name/config.toml" ]; then
        record "evaluate $name" "nothing to evaluate" 0
    elif part "evaluate $name" 45 "$PYTHON" -m mgebm_fast evaluate "$scratch/$name" --num "$images" --json >"$scratch/found.json"; then
        "$PYTHON" -c 'import json, sys
print(json.dumps({"part": "evaluate", "name": sys.argv[1], **json.load(open(sys.argv[2]))}))' "$name" "$scratch/found.json" >>"$OUT/results.jsonl" 2>/dev/null
    fi
}

sanitise() { # the memory checker on kernels at small shapes; their Triton code was compiled by the smoke test
    local tool group
    for group in resident norms edge dense; do
        for tool in memcheck racecheck; do
            LIMIT=25 timeout 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" scripts/gpu_smoke.py "$group" 2>&1 |
                tail -n 15
        done
    done
}
export -f sanitise

first() {
    if [ "$DEVICE" = cuda ]; then nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader; fi
    if [ -z "${SKIP_BUILD:-}" ]; then part build 90 bash -c build; fi
    part doctor 20 "$PYTHON" -m mgebm_fast doctor
    LIMIT=$((small ? 400 : 75)) part smoke 80 "$PYTHON" scripts/gpu_smoke.py ${groups[@]+"${groups[@]}"}
    train digits 60 digits ${few[@]+"${few[@]}"}
    bench chains 90 chains ${tiny[@]+"${tiny[@]}"}
    if command -v compute-sanitizer >/dev/null; then part sanitizer 90 bash -c sanitise >"$OUT/sanitizer.txt"; fi
}

second() {
    if [ "$DEVICE" = cuda ]; then
        # Compiling takes minutes: it runs beside the training, and what it made is timed last.
        export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
        "$PYTHON" -m mgebm_fast bench --only cascade --against compile_bf16 >"$scratch/compiling.txt" 2>&1 &
        local compiling=$!
        train grid64 240 cifar10 --set sizes=1,2,4,8,16,32,64 --set batch_size=132 --set steps=100000 \
            --set sample_every=200 --set checkpoint_every=200
        kill "$compiling" 2>/dev/null
        wait "$compiling" 2>/dev/null
        part ops 60 "$PYTHON" -m pytest -q bench/ops -k cuda -p no:cacheprovider --csv "$scratch/ops.csv"
        if [ -e "$scratch/ops.csv" ]; then { echo "# ops ops.csv"; cat "$scratch/ops.csv"; } >>"$OUT/bench.csv"; fi
        if command -v ncu >/dev/null; then
            part profile 60 ncu --csv --launch-count 3 --kernel-name 'regex:conv_chain|edge_step|statistics' \
                --log-file "$OUT/profile.csv" "$PYTHON" scripts/gpu_smoke.py resident edge norms
        fi
        bench training 45 training
        bench compiled 120 --only cascade --against mgebm_auto --against compile_bf16
        part tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests ${per_test[@]+"${per_test[@]}"}
    else
        bench training 60 training "${tiny[@]}"
    fi
}

if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then per_test=(--timeout=20); fi
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
exit "$failed"
