"""Code and prose as three corpora that hold out the same documents: DIR/code, DIR/prose and
DIR/mix, each a train and a val shard.

    python -m scripts.make_data corpus --out=DIR [--prose=NOVELS --held_out=persuasion.txt]

Code is the embedded corpus (the standard library); prose is its docstrings, or a folder of .txt files, one document
each. A model trained on DIR/mix can be judged on code and prose apart without having seen either's held-out documents.
"""

import json
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import FlagParser, UserError, shown
from nanochat.dataset import SPLITS, build_docstrings, build_stdlib
from nanochat.documents import files_below, read_text
from nanochat.outputs import output_folder, replacing


def prose_documents(folder: Path, held_out: str) -> dict[str, list[dict]]:
    """Rows of text, source and kind per split. UserError unless `held_out` is one of at least two .txt files."""
    files = [path for path in files_below(folder, (".txt",)) if path.parent == folder]
    if held_out not in {path.name for path in files} or len(files) < 2:
        raise UserError(f"--held_out={held_out} with --prose={folder}: needs that file and at least one more .txt, "
                        f"found {', '.join(p.name for p in files) or 'none'}")
    rows = {split: [] for split in SPLITS}
    for path in files:
        rows["val" if path.name == held_out else "train"].append({"text": read_text(path), "source": shown(path.name),
                                                                  "kind": "prose"})
    return rows


def shards(corpus: Path) -> dict[str, list[dict]]:
    """Rows of an embedded corpus per split."""
    return {split: pq.read_table(corpus / f"{split}-00000.parquet").to_pylist() for split in SPLITS}


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--prose", type=Path, help="folder of .txt files; default: the docstrings of the code")
    parser.add_argument("--held_out", default="", help="the one of them that is held out")
    parser.add_out("folder for the three corpora")


def run(args: Namespace) -> None:
    if args.held_out and not args.prose:
        raise UserError(f"--held_out={args.held_out} names a file of --prose=FOLDER, which is not given")
    prose = prose_documents(args.prose, args.held_out) if args.prose else shards(build_docstrings())
    for name in ("code", "prose", "mix"):
        output_folder(args.out / name, *(f"{split}-00000.parquet" for split in SPLITS))
    code = shards(build_stdlib())
    counts = {}
    for name, parts in {"code": [code], "prose": [prose], "mix": [code, prose]}.items():
        for split in SPLITS:  # "val" sorts last, so that it is the shard held out
            rows = [row for part in parts for row in part[split]]
            with replacing(args.out / name / f"{split}-00000.parquet") as part:
                pq.write_table(pa.Table.from_pylist(rows), part)
            counts[f"{name}/{split}"] = len(rows)
    print(json.dumps({"out": str(args.out), "documents": counts}))
