"""Train the classifier of tokens worth keeping, taught by importance labels (token dropping
in the manner of LLMLingua-2).

    python -m scripts.mc_study classifier --checkpoint_dir=DIR --labels=DIR    into
                                                                               keep_drop.safetensors beside the labels
"""

import json
import time
from argparse import Namespace

import torch

from nanochat.common import FlagParser, UserError, init_distributed, seed_everything
from nanochat.outputs import output_file
from scripts.eval.importance import keep_labels, read_labels, read_manifest
from scripts.eval.methods.registry import load_models
from scripts.eval.methods.token_classifier import FILE, TokenClassifier, TokenClassifierConfig, save_token_classifier, train_classifier  # noqa: E501
from scripts.studies.run_importance import add_label_flags, base_of


def add_flags(parser: FlagParser) -> None:
    add_label_flags(parser)
    parser.add_seed("the classifier's first weights")
    parser.add_argument("--share", type=float, default=0.125, help="share of a row's tokens that are to be kept")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, of one shard each")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW's learning rate, falling to 0")


def run(args: Namespace) -> None:
    if not (0 < args.share < 1 and args.steps > 0 and args.lr > 0):
        raise UserError(f"--share={args.share} --steps={args.steps} --lr={args.lr}: between 0 and 1, and above 0")
    begin, facts = time.time(), read_manifest(args.labels)
    output_file(args.labels / FILE, flag="--labels")
    models, meta = load_models(args.checkpoint_dir, args.step, init_distributed(args.device).device)
    base = base_of(args.checkpoint_dir, meta)
    if any(facts.get(name) != value for name, value in base.items()):
        theirs, ours = (f"{x.get('base')}, step {x.get('base_step')}" for x in (facts, base))
        raise UserError(f"{args.labels} holds labels of {theirs}, not of {ours}: the classifier reads its base's "
                        "embeddings")
    shards = read_labels(args.labels)
    held = shards[-max(len(shards) // 8, 1):]
    taught = shards[:-len(held)] or held
    seed_everything(args.seed)
    model = TokenClassifier(TokenClassifierConfig(models.gpt.config.n_embd))
    losses = train_classifier(model, models.gpt, taught, share=args.share, steps=args.steps, lr=args.lr)
    with torch.no_grad():
        found = [(keep_labels(worth, args.share), keep_labels(model(models.gpt.embed(tokens)).exp(), args.share))
                 for tokens, worth in held]
    recall = sum(int((label & kept).sum()) for label, kept in found) / max(sum(int(label.sum()) for label, _ in found),
                                                                           1)
    file = args.labels / FILE
    save_token_classifier(file, model, {**facts, "share": args.share, "steps": args.steps, "lr": args.lr,
                                        "seed": args.seed})
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; of the tokens to keep in {sum(len(t) for t, _ in held)} held-out "
          "rows it keeps "
          f"{recall:.1%} (by chance {args.share:.1%}); {file}")
    print(json.dumps({"classifier": str(file), "loss": losses[-1], "kept": recall,
                      "seconds": round(time.time() - begin, 1)}))
