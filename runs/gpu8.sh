#!/usr/bin/env bash
# A node of eight GPUs of 80 GB: d20, vanilla and MegaContext at equal tokens. `bash runs/gpu8.sh --dry_run` prints both plans.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
DEPTH=20 RANKS=8 SHARDS=240 DEVICE_BATCH=8
source runs/pretrain.sh
