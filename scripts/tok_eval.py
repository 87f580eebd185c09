"""How well the tokenizer compresses held-out text, by kind of document, against raw bytes:
`python -m scripts.tok_eval`."""

import json
from collections import defaultdict

from nanochat.common import FlagParser, UserError, run_main
from nanochat.dataset import open_corpus
from nanochat.tokenizer import Tokenizer


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.tok_eval", description=__doc__)
    parser.add_argument("--data", default="stdlib",
                        help="'stdlib' (embedded corpus) or a directory of parquet, jsonl or text files")
    parser.add_argument("--text_column", default="text", help="column of parquet and jsonl files that holds the text")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    tokenizer = Tokenizer.load()
    sizes = tokenizer.token_bytes()
    kinds = defaultdict(lambda: [0, 0, 0])  # documents, bytes, tokens
    for text, source, kind in open_corpus(args.data, args.text_column).documents("val"):
        ids = tokenizer.encode(text)
        num_bytes = len(text.encode())
        if tokenizer.decode(ids) != text or sizes[ids].sum() != num_bytes:
            raise UserError(f"{source} does not survive encode and decode; train the tokenizer again: python -m "
                            "scripts.tok_train")
        kinds[kind] = [a + b for a, b in zip(kinds[kind], (1, num_bytes, len(ids)))]
    print(f"{'kind':<12}{'documents':>10}{'bytes':>12}{'tokens':>12}{'bytes/token':>12}   (raw bytes: 1)")
    for kind, (documents, num_bytes, tokens) in sorted(kinds.items()):
        print(f"{kind:<12}{documents:>10,}{num_bytes:>12,}{tokens:>12,}{num_bytes / tokens:>12.3f}")
    print(json.dumps({"roundtrip": True,
                      "bytes_per_token": {kind: b / t for kind, (_, b, t) in sorted(kinds.items())}}))


if __name__ == "__main__":
    run_main(main)
