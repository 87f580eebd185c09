import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_commands import KINDS, TINY, run, write_texts

Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Once:
    """once(name, make): a folder that `make(folder)` fills, made by the first process that wants it, while the others
    wait. Not to be changed: who would, copies it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.made"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of another, who failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def prepared(once) -> Path:
    """A folder with `texts/`, a small corpus, and `base/`, a base directory with its tokenizer and
    its tokens. Not to be changed."""
    def make(folder: Path) -> None:
        run(folder / "base", "tok_train", f"--data={write_texts(folder / 'texts')}", "--vocab_size=300").ok()

    return once("prepared", make)


@pytest.fixture
def base(prepared, tmp_path) -> Path:
    """A base directory of one's own, tokenizer trained, corpus tokenized."""
    return Path(shutil.copytree(prepared / "base", tmp_path / "base"))


@pytest.fixture(scope="session")
def train_flags(prepared) -> list[str]:
    """The tiny model on the small corpus."""
    return [*TINY, f"--data={prepared / 'texts'}"]


@pytest.fixture(scope="session")
def train(train_flags):
    """train(base, *flags, **options): the tiny model on the small corpus; options go to `run`."""
    return lambda base, *flags, **options: run(base, "base_train", *train_flags, *flags, **options)


@pytest.fixture(scope="session")
def reference(prepared, train, once, tmp_path_factory) -> dict[str, Path]:
    """Base directories of one finished vanilla and one finished MegaContext run of 20 steps. Not to be changed."""
    def make(folder: Path) -> None:
        for kind, flags in KINDS.items():
            base = Path(shutil.copytree(prepared / "base", folder / kind))
            train(base, *flags).ok()
            for cache in base.glob("tokens-*"):  # later copies of prepared/base need not tokenize again
                if not (prepared / "base" / cache.name).exists():
                    # whole when another process sees it
                    shutil.copytree(cache, folder / cache.name).rename(prepared / "base" / cache.name)

    made, own = once("reference", make), tmp_path_factory.mktemp("reference")  # runs that are refused take locks there
    return {kind: Path(shutil.copytree(made / kind, own / kind)) for kind in KINDS}
