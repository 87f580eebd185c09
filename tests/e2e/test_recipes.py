"""The shell recipes parse, and the GPU ones print plans of equal tokens without a GPU, a download or a tokenizer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_commands import ROOT

RECIPES = sorted([*(ROOT / "runs").glob("*.sh"), ROOT / ".ci" / "run"])


def shell(tmp_path: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "RANK", "WORLD_SIZE")}
    return subprocess.run(["bash", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**clean, "PATH": path, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), **env})  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_syntax_and_strictness(recipe, tmp_path):
    done = shell(tmp_path, "-n", str(recipe))
    assert done.returncode == 0, done.stderr
    text = recipe.read_text()
    if text.startswith("#!"):
        assert "set -euo pipefail" in text and 'cd "$(dirname "$0")/.."' in text
    else:
        assert "Sourced by" in text.splitlines()[0]


@pytest.mark.parametrize(("recipe", "ranks", "layers"), [("gpu1", 1, 12), ("gpu8", 8, 20)])
def test_gpu_plans(recipe, ranks, layers, tmp_path):
    done = shell(tmp_path, str(ROOT / "runs" / f"{recipe}.sh"), "--dry_run", "--seed=7", NO_INSTALL="1")
    assert done.returncode == 0, done.stderr
    vanilla, mc = (json.loads(text) for text in re.split(r"^== .*$", done.stdout, flags=re.M)[1:])
    assert (vanilla["mc"], mc["mc"]) == (False, True)
    for name in ("layers", "width", "vocabulary", "sequence", "tokens_per_step", "iterations", "tokens", "ranks"):
        assert vanilla[name] == mc[name], name
    assert vanilla["ranks"] == ranks and vanilla["layers"] == layers and vanilla["tokens"] > 1e9
    assert vanilla["flops"] < mc["flops"] < 1.5 * vanilla["flops"]
    assert mc["memory_bytes_per_rank"] < 80e9
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("recipe", ["quickstart", "gpu1", "gpu8", "test"])
def test_help(recipe, tmp_path):
    """The recipe's first comment; nothing installed or run."""
    path = ROOT / "runs" / f"{recipe}.sh"
    for flag in ("--help", "-h"):
        done = shell(tmp_path, str(path), flag, PYTHON="/no/such/python", VIRTUAL_ENV="")
        assert done.returncode == 0 and not done.stderr
        shown = done.stdout.splitlines()
        assert shown and [f"# {line}" for line in shown] == path.read_text().splitlines()[1:len(shown) + 1]
    assert not (tmp_path / "base").exists()


def test_mistakes_reach_the_user(tmp_path):
    done = shell(tmp_path, str(ROOT / "runs" / "gpu1.sh"), "--dry_run", "--no_such_flag=1", NO_INSTALL="1")
    assert done.returncode == 2 and done.stderr == "error: unknown flags: --no_such_flag=1 (see --help)\n"


def test_an_old_python_is_refused(tmp_path):
    done = shell(tmp_path, str(ROOT / "runs" / "test.sh"), PYTHON="/no/such/python")
    assert done.returncode == 2 and "error: /no/such/python is missing or older than 3.11" in done.stderr


def test_ci_takes_the_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "bash runs/test.sh" and os.access(ROOT / ".ci"
                                                                                                    / "run", os.X_OK)


@pytest.mark.parametrize("package, extra, command", [
    ("grafana_foundation_sdk", "dashboards", ["runs/observability/make_dashboards.py", "--help"]),
    ("lm_eval", "lm-eval", ["-m", "scripts.run_lm_eval", "--checkpoint_dir=no", "--tasks=x", "--out=o.json"]),
])  # fmt: skip
def test_a_missing_extra_is_named_in_one_line(package, extra, command, tmp_path):
    """The package is there, but cannot be imported or found: what a plain install looks like."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"sys.modules[{package!r}] = None\n"
        "found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] == {package!r} else found(name, *a)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, *(str(ROOT / c) if c.endswith(".py") else c for c in command)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    (line,) = done.stderr.splitlines()
    assert done.returncode and line.startswith("error: ") and package in line and f"megacontext[{extra}]" in line
