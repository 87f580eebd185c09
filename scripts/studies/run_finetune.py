"""Fine-tune a base to read what one method shows, with the same steps, rows and learning rates for every method.

    python -m scripts.mc_study finetune --method=bm25 --checkpoint_dir=DIR --out=DIR

What is there already is left as it is, so that a recipe can be run again.
"""

import json
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from mc.config import MCConfig, to_dict
from nanochat.checkpoint import complete_steps, load_model_state, save_checkpoint
from nanochat.common import FlagParser, UserError, init_distributed
from nanochat.dataset import Progress
from nanochat.loading import check_tokenizer
from nanochat.outputs import output_folder
from nanochat.schedule import batch_lr_scale
from nanochat.tokenizer import Tokenizer
from scripts.eval.methods.registry import METHODS, load_models, method_named
from scripts.eval.methods.token_classifier import FILE, save_token_classifier
from scripts.eval.rows import add_row_flags, batches_from_flags
from scripts.studies.finetune import RATES, Recipe, finetune


def numbers(text: str, name: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--{name}={text}: numbers with commas between") from None


def add_flags(parser: FlagParser) -> None:
    add = parser.add_argument
    add("--method", required=True, help=f"one of {', '.join(name for name, kind in METHODS.items() if not kind.arm)}")
    parser.add_checkpoint("of the base, with its MegaContext where the method uses it")
    parser.add_step()
    add("--classifier", default="", help="file of the classifier that --method=drop_learned needs (made by "
                                         "scripts.mc_study classifier)")
    parser.add_out("checkpoint directory to write")
    add("--budgets", default="128",
        help="entries before the continuation, with commas between: steps take them in turn")
    add("--steps", type=int, default=60, help="optimizer steps for each learning rate")
    add("--lr_scales", default="0.1,0.3",
        help="factors on the base's learning rates, to be tried; the best on dev rows is kept")
    add("--dev", type=int, default=4, help="batches of further training rows on which the learning rate is chosen")
    parser.add_seed("the rows, and of random choices")
    parser.add_device("where to train")
    add_row_flags(parser)


def run(args: Namespace) -> None:
    method_named(args.method)
    ranks = init_distributed(args.device)
    models, meta = load_models(args.checkpoint_dir, args.step, ranks.device, args.classifier)
    tokenizer = Tokenizer.load()
    check_tokenizer(meta, tokenizer, args.checkpoint_dir)
    config = models.mc.config if models.mc else MCConfig()
    batches, rows = batches_from_flags(args, config, meta, tokenizer)
    flags = meta["flags"]
    recipe = Recipe(numbers(args.budgets, "budgets", int), args.steps, numbers(args.lr_scales, "lr_scales", float),
                    {name: flags[name] for name in RATES}, batch_lr_scale(flags["total_batch_size"]), args.dev,
                    args.seed)
    facts = {"system": args.method, "base": str(Path(args.checkpoint_dir).resolve()), "base_step": meta["step"],
             **asdict(recipe), **rows}
    facts = json.loads(json.dumps(facts))
    if complete_steps(args.out):
        there = load_model_state(args.out)[1].get("finetuned", {})
        if different := sorted(name for name in facts if there.get(name) != facts[name]):
            raise UserError(f"{args.out} holds another checkpoint ({', '.join(different)} differ); name another "
                            "folder, or remove it")
        print(f"{args.out} is there already")
        print(json.dumps({"checkpoint": str(args.out), "lr_scale": there["lr_scale"], "dev_nll": there["dev_nll"],
                          "seconds": 0.0}))
        return
    output_folder(args.out, FILE)
    begin, progress = time.time(), Progress(f"fine-tuning {args.method}", args.steps * len(recipe.lr_scales), "steps",
                                            every_s=15)
    tuned = finetune(args.method, models, batches, recipe, progress.update)
    facts |= {"lr_scale": tuned.lr_scale, "dev_nll": {str(scale): nll for scale, nll in tuned.dev_nll.items()},
              "losses": tuned.losses}
    mc, classifier = tuned.models.mc, tuned.models.classifier
    # beside the checkpoint, which is complete only when this is there
    if classifier and "classifier" in method_named(args.method).needs:
        save_token_classifier(args.out / FILE, classifier, facts)
    mc_meta = mc and {**(meta.get("mc") or {"trained_lods": []}), "config": to_dict(mc.config)}
    save_checkpoint(args.out, meta["step"] + args.steps, model=tuned.models.gpt.state_dict(), optimizer_shard={},
                    mc=mc and mc.state_dict(),
                    meta={**{k: v for k, v in meta.items() if k != "step"}, "mc": mc_meta, "finetuned": facts})
    seconds = time.time() - begin
    print(f"{args.method}: loss {tuned.losses[0]:.3f} -> {tuned.losses[-1]:.3f} in {args.steps} steps at "
          f"{tuned.lr_scale} of the "
          f"learning rates, {seconds:.0f} s; {args.out}")
    print(json.dumps({"checkpoint": str(args.out), "lr_scale": tuned.lr_scale, "dev_nll": facts["dev_nll"],
                      "seconds": round(seconds, 1)}))
