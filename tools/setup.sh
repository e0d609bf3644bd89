#!/usr/bin/env bash
# Make .venv with everything Motley needs, pinned by constraints.txt. Quick when nothing has changed; needs no root.
# Choose the interpreter with PYTHON=/path/to/python. On a machine without a GPU, point pip at a CPU build of torch
# first: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup.sh
# PyPI's wheel for Linux brings CUDA's libraries.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stop() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

new_enough() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    new_enough "$PYTHON" || stop "PYTHON=$PYTHON is no Python >= 3.11. Name another, or unset PYTHON"
    command -v "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  stop "needs Python >= 3.11, found $(python3 --version 2>/dev/null || echo none). Install one, or name one: PYTHON=/path/to/python3.11 bash tools/setup.sh"
}

# The stamp is written last, so an interrupted set-up is taken up again.
wanted=$(cat pyproject.toml constraints.txt tools/setup.sh | cksum)
stamp=.venv/motley-setup.stamp
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted $PWD" ] && new_enough .venv/bin/python; then
  exit 0
fi

python=$(find_python)
# Measured for Python 3.11 and 3.12: .venv is 1.9 GB with the CPU build of torch and 5.6 GB with that for CUDA.
cpu_gib=3 cuda_gib=8
free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
ask_for_disk() {
  [ "$free_kib" -ge $(($1 * 1024 * 1024)) ] ||
    stop "needs $1 GiB of free disk in $PWD, found $((free_kib / 1024)) MiB. Free some, or clone Motley elsewhere$2"
}
ask_for_disk "$cpu_gib" ""

if ! { [ -x .venv/bin/python ] && new_enough .venv/bin/python; }; then
  rm -rf .venv
  "$python" -m venv .venv || stop "$python cannot make a virtual environment (on Debian: apt-get install python3-venv)"
fi

torch=$(grep '^torch==' constraints.txt)
cpu_build="PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup.sh"
if .venv/bin/python -m pip index versions torch 2>/dev/null | grep -qF "${torch#torch==}+cpu"; then
  need_gib=$cpu_gib
  echo "setup: installing into .venv with $python: the CPU build of torch, 1.9 GB on disk (a minute or two, once)"
else
  need_gib=$cuda_gib
  ask_for_disk "$need_gib" ". On a machine without a GPU the CPU build of torch asks for $cpu_gib GiB: $cpu_build"
  echo "setup: installing into .venv with $python: torch for CUDA, 5.6 GB on disk (some minutes, once)"
  nvidia-smi -L >/dev/null 2>&1 ||
    echo "setup: no GPU is seen here. The CPU build of torch takes 1.9 GB; for that, stop this and run: $cpu_build"
fi

log=.venv/setup.log
: >"$log"
install() {
  .venv/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt "$@" >>"$log" 2>&1 && return
  if grep -q 'No space left' "$log"; then
    stop "the disk is full; free $need_gib GiB and run it again"
  elif grep -qiE 'failed to establish|name resolution|connection (refused|reset|timed out)|network is unreachable|from versions: none' "$log"; then
    stop "pip reached no package index (log: $log). Check the network or pip's proxy settings and run it again"
  fi
  grep -v '^WARNING' "$log" | tail -n 5 >&2
  stop "pip install $* failed (log: $log)"
}
# torch first: the others then find it and bring no second build of it.
install "$torch"
install -e '.[demo,test]'
echo "$wanted $PWD" >"$stamp"
