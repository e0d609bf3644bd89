#!/usr/bin/env bash
# All tests and checks, from nothing: about 12 minutes on two quiet cores. Arguments go to pytest.
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
# By file: what the tests of a file share is made once.
workers=(-n "$(python -c 'import os; print(min(8, os.cpu_count() or 1))')" --dist loadfile)
quick=(
  tests/architecture tests/data_pipeline/{shards,stream} tests/parallel/test_{layout,partition,routing,towers}.py
  tests/pretrain/{checkpoint,models} tests/pretrain/comparison/test_{statistics,verdict}.py
  tests/numerics/test_naive_{mot,experts}.py tests/slurm/supervise tests/e2e/test_train_experts.py
)

ruff check .
ruff format --check --quiet .
lint-imports --no-cache
[ "${1:-}" != --quick ] || exec pytest "${workers[@]}" "${quick[@]}" "${@:2}"
pyright
[ "$#" -eq 0 ] || [ "$*" = --full ] || exec pytest "$@"

# Jobs of Slurm mostly wait: three clusters beside the tests that fill the cores.
log=$(mktemp)
pytest -n 3 --dist loadgroup tests/slurm_cluster >"$log" 2>&1 &
slurm=$! failed=0
trap 'kill "$slurm" 2>/dev/null || true; rm "$log"' EXIT
pytest "${workers[@]}" --ignore=tests/slurm_cluster "$@" || failed=$?
wait "$slurm" || failed=$?
cat "$log"
exit "$failed"
