#!/usr/bin/env bash
# One GPU of 80 GB: d12, vanilla and MegaContext at equal tokens. `bash runs/gpu1.sh --dry_run` prints both plans.
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
DEPTH=12 RANKS=1 SHARDS=60 DEVICE_BATCH=16
source runs/pretrain.sh
