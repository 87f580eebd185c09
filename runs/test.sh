#!/usr/bin/env bash
# The short suite, after the install, on two processes (WORKERS=0: in this one): at most eight minutes on two cores. --all has the
# long tests as well; tests/conftest.py says what is long. Arguments go to pytest: bash runs/test.sh -k loader
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
export OMP_NUM_THREADS=1  # a process has a core of its own, and a sum the same order on every machine
# worksteal: whoever is done takes half of what the other has left; slow tests stand side by side
python -m pytest -n "${WORKERS:-2}" --dist=worksteal "$@"
