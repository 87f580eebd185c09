import shutil
from pathlib import Path

import pytest
from e2e_commands import KINDS, TINY, run, write_texts


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with `texts/`, a small corpus, and `base/`, a base directory with its tokenizer and
    its tokens. Not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    texts, base = write_texts(folder / "texts"), folder / "base"
    run(base, "tok_train", f"--data={texts}", "--vocab_size=300").ok()
    return folder


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
def reference(prepared, train, tmp_path_factory) -> dict[str, Path]:
    """Base directories of one finished vanilla and one finished MegaContext run of 20 steps. Not to be changed."""
    bases = {}
    for kind, flags in KINDS.items():
        bases[kind] = Path(shutil.copytree(prepared / "base", tmp_path_factory.mktemp("reference") / "base"))
        train(bases[kind], *flags).ok()
        for cache in bases[kind].glob("tokens-*"):  # later copies of prepared/base need not tokenize again
            shutil.copytree(cache, prepared / "base" / cache.name, dirs_exist_ok=True)
    return bases
