#!/usr/bin/env bash
# Builds the CUDA ladder and runs what this machine can run. ./build_and_run.sh [--quick] [HEAD_DIM=128] [CUDA_ARCH=sm_80]
#   nvcc and a GPU   every step: errors, timing table, comparison with PyTorch (--quick: small problems, no comparison)
#   nvcc alone       compiles every step; runs them on the CPU by the emulator
#   neither          runs them on the CPU by the emulator, and points to the lessons
set -uo pipefail
cd "$(dirname "$0")"

quick=
if [ "${1:-}" = --quick ]; then
  quick=--quick
  shift
fi
nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
gpu=$(nvidia-smi -L 2>/dev/null | head -n 1 || true)
python=${PYTHON:-python3}
[ -x ../../.venv/bin/python ] && python=${PYTHON:-../../.venv/bin/python}
has_torch=$("$python" -c 'import torch; print("yes")' 2>/dev/null || true)
PYTHON=$("$python" -c 'import sys; print(sys.executable)' 2>/dev/null || echo "$python")
export PYTHON

emulate() {
  if [ -z "$has_torch" ]; then
    echo "No torch in $python: nothing to run the emulator with. From the repository's root, ./build_and_run.sh installs it."
    return 1
  fi
  if ! command -v "${CXX:-g++}" > /dev/null; then
    echo "No C++ compiler (${CXX:-g++}): the emulator needs one."
    return 1
  fi
  if ! command -v make > /dev/null; then
    echo "No make. The same without it, from the repository's root: $PYTHON -m learn.cuda.check_with_torch --emulate"
    return 1
  fi
  echo "Running every step on the CPU, thread by thread (some minutes; says nothing about speed):"
  make emulate "$@"
}

if [ -z "$nvcc" ]; then
  echo "Missing: nvcc. It comes with the CUDA toolkit (https://developer.nvidia.com/cuda-downloads)."
  [ -n "$gpu" ] && echo "There is a GPU ($gpu), so the rest is in place."
  echo "Still possible: the CPU lessons (flash-attn learn), and the emulator, now:"
  emulate "$@"
  exit
fi

make -j "$(nproc)" "$@" || exit 1
if [ -z "$gpu" ]; then
  echo "Missing: a GPU (nvidia-smi lists none). The steps compile; they cannot be timed here."
  echo "Still possible: compiling for another GPU (make CUDA_ARCH=sm_90), the CPU lessons (flash-attn learn), and the emulator, now:"
  emulate "$@"
  exit
fi

./test_flash_attn $quick || exit 1
if [ -n "$quick" ]; then
  echo "Left out by --quick: the largest problem of the table, and the comparison with PyTorch (make check)."
elif [ -n "$has_torch" ]; then
  make check "$@"
else
  echo "No torch in $python: the comparison with PyTorch is left out."
fi
