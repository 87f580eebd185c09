"""Train the BPE tokenizer on a corpus's training split: `python -m scripts.tok_train`."""

import json
import time
from typing import Iterator

from nanochat.common import FlagParser, UserError, run_main
from nanochat.dataset import open_corpus
from nanochat.outputs import BASE_DIR, output_folder
from nanochat.tokenizer import Tokenizer, tokenizer_dir


def training_texts(data: str, text_column: str, max_chars: int) -> Iterator[str]:
    """The training documents until max_chars characters are out; the last is cut. The corpus is opened on first use."""
    for document in open_corpus(data, text_column).documents("train"):
        yield document.text[:max_chars]
        max_chars -= len(document.text)
        if max_chars <= 0:
            return


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.tok_train", description=__doc__)
    parser.add_argument("--data", default="stdlib",
                        help="'stdlib' (embedded corpus) or a directory of parquet, jsonl or text files")
    parser.add_argument("--text_column", default="text", help="column of parquet and jsonl files that holds the text")
    parser.add_argument("--vocab_size", type=int, default=2048,
                        help="BPE tokens, the 256 bytes included; special ids come on top")
    parser.add_argument("--max_chars", type=int, default=2_000_000_000,
                        help="characters of the corpus to train on, at most")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.max_chars < 1:
        raise UserError(f"--max_chars={args.max_chars}: at least 1")
    output_folder(tokenizer_dir(), "tokenizer.json", flag=BASE_DIR)
    start = time.monotonic()
    tokenizer = Tokenizer.train(training_texts(args.data, args.text_column, args.max_chars), args.vocab_size)
    path = tokenizer.save()
    seconds = time.monotonic() - start
    print(f"tokenizer of {args.vocab_size} BPE tokens ({tokenizer.vocab_size} ids) in {seconds:.1f} s: {path}")
    print(json.dumps({"path": str(path), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint,
                      "seconds": seconds}))


if __name__ == "__main__":
    run_main(main)
