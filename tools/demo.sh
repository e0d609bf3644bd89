#!/usr/bin/env bash
# The main job, from nothing: corpus -> token shards -> dense and MoT pretrained side by side -> report.
#   bash tools/demo.sh           about 4 minutes on two quiet cores, installation included
#   bash tools/demo.sh --full    the same question with five times the tokens: about 15 minutes more
# Every step continues where an earlier call was stopped, and what is done is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "$*" in
  '') name=demo data=data/demo_small documents=10000 ;;
  --full) name=demo_full data=data/demo_full documents=46000 ;;
  *)
    printf 'demo: "%s" is unknown; call "bash tools/demo.sh" or "bash tools/demo.sh --full"\n' "$*" >&2
    exit 2
    ;;
esac

bash tools/setup.sh
PATH="$PWD/.venv/bin:$PATH"
motley demo-corpus "${data}_raw" --documents "$documents" --seed 1
motley tokenize "${data}_raw" "$data" --config pretrain/configs/data/demo_small.toml
motley compare "pretrain/configs/compare/$name.toml"

echo 'What next?'
if [ "$name" = demo ]; then
  echo '  bash tools/demo.sh --full    # the same question with five times the tokens: 15 minutes on two cores'
fi
echo "  Your own question: copy pretrain/configs/compare/$name.toml, change its arms, and motley compare the copy."
