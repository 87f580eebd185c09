#!/usr/bin/env bash
# The benchmarks of obsidian/results/Benchmarks.md: generated tasks, then real text. Resumable; some hours on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"

python -m scripts.mc_study suite paper
# text has a tokenizer of its own, and so a base directory of its own
NANOCHAT_BASE_DIR="${TEXT_BASE_DIR:-$NANOCHAT_BASE_DIR/text_bases}"
export NANOCHAT_BASE_DIR
NO_INSTALL=1 bash runs/text_bases.sh
python -m scripts.mc_study suite paper_text
