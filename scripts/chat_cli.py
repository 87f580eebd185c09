"""Continue a text: `python -m scripts.chat_cli --checkpoint_dir=DIR --prompt="def main("`; without --prompt, line after line."""

import sys
from typing import Iterator

from nanochat.common import FlagParser, init_distributed, run_main
from nanochat.engine import Engine
from nanochat.loading import add_model_flags, model_from_flags


def typed_prompts() -> Iterator[str]:
    """Lines of stdin until its end or an empty line."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.chat_cli", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", help="text to continue; without it, each line of stdin, until an empty one")
    parser.add_argument("--max_tokens", type=int, default=128, help="tokens to generate per prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; 1 draws as the model predicts")
    parser.add_argument("--top_k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    ranks = init_distributed(args.device)
    model, tokenizer, _ = model_from_flags(args, ranks.device)
    engine = Engine(model, tokenizer)
    for prompt in typed_prompts() if args.prompt is None else [args.prompt]:
        length = 1 + len(tokenizer.encode(prompt))
        if length + args.max_tokens > engine.reach:
            print(f"note: {length} prompt tokens and {args.max_tokens} new ones exceed the model's window of {engine.reach}: "
                  "it no longer sees the beginning", file=sys.stderr, flush=True)
        print(prompt, end="", flush=True)
        for piece in engine.complete(prompt, args.max_tokens, temperature=args.temperature, top_k=args.top_k or None, seed=args.seed):
            print(piece, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    run_main(main)
