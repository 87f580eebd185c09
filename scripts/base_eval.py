"""Held-out loss and bits per byte of a checkpoint: `python -m scripts.base_eval
--checkpoint_dir=DIR`, also under torchrun."""

import json
from argparse import SUPPRESS

from nanochat.common import FlagParser, UserError, init_distributed, print0, run_main
from nanochat.dataloader import Loader, eval_rows, is_synthetic, make_source
from nanochat.evaluation import evaluate
from nanochat.loading import add_model_flags, model_from_flags

# of a checkpoint that does not say what it was trained on
DATA = {"data": "stdlib", "rows": "long", "text_column": "text", "seed": 42, "needles": 4, "recall_blocks": 32}


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.base_eval", description=__doc__)
    add_model_flags(parser)
    as_trained = dict(default=SUPPRESS)
    parser.add_argument("--data", help="'stdlib', 'docstrings', 'recall', 'hops', 'needle', 'facts', 'random', "
                                       "'tasks', or a directory of parquet, jsonl or text files (default: as "
                                       "trained)", **as_trained)
    parser.add_argument("--rows", help="'long' (pieces of long documents) or 'packed' (short ones together) (default: "
                                       "as trained)", **as_trained)
    parser.add_argument("--text_column",
                        help="column of parquet and jsonl files that holds the text (default: as trained)",
                        **as_trained)
    parser.add_argument("--needles", type=int,
                        help="blocks of facts hidden in each row of --data=needle, notes of --data=facts (default: "
                             "as trained)", **as_trained)
    parser.add_argument("--recall_blocks", type=int,
                        help="blocks of facts that each row of --data=recall stores (default: as trained)",
                        **as_trained)
    parser.add_argument("--seed", type=int,
                        help="of the choice of rows, and of recall's aliases (default: as trained)", **as_trained)
    parser.add_argument("--split", default="val", choices=("val", "train"), help="which documents")
    parser.add_argument("--row_tokens", type=int, default=0, help="tokens a row; 0: the model's sequence length")
    parser.add_argument("--eval_tokens", type=int, default=65536, help="tokens to evaluate on, over all ranks")
    parser.add_argument("--micro_batch", type=int, default=8, help="rows at a time on one rank")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if args.row_tokens < 0 or args.micro_batch < 1:
        raise UserError(f"--row_tokens={args.row_tokens} --micro_batch={args.micro_batch}: at least 0 and 1")
    ranks = init_distributed(args.device)
    model, tokenizer, meta = model_from_flags(args, ranks.device)
    T = args.row_tokens or model.config.sequence_len
    chosen = {name: vars(args).get(name, meta.get("flags", {}).get(name, usual)) for name, usual in DATA.items()}
    data = chosen.pop("data")
    source = make_source(data, args.split, T=T, tokenizer=tokenizer, **chosen)
    rows = eval_rows(source, args.eval_tokens, args.micro_batch * ranks.world_size)
    loader = Loader(source, rows, args.micro_batch, T, ranks.rank, ranks.world_size, ranks.device)
    token_bytes = None if is_synthetic(data) else tokenizer.token_bytes()  # those are not text
    result = evaluate(model, iter(loader.next, None), loader.micro_steps, token_bytes)
    bpb = "" if result.bpb is None else f", {result.bpb:.4f} bits/byte"
    print0(f"{data} {args.split}: loss {result.loss:.4f} nats/token{bpb} over {result.targets:,} targets in {rows:,} "
           f"rows of {T}")
    print0(json.dumps({"data": data, "split": args.split, "step": meta.get("step"), "rows": rows, "row_tokens": T,
                       **result._asdict()}))


if __name__ == "__main__":
    run_main(main)
