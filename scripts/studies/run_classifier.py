"""Token-importance labels from a base, and the keep/drop classifier that learns them (token dropping in the manner of LLMLingua-2).

    python -m scripts.mc_study importance --checkpoint_dir=DIR --labels=DIR    importance of every token, in shards; goes on where it stopped
    python -m scripts.mc_study classifier --checkpoint_dir=DIR --labels=DIR    the classifier, into keep_drop.safetensors beside the labels
"""

import json
import time
from pathlib import Path

import torch

from mc.config import MCConfig
from nanochat.common import FlagParser, UserError, init_distributed, run_main, seed_everything
from nanochat.dataset import Progress
from nanochat.outputs import output_file, output_folder
from nanochat.tokenizer import Tokenizer
from scripts.eval.importance import TEACHERS, importance, keep_labels, read_labels, read_manifest, write_labels
from scripts.eval.methods.registry import load_models
from scripts.eval.methods.token_classifier import FILE, TokenClassifier, TokenClassifierConfig, save_token_classifier, train_classifier
from scripts.eval.rows import add_row_flags, batches_from_flags

COMMANDS = {"label": "importance of every token of some rows, in shards", "train": "a classifier of tokens, taught by labels"}


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.mc_study classifier", description=__doc__.split("\n\n")[0])
    kinds = parser.add_subparsers(dest="command", required=True, parser_class=FlagParser, metavar="|".join(COMMANDS))
    label, teach = (kinds.add_parser(name, help=about, description=about) for name, about in COMMANDS.items())
    for sub in (label, teach):
        sub.add_argument("--checkpoint_dir", required=True, help="the base")
        sub.add_argument("--step", default="latest", help="training step to load, or 'latest' (the newest intact one)")
        sub.add_argument("--labels", required=True, type=Path, help="folder of the labels")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
        sub.add_argument("--seed", type=int, default=0, help="of the rows that are labelled, of the classifier's first weights")
    label.add_argument("--batches", type=int, default=64, help="shards, each of --rows rows")
    label.add_argument("--teacher", default="gate", choices=TEACHERS, help="gate gradients or attention of the continuation, full pass")
    add_row_flags(label)
    teach.add_argument("--share", type=float, default=0.125, help="share of a row's tokens that are to be kept")
    teach.add_argument("--steps", type=int, default=300, help="optimizer steps, of one shard each")
    teach.add_argument("--lr", type=float, default=2e-3, help="AdamW's learning rate, falling to 0")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    begin = time.time()
    if args.command == "label":
        output_folder(args.labels, "manifest.json", flag="--labels")
    else:
        read_manifest(args.labels)
        output_file(args.labels / FILE, flag="--labels")
    models, meta = load_models(args.checkpoint_dir, args.step, init_distributed(args.device).device)
    base = {"base": str(Path(args.checkpoint_dir).resolve()), "base_step": meta["step"]}
    summary = label(args, models, meta, base) if args.command == "label" else teach(args, models, base)
    print(json.dumps({**summary, "seconds": round(time.time() - begin, 1)}))


def label(args, models, meta: dict, base: dict) -> dict:
    if args.batches < 1:
        raise UserError(f"--batches={args.batches} must be at least 1")
    batches, facts = batches_from_flags(args, models.mc.config if models.mc else MCConfig(), meta, Tokenizer.load())

    def shard(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = batches(i)
        return rows.tokens_BT[:, :rows.n], importance(models.gpt, rows.tokens_BT, rows.targets_BT, rows.n, args.teacher)

    progress = Progress("labels", args.batches, "shards", every_s=15)
    made = write_labels(args.labels, {**base, "teacher": args.teacher, **facts}, shard, args.batches, progress.update)
    print(f"{made} shards of {args.rows} rows made, {args.batches} in {args.labels}")
    return {"labels": str(args.labels), "shards": args.batches, "made": made}


def teach(args, models, base: dict) -> dict:
    if not (0 < args.share < 1 and args.steps > 0 and args.lr > 0):
        raise UserError(f"--share={args.share} --steps={args.steps} --lr={args.lr}: between 0 and 1, and above 0")
    facts = read_manifest(args.labels)
    if any(facts.get(name) != value for name, value in base.items()):
        theirs, ours = (f"{x.get('base')}, step {x.get('base_step')}" for x in (facts, base))
        raise UserError(f"{args.labels} holds labels of {theirs}, not of {ours}: the classifier reads its base's embeddings")
    shards = read_labels(args.labels)
    held = shards[-max(len(shards) // 8, 1):]
    taught = shards[:-len(held)] or held
    seed_everything(args.seed)
    model = TokenClassifier(TokenClassifierConfig(models.gpt.config.n_embd))
    losses = train_classifier(model, models.gpt, taught, share=args.share, steps=args.steps, lr=args.lr)
    with torch.no_grad():
        found = [(keep_labels(worth, args.share), keep_labels(model(models.gpt.embed(tokens)).exp(), args.share)) for tokens, worth in held]
    recall = sum(int((label & kept).sum()) for label, kept in found) / max(sum(int(label.sum()) for label, _ in found), 1)
    file = args.labels / FILE
    save_token_classifier(file, model, {**facts, "share": args.share, "steps": args.steps, "lr": args.lr, "seed": args.seed})
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; of the tokens to keep in {sum(len(t) for t, _ in held)} held-out rows it keeps "
          f"{recall:.1%} (by chance {args.share:.1%}); {file}")
    return {"classifier": str(file), "loss": losses[-1], "kept": recall}


if __name__ == "__main__":
    run_main(main)
