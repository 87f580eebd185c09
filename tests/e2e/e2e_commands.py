"""Runs the project's own commands, as a user would, without paying for the import of torch each time.

`run` forks a server that has imported torch (and nothing of this repository), and executes the script there as
`__main__` with its own arguments, environment, working directory, standard streams and exit code.
`real` starts a fresh interpreter.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A model that trains 20 steps in a second: 2 micro-batches of 2 rows of 128 tokens a step.
TINY = ["--depth=2", "--aspect_ratio=16", "--head_dim=16", "--max_seq_len=128", "--device_batch_size=2",
        "--total_batch_size=512",
        "--num_iterations=20", "--eval_every=0", "--eval_tokens=512", "--log_every=1", "--device=cpu",
        "--model_tag=t"]  # fmt: skip
MC = ["--mc_enabled=1", "--mc_block_size=8", "--mc_budget=40", "--mc_horizon=8", "--mc_recent=8", "--mc_start=0.2",
      "--mc_ramp=2",
      "--mc_lens_queries=48", "--mc_lens_key_dim=8", "--mc_gist_width=16"]  # fmt: skip
GIST_LOSSES = ["--mc_arms=contrast,horizon,placed", "--mc_placed_stride=1", "--mc_variants=2"]  # off by default
KINDS = {"vanilla": [], "mc": MC}
MODULES = ("argparse", "ast", "calendar", "csv", "difflib", "heapq", "pprint", "textwrap")

_context = multiprocessing.get_context("forkserver")
# torch._dynamo: torch imports it when a model is made on the meta device, 1.2 of the 2 s of a short training
_context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "pyarrow.parquet", "tiktoken",
                                 "rustbpe"])


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str
    modules: frozenset[str]  # imported when the script ended

    @property
    def error(self) -> str:
        """The one line on stderr of a refused run."""
        lines = self.err.strip().splitlines()
        assert self.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (self.code, self.err)
        return lines[0]

    def ok(self) -> "Result":
        assert self.code == 0, (self.code, self.out, self.err)
        return self


def _environment(base: Path) -> dict[str, str]:
    return {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline",
            "PYTHONDONTWRITEBYTECODE": "1"}


def _child(root: str, script: str, argv: list[str], env: dict[str, str], files: dict[str, str]) -> None:
    import torch

    os.environ.update(env)
    os.chdir(root)
    for stream, path in ((1, files["out"]), (2, files["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    sys.path.insert(0, root)
    sys.argv = [f"{root}/scripts/{script}.py", *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        Path(files["modules"]).write_text(json.dumps(sorted(sys.modules)))


class Started:
    """A command under way."""

    def __init__(self, base: Path, script: str, flags: list[str], root: Path, env: dict[str, str]):
        folder = base.parent / f"streams-{base.name}-{time.monotonic_ns()}"
        folder.mkdir()
        self.files = {name: str(folder / name) for name in ("out", "err", "modules")}
        self.process = _context.Process(target=_child,
                                        args=(str(root), script, flags, _environment(base) | env, self.files))
        self.process.start()

    def kill(self) -> int:
        """SIGKILL; returns the exit code."""
        self.process.kill()
        self.process.join(20)
        return self.process.exitcode

    def wait(self, timeout_s: float = 300) -> Result:
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
        read = {name: Path(path).read_text() if Path(path).exists() else "" for name, path in self.files.items()}
        return Result(self.process.exitcode, read["out"], read["err"], frozenset(json.loads(read["modules"] or "[]")))


def start(base: Path, script: str, *flags: str, root: Path = ROOT, **env: str) -> Started:
    return Started(base, script, list(flags), root, env)


def run(base: Path, script: str, *flags: str, root: Path = ROOT, **env: str) -> Result:
    """`python scripts/<script>.py <flags>` with artefacts under `base`."""
    return start(base, script, *flags, root=root, **env).wait()


def real(base: Path, *command: str, timeout_s: float = 120, **env: str) -> subprocess.CompletedProcess:
    """`python <command>` in a fresh interpreter, in the repository."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **_environment(base), **env},
                          capture_output=True, text=True, timeout=timeout_s)  # fmt: skip


def write_texts(directory: Path) -> Path:
    """A small corpus: eight modules of the standard library."""
    directory.mkdir()
    for name in MODULES:
        shutil.copy(__import__(name).__file__, directory / f"{name}.py")
    return directory


def rows(base: Path, tag: str = "t") -> list[dict]:
    """What metrics.jsonl holds, line by line; without what stands alone after the last step: the time of
    its save, what was delivered."""
    lines = map(json.loads, (base / "runs" / tag / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if any(not key.startswith(("step", "time", "checkpoint.", "telemetry."))
                                        for key in row)]


def losses(base: Path, tag: str = "t") -> dict[int, tuple]:
    """Every loss of each step, MegaContext's too: exact values, by step. Asserts that a step
    logged twice was logged alike."""
    found: dict[int, tuple] = {}
    for row in rows(base, tag):
        values = tuple((name, value) for name, value in sorted(row.items()) if "loss" in name
                       and name.startswith(("train.", "mc.")))
        assert found.setdefault(row["step"], values) == values, row["step"]
    return found


def last_checkpoint(base: Path, tag: str = "t") -> dict:
    """All tensors and states of the newest step's files, by file name."""
    import torch

    directory = base / "checkpoints" / tag
    step = max(p.name for p in directory.glob("complete_*"))[len("complete_") : -len(".json")]
    return {p.name: torch.load(p, weights_only=True) for p in sorted(directory.glob(f"*_{step}*.pt"))}


def same(a, b) -> bool:
    """Bit for bit, through nested containers."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def tree(base: Path) -> dict[str, tuple[int, int]]:
    """Every file under `base` with its size and time of change; what may be remade (token caches, locks) left out."""
    return {str(p.relative_to(base)): (p.stat().st_size, p.stat().st_mtime_ns) for p in base.rglob("*")
            if p.is_file() and not p.relative_to(base).parts[0].startswith(("tokens-", ".locks"))}  # fmt: skip
