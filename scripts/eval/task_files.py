"""Write generated tasks as jsonl in the schema of kvpress, for other libraries or for run_lm_eval.

    python -m scripts.make_data tasks --tasks=mqar,passkey --length=1056 --out=DIR

One file a task, <task>_<length>.jsonl: context, question, answer_prefix, answer, max_new_tokens, then our own fields.
Reserved words appear by name (<|key_3|>), as the tokenizer that is there encodes them.
"""

import json
from argparse import Namespace

import numpy as np

from nanochat.common import FlagParser, UserError
from nanochat.dataset import open_corpus
from nanochat.outputs import output_folder, write_file
from nanochat.tasks.generated import TASKS, task_rows
from nanochat.tasks.words import Words
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--tasks", default="", help=f"names with commas between; default all: {', '.join(TASKS)}")
    parser.add_argument("--length", type=int, default=1056,
                        help="tokens of each history, question included; a multiple of --block_size")
    parser.add_argument("--count", type=int, default=100, help="examples per task")
    parser.add_argument("--needle_depth", type=float, default=-1.0,
                        help="where in the context the answer lies, 0 to 1; -1: anywhere")
    parser.add_argument("--block_size", type=int, default=32, help="tokens of a block, over which answers are spread")
    parser.add_argument("--split", default="val", choices=("train", "val"), help="rows and text of which split")
    parser.add_seed("the rows")
    parser.add_argument(
        "--data", default="stdlib", help="text that facts are hidden in: stdlib, or a directory of parquet, jsonl or "
                                         "text files"
    )
    parser.add_out("folder of the files")


def run(args: Namespace) -> None:
    names = [name for name in args.tasks.split(",") if name] or list(TASKS)
    if args.count < 1 or args.seed < 0 or args.block_size < 2:
        raise UserError(
            f"--count={args.count}, --seed={args.seed}, --block_size={args.block_size}: at least 1, 0 and 2")
    output_folder(args.out, *(f"{name}_{args.length}.jsonl" for name in names))
    tokenizer = Tokenizer.load()
    words = Words.of(tokenizer, open_token_cache(open_corpus(args.data), args.split, tokenizer).tokens)
    made = {
        name: task_rows(
            name,
            words,
            args.split,
            np.arange(args.count),
            args.length,
            seed=args.seed,
            block_size=args.block_size,
            depth=None if args.needle_depth == -1 else args.needle_depth,
        ).examples
        for name in names
    }
    for name, examples in made.items():
        write_file(args.out / f"{name}_{args.length}.jsonl",
                   "".join(json.dumps(example.kvpress()) + "\n" for example in examples))
    print(f"{len(made)} tasks of {args.count} examples in {args.out}")
    print(json.dumps({"out": str(args.out), "tasks": names, "examples": args.count * len(made)}))
