#!/usr/bin/env bash
# The numeric tests under five arithmetic paths: the rounding of other machines, on this one.
#   bash tools/arithmetic.sh            all five
#   bash tools/arithmetic.sh 3          the third
# Called by tools/test.sh --arithmetic, which prepares .venv. Numbers agree to rounding between paths; a test
# that passes on one and fails on another asks for more than arithmetic gives.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu

# MKL's matrix products, torch's own kernels and oneDNN's choose their instructions by these.
paths=(
  ""  # what the libraries choose on this machine
  "MKL_CBWR=AVX2"
  "MKL_CBWR=AVX"
  "MKL_CBWR=SSE4_2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
  "MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"
)
tests=(tests/numerics tests/pretrain/models tests/pretrain/comparison/test_statistics.py)
workers=$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')

number=${1:-}
if [ -n "$number" ] && ! { [[ "$number" =~ ^[0-9]+$ ]] && [ "$number" -ge 1 ] && [ "$number" -le "${#paths[@]}" ]; }; then
  echo "arithmetic: $number is no arithmetic path: 1 to ${#paths[@]}, or none for all" >&2
  exit 2
fi
failed=0
for index in "${!paths[@]}"; do
  if [ -n "$number" ] && [ "$number" -ne $((index + 1)) ]; then continue; fi
  read -r -a settings <<<"${paths[$index]}"
  echo "arithmetic: path $((index + 1)) of ${#paths[@]}: ${paths[$index]:-as this machine chooses}"
  env "${settings[@]}" pytest -q -n "$workers" --dist loadfile "${tests[@]}" || failed=1
done
exit "$failed"
