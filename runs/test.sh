#!/usr/bin/env bash
# All tests, after the install, on two processes (WORKERS=0: in this one). Arguments go to pytest: bash runs/test.sh -k loader
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a process has a core of its own
python -m pytest -n "${WORKERS:-2}" "$@"
