"""From a training step to every panel of the dashboards, through a real store and a real collector (G4)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from e2e_commands import ROOT


@pytest.mark.slow
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
