#!/usr/bin/env bash
# All tests and checks, from nothing: about 11 minutes on two quiet cores. Arguments go to pytest.
#
#   bash tools/test.sh --quick                      a first look in 90 s: the checks, and the core's fastest tests
#   bash tools/test.sh --full                       whole products of parameters (tests/conftest.py)
#   bash tools/test.sh tests/parallel -k routing
#   bash tools/test.sh --arithmetic [1-5]          the numeric tests, under other machines' rounding
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

if [ "${1:-}" = --arithmetic ]; then exec bash tools/arithmetic.sh "${@:2}"; fi
PATH="$PWD/.venv/bin:$PATH"
unset PYTHONDONTWRITEBYTECODE  # a fresh interpreter would compile the project for 0.3 s, and there are hundreds
# One thread a process: pytest-xdist already fills the cores, and sums then have one order.
export OMP_NUM_THREADS=1 DS_ACCELERATOR="${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}"
# By file: what the tests of a file share is made once. Long files begin first (tests/conftest.py).
workers=(-n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" --dist loadfile --no-loadscope-reorder)
quick=(
  tests/architecture tests/data_pipeline/{shards,stream} tests/parallel/test_{layout,partition,routing,towers}.py
  tests/pretrain/{checkpoint,models} tests/pretrain/comparison/test_{statistics,verdict}.py
  tests/numerics/test_naive_{mot,experts}.py tests/slurm/supervise tests/e2e/test_train_experts.py
)

ruff check .
ruff format --check --quiet .
if [ "${1:-}" = --quick ]; then
  lint-imports --no-cache
  exec pytest "${workers[@]}" "${quick[@]}" "${@:2}"
elif [ "$#" -gt 0 ] && [ "$*" != --full ]; then
  lint-imports --no-cache
  pyright
  exec pytest "$@"
fi

# Beside the tests: the slower checks, and jobs of Slurm on three clusters, which mostly wait.
beside=$(mktemp -d) failed=0
(lint-imports --no-cache && pyright) >"$beside/checks" 2>&1 &
checks=$!
pytest -n 3 --dist loadgroup tests/slurm_cluster >"$beside/jobs" 2>&1 &
jobs=$!
trap 'kill "$checks" "$jobs" 2>/dev/null || true; rm -r "$beside"' EXIT
pytest "${workers[@]}" --ignore=tests/slurm_cluster "$@" || failed=$?
wait "$jobs" || failed=$?
wait "$checks" || failed=$?
cat "$beside/jobs" "$beside/checks"
exit "$failed"
