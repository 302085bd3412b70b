#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command and within 8 minutes: build with CUDA, the tests that a GPU runs, then
# the benches. CSV files and pictures are written as they come, under bench/results/<device>/, so that a run that is
# cut short keeps what it has. On a machine without a GPU it does the same at small size, under build/gpu_check/.
#
#   scripts/gpu_check.sh
#   BUDGET=1800 scripts/gpu_check.sh      seconds for everything; what does not fit is cut, and said to be
#   PYTHON=venv/bin/python OUT=/tmp/check scripts/gpu_check.sh
#
# Exit status: 0, or 1 when a part failed. A part that ran out of time is listed, and is no failure.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
budget=${BUDGET:-470}
summary=()
failed=0

# part NAME MOST COMMAND...: no part takes more than MOST seconds, nor all of them together more than the budget.
part() {
    local name=$1 most=$2 left=$((budget - SECONDS)) begin=$SECONDS status=0
    shift 2
    if ((left < 5)); then
        summary+=("$name: no time left")
        return
    fi
    echo "== $name"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" || status=$?
    case $status in
        0) summary+=("$name: done in $((SECONDS - begin)) s") ;;
        124 | 137) summary+=("$name: cut after $((SECONDS - begin)) s") ;;
        *) summary+=("$name: FAILED, exit status $status") failed=1 ;;
    esac
}

build() {
    # The second line is for a machine without a network: build with what is installed there.
    "$python" -m pip install -q --retries 0 --timeout 15 -e ".[test,plot]" ||
        "$python" -m pip install -q --no-build-isolation --no-deps -e .
}
export -f build
export python

has() { "$python" -c "import $1" 2>/dev/null; }

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    gpu=1
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
    export MGEBM_CUDA=${MGEBM_CUDA:-1}
else
    gpu=0
fi
part build 150 bash -c build
part doctor 30 "$python" -m mgebm_fast doctor

if ((gpu)); then
    name=$("$python" -c 'from mgebm_fast.benchmarks import device_slug; print(device_slug("cuda"))') || exit 1
    results=${OUT:-.}/bench/results/$name
else
    results=${OUT:-build}/gpu_check
fi
mkdir -p "$results"
plot=()
if has matplotlib; then plot=(--plot); fi
bench() { # bench NAME MOST FOLDER ARGUMENTS...
    local name=$1 most=$2 folder=$3
    shift 3
    part "$name" "$most" "$python" -m mgebm_fast bench "$@" --csv "$folder" ${plot[@]+"${plot[@]}"}
}

if ((gpu)); then
    # Of the tests those that a GPU changes; the others run everywhere.
    part tests 130 "$python" -m pytest -q --maxfail=20 tests/ops tests/gradient tests/sampling tests/kernels \
        -k "cuda or gpu or graph or device or precision or native or triton"
    bench chains 90 "$results" chains
    bench training 60 "$results" training
    bench ops 90 "$results" ops
    # What compiles comes last, each alone: max-autotune takes minutes, and the rest must not wait for it.
    bench compile_bf16 150 "$results/compile_bf16" --only cascade --against mgebm_auto --against compile_bf16
    if has jax; then bench jax 90 "$results/jax" --only cascade --against mgebm_auto --against jax_scan; fi
    bench compile_tf32 150 "$results/compile_tf32" --only cascade --against mgebm_auto --against compile_fp32
    if has torchebm || has posteriors; then
        bench peers 60 "$results/peers" --only cascade --against mgebm_auto --against torchebm --against posteriors
    fi
else
    part tests 150 "$python" -m pytest -q tests/ops/test_langevin_step.py tests/cli/test_bench.py
    bench chains 60 "$results" chains --tiny
    bench training 60 "$results" training --tiny
fi

echo "== results: $results"
printf '%s\n' "${summary[@]}"
echo "all in $SECONDS s"
exit "$failed"
