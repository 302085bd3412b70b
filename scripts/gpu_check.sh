#!/usr/bin/env bash
# Everything a GPU is wanted for, in one command: build with CUDA, run the tests of the ops, kernels and chains on it,
# then the benches, with CSV files under bench/results/<device>/. Runs on a CPU too, at CPU sizes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
    export MGEBM_CUDA=${MGEBM_CUDA:-1}
fi
if ! "$python" -m pip install -q -e ".[test]"; then
    # A machine without a network: build with what is installed there.
    "$python" -m pip install -q --no-build-isolation --no-deps -e .
fi
"$python" -m mgebm_fast doctor
"$python" -m pytest -q tests/ops tests/kernels tests/gradient tests/sampling

device=$("$python" - <<'PY'
import sys
sys.path.insert(0, "bench")
import torch
from timing import device_slug
print(device_slug("cuda" if torch.cuda.is_available() else "cpu"))
PY
)
results=${OUT:-.}/bench/results/$device
mkdir -p "$results"
"$python" -m pytest bench/ops -q --benchmark-columns=median,iqr --csv "$results/ops.csv"
echo "results: $results"
