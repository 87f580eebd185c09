# Sourced by every recipe, from the repository's root: an environment with the project in it, and where artefacts go.
#
#   no virtual environment active    .venv is made and used (with $PYTHON, default python3)
#   TORCH_INDEX_URL=URL              where torch comes from; https://download.pytorch.org/whl/cpu has wheels without CUDA
#   NO_INSTALL=1                     the active python is used as it is
#   NANOCHAT_BASE_DIR=DIR            artefacts, default ~/.cache/nanochat
#
# A second call finds its stamp, and installs nothing until pyproject.toml changes. With --help or -h among the recipe's arguments its
# first comment is shown and nothing is done.
for argument in "$@"; do
  case "$argument" in
    --help | -h)
      awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "runs/$(basename "$0")"
      exit 0
      ;;
  esac
done

TORCH_VERSION=2.13.0
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

install_project() {
  local stamp wanted
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: $python is missing or older than 3.11; set PYTHON to one that is not" >&2
      exit 2
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  stamp="$VIRTUAL_ENV/.megacontext-installed"
  wanted="$(python -c 'import hashlib, os, sys; print(os.getcwd(), sys.argv[1], hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())' "$TORCH_VERSION")"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
  python -m pip install --disable-pip-version-check --quiet "torch==$TORCH_VERSION" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
  python -m pip install --disable-pip-version-check --quiet -e ".[test,wandb]"
  echo "$wanted" > "$stamp"
}

[ "${NO_INSTALL:-0}" = 1 ] || install_project
