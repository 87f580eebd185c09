"""From a training step to every panel of the dashboards, through a real store and a real collector (G4)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from e2e_commands import ROOT


@pytest.mark.long("tests/e2e/test_telemetry.py::test_every_registered_name_arrives")
@pytest.mark.skipif(not importlib.util.find_spec("rotel"),
                    reason="needs the collector: pip install 'megacontext[collector]'")
def test_every_number_and_every_panel_is_in_the_store(tmp_path):
    """`BACKEND=DIR` names a folder that holds, or shall keep, the store's files."""
    environment = {"BACKEND": str(tmp_path / "backend"), "PYTHON": sys.executable, **os.environ,
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "runs/observability/e2e.sh", "--steps=20"], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=600)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["lost"] == 0 and found["spans"] > 50 and min(found["compared"].values()) > 100 and len(found["compared"]) == 5  # noqa: E501


def test_what_is_not_installed_is_said_in_a_line(tmp_path):
    """A Python without the extra: the script names it, before anything is fetched."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(["bash", "runs/observability/e2e.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": str(tmp_path / "python")})
    assert done.returncode == 2 and done.stderr == "error: needs the extra otel, which is not installed: pip install 'megacontext[otel]'\n"  # noqa: E501
