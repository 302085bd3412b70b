#!/usr/bin/env bash
# Builds a wheel, installs it where there is no compiler, in a path with a space and a non-ASCII letter, and runs the core
# of the tests there, outside the checkout.
#
#     bash scripts/check_wheel.sh [PYTHON]           PYTHON has torch, numpy, pytest and the build requirements
#     bash scripts/check_wheel.sh --core CHECKOUT    the tests alone, with the mgebm_fast that `python` has
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

core() { # CHECKOUT PYTHON
  mkdir -p "$work/tests"
  cp -r "$1/tests/." "$work/tests"
  cd "$work" # nothing of the checkout is on the path
  "$2" -c 'import mgebm_fast, sys; print(mgebm_fast.__file__); sys.exit("site-packages" not in mgebm_fast.__file__ and "prefix" not in mgebm_fast.__file__)'
  "$2" -m mgebm_fast doctor >doctor.txt || { cat doctor.txt; exit 1; }
  grep -i "native" doctor.txt
  "$2" -m pytest -q -p no:cacheprovider -o pythonpath=tests --import-mode=importlib \
    tests/test_energies.py tests/sampling/test_seeds.py tests/gradient/test_native.py
}

if [ "${1:-}" = --core ]; then
  core "$2" python
  exit
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python}")
"$python" -m pip wheel -q --no-build-isolation --no-deps -w "$work/wheel" "$root"
prefix="$work/a prefix, é"
"$python" -m pip install -q --no-deps --no-index --target "$prefix" "$work"/wheel/*.whl
# A PATH with the interpreter alone: no compiler, no ninja, no nvcc.
mkdir "$work/bin"
for tool in bash cat cp grep mkdir rm; do ln -s "$(command -v "$tool")" "$work/bin/$tool"; done
export PATH="$work/bin" PYTHONPATH="$prefix" CXX=/none CC=/none
for tool in c++ cc clang g++ gcc ninja nvcc; do
  if command -v "$tool" >/dev/null; then echo "$tool is on the path" >&2; exit 1; fi
done
core "$root" "$python"
