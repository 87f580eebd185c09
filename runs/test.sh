#!/usr/bin/env bash
# All tests, after the install. Arguments go to pytest: bash runs/test.sh -k loader
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/setup.sh
python -m pytest "$@"
