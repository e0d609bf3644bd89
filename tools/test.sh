#!/usr/bin/env bash
# All tests and checks, from nothing. Arguments go to pytest: bash tools/test.sh tests/parallel -k routing
# With --arithmetic [1-5]: the numeric tests alone, under other machines' rounding (tools/arithmetic.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

if [ "${1:-}" = --arithmetic ]; then exec bash tools/arithmetic.sh "${@:2}"; fi
PATH="$PWD/.venv/bin:$PATH"
# One thread a process: pytest-xdist already fills the cores, and sums then have one order.
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}"

ruff check .
ruff format --check --quiet .
lint-imports --no-cache
pyright
if [ "$#" -gt 0 ]; then
  exec pytest "$@"
fi
exec pytest -n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" --dist loadgroup
