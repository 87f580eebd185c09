"""Run tasks of EleutherAI's lm-evaluation-harness on a checkpoint.

    python -m scripts.run_lm_eval --checkpoint_dir=DIR --tasks=NAME --include_path=DIR
    … --mc_enabled=1        every request in a session with MegaContext, whose context is never cut

Tasks are the harness's own (they fetch their data) or YAML files in --include_path, whose data files may be local.
Needs the extra lm-eval: pip install "megacontext[lm-eval]".
"""

import json
import logging
from pathlib import Path

from nanochat.common import FlagParser, UserError, base_dir, import_optional, init_distributed, parse_optional, run_main
from nanochat.loading import add_model_flags, model_from_flags
from nanochat.outputs import output_file, write_file


def make_parser(with_mc: bool = True) -> FlagParser:
    parser = FlagParser(prog="python -m scripts.run_lm_eval", description=__doc__.split("\n\n")[0])
    add_model_flags(parser)
    parser.add_argument("--tasks", required=True, help="names of tasks or groups, with commas between")
    parser.add_argument(
        "--include_path", type=Path, help="folder of further tasks in YAML; their relative data files are found from "
                                          "the current folder"
    )
    parser.add_argument("--limit", type=int, default=0, help="documents per task; 0: all")
    parser.add_argument("--num_fewshot", type=int, default=-1,
                        help="examples before each question; -1: as the task says")
    parser.add_argument(
        "--max_length",
        type=int,
        default=0,
        help="window in tokens, behind which a longer context is cut; 0: the training length; without MegaContext only",
    )
    parser.add_seed("the choice of few-shot examples and of sampling, where a task samples")
    parser.add_switch("--mc_enabled", False, "1: sessions with MegaContext, whose context is never cut")
    parser.add_out("JSON file of the results", "evals/lm_eval.json")
    if with_mc:
        import_optional("mc", "session.config").add_flags(parser)
    return parser


def import_harness():
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as e:
        raise UserError(
            f'scripts.run_lm_eval needs the package {e.name}, which is not installed; run: pip install '
            '"megacontext[lm-eval]"'
        ) from None
    return lm_eval.simple_evaluate, TaskManager


def build_lm(args):
    """The checkpoint as the harness sees it, and what to say about contexts that were cut."""
    ranks = init_distributed(args.device)
    model, tokenizer, meta = model_from_flags(args, ranks.device)
    if not args.mc_enabled:
        from nanochat.harness import PlainLM

        return PlainLM(model, tokenizer, args.max_length, args.seed)
    if args.max_length:
        raise UserError(f"--max_length={args.max_length} has no effect with --mc_enabled=1: a session's context is "
                        "never cut")
    if not meta.get("mc"):
        raise UserError("--mc_enabled=1 needs a checkpoint that was trained with --mc_enabled=1")
    from scripts.eval.lm_eval_sessions import SessionLM  # imports mc

    sessions, config = import_optional("mc", "session.session"), import_optional("mc",
                                                                                 "session.config").from_flags(args)
    return SessionLM(sessions.open_pool(model, meta, args.checkpoint_dir, config), tokenizer, args.seed)


def check_generation(lm, tasks: dict) -> None:
    """UserError, before anything is asked, for a task whose generation_kwargs the model cannot honour."""
    for name, task in tasks.items():
        if task.get_config("output_type") == "generate_until":
            try:
                lm.wanted(task.get_config("generation_kwargs") or {})
            except UserError as e:
                raise UserError(f"task {name}: {e}") from None


def loads_checked(manager, lm) -> None:
    """The manager's tasks are looked at when it loads them, which simple_evaluate has it do. UserError for one that
    does not."""
    load = manager.load

    def checked(specs):
        try:
            loaded = load(specs)
        except Exception as e:  # whatever a task's YAML, its own Python or its data raise
            what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            raise UserError(f"--tasks={','.join(specs)}: the harness cannot load them ({what})") from e
        check_generation(lm, loaded["tasks"])
        return loaded

    manager.load = checked


def main() -> None:
    _, args = parse_optional(make_parser, "mc")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks={args.tasks} names no task")
    if args.include_path and not args.include_path.is_dir():
        raise UserError(f"--include_path={args.include_path}: no such folder")
    if args.limit < 0 or args.num_fewshot < -1 or args.seed < 0:
        raise UserError("--limit and --seed are at least 0, --num_fewshot at least -1")
    out = output_file(args.out or base_dir() / "evals" / "lm_eval.json")
    simple_evaluate, TaskManager = import_harness()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    managers = (
        TaskManager(include_path=str(args.include_path) if args.include_path else None, include_defaults=defaults)
        for defaults in (False, True)
        if defaults or args.include_path
    )  # the harness's thousands take seconds to index
    unknown = names
    for manager in managers:
        if not (unknown := [name for name in names if name not in manager.all_tasks]):
            break
    else:
        raise UserError(
            f"--tasks={args.tasks}: not all of these are tasks of the harness or of --include_path="
            f"{args.include_path}: {', '.join(unknown)} unknown"
        )
    lm = build_lm(args)
    loads_checked(manager, lm)
    found = simple_evaluate(
        lm,
        tasks=names,
        limit=args.limit or None,
        num_fewshot=None if args.num_fewshot < 0 else args.num_fewshot,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
    )
    cut = getattr(lm, "cut", 0)
    if cut:
        print(
            f"note: {cut} requests were longer than the window of {lm.max_length} tokens and lost their beginning; "
            "--mc_enabled=1 keeps it"
        )
    if lm.apart:
        print(f"note: {lm.apart} continuations only complete the last token of their context; they were encoded apart")
    left_out = getattr(lm, "left_out", 0)
    if left_out:
        print(f"note: of {left_out} requests a part of the context had no entry in the working context at last; a "
              "larger --mc_budget shows more")
    results = {
        task: {key: value for key, value in scores.items() if key != "sample_len" and isinstance(value, (int, float))}
        for task, scores in found["results"].items()
    }
    samples = {task: counts["effective"] for task, counts in found["n-samples"].items()}
    for task, scores in results.items():  # before the file, which may fail
        print(f"{task}: " + ", ".join(f"{key.removesuffix(',none')} {value:.4f}" for key, value in scores.items()))
    write_file(
        out,
        json.dumps(
            {
                "results": results,
                "documents": samples,
                "cut": cut,
                "apart": lm.apart,
                "left_out": left_out,
                "checkpoint": str(args.checkpoint_dir or args.nanochat_checkpoint),
                "mc": args.mc_enabled,
                "flags": {k: str(v) for k, v in vars(args).items()},
            },
            indent=1,
        ),
    )
    print(json.dumps({"results": results, "documents": samples, "cut": cut, "left_out": left_out, "out": str(out)}))


if __name__ == "__main__":
    run_main(main)
