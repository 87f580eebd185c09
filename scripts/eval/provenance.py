"""Where a number comes from: the code, and what besides it may change a result or a time."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def commit() -> str:
    """What git calls the checked-out code, "-dirty" where it was changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = shutil.which("git") and subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return found or "not a git checkout"


def environment() -> dict:
    """What besides code and configuration may change a result or a time."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name()
            if torch.cuda.is_available() else None}


def digest(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
