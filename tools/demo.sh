#!/usr/bin/env bash
# The main job, from nothing: corpus -> token shards -> dense and MoT pretrained side by side -> report.
# Every step continues where an earlier call was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh

PATH="$PWD/.venv/bin:$PATH"
motley demo-corpus data/raw --documents 20000 --seed 1
motley tokenize data/raw data/demo --config pretrain/configs/data/demo.toml
motley compare pretrain/configs/compare/demo.toml
