"""Facts and loss in histories far longer than a training row, through the inference session.

    python -m scripts.mc_eval stream --checkpoint_dir=DIR                              a model trained on recall: facts
                                                                                       at distances up to 64 windows
    … --max_length=1048576                                                        and against the length of the history
    … --text_checkpoint_dir=DIR                                                   and the loss of a model of text,
                                                                                  with more and more text in front
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from mc.session import config as session_config
from mc.session import session as sessions
from mc.session.session import SessionPool
from mc.store.history import History
from nanochat.common import FlagParser, UserError, base_dir, init_distributed
from nanochat.dataloader import LongRows
from nanochat.dataset import Progress, open_corpus
from nanochat.loading import model_from_flags
from nanochat.outputs import output_folder, write_file
from nanochat.tasks.recall import RecallTask
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer
from scripts.eval.figures import GREEN, GREY, VERMILION, new_figure, save_figure
from scripts.eval.statistics import bootstrap_interval
from scripts.eval.stream import Answer, ask, ask_window, store_of
from scripts.eval.subcommands import check_least
from scripts.eval.tables import cell, table

SYSTEMS = ("lens", "oracle", "window")
LABELS = {"lens": "LensNet focus", "oracle": "oracle focus", "window": "sliding window"}
COLOUR_OF = {"lens": VERMILION, "oracle": GREEN, "window": GREY}


class Answers:
    """Answers by (group, system, place); a cell is the mean over questions with its 95 % bootstrap."""

    def __init__(self):
        self.by_place: dict[tuple[str, str, str], list[Answer]] = {}

    def add(self, group: str, system: str, place: str, answer: Answer) -> None:
        self.by_place.setdefault((group, system, place), []).append(answer)

    def report(self) -> list[dict]:
        rows = []
        for (group, system, place), answers in self.by_place.items():
            acc, nll = np.array([a.acc for a in answers]), np.array([a.nll for a in answers])
            entries = [sum(a.lods.values()) for a in answers]
            lods = {str(lod): round(float(np.mean([a.lods.get(lod, 0) for a in answers])), 1)
                    for lod in sorted(set().union(*(a.lods for a in answers)))}
            rows.append({"group": group, "system": system, "place": place, "questions": len(answers),
                         "acc": float(acc.mean()),
                         "acc_interval": bootstrap_interval(lambda i: acc[i].mean(), len(acc)),
                         "nll": float(nll.mean()),
                         "nll_interval": bootstrap_interval(lambda i: nll[i].mean(), len(nll)),
                         "entries": float(np.mean(entries)), "entries_by_lod": lods,
                         "omitted": float(np.mean([a.omitted for a in answers]))})
        return rows


def put(answers: Answers, pool: SessionPool, group: str, place: str, store, history: torch.Tensor, said: torch.Tensor,
        scored: torch.Tensor,
        counted: torch.Tensor, known: list[int] | None) -> None:
    """One question to every system; without known blocks there is no oracle."""
    answers.add(group, "lens", place, ask(pool, store, said, scored, counted))
    if known is not None:
        answers.add(group, "oracle", place, ask(pool, store, said, scored, counted, known))
    answers.add(group, "window", place, ask_window(pool, history, said, scored, counted))


def bins(windows: int) -> Iterator[tuple[int, int]]:
    """[1, 2), [2, 4), … windows."""
    low = 1
    while low < windows:
        yield low, min(2 * low, windows)
        low *= 2


def recall_by_distance(answers: Answers, pool: SessionPool, task: RecallTask, fillers: dict[str, np.ndarray | None],
                       args: Namespace) -> int:
    """Facts at distances up to `windows` times the budget; the length of the streams."""
    W, K = pool.focus_config.budget, task.block
    n = args.windows * W // K * K
    progress = Progress("streams", args.streams * len(fillers), "streams", every_s=15)
    for g, (group, filler) in enumerate(fillers.items()):
        for s in range(args.streams):
            rng, ranges = np.random.default_rng((args.seed, s)), list(bins(args.windows))
            places = np.stack([rng.choice(np.arange((n - high * W) // K, (n - low * W) // K), task.episode_blocks,
                                          replace=False) for low, high in ranges])
            stream = task.stream_rows("val", np.array([s]), n, places[None], filler)
            tokens, questions = torch.from_numpy(stream.tokens[0]), torch.from_numpy(stream.questions[0])
            store = store_of(pool, tokens)
            for (low, high), where, question in zip(ranges, places, questions):
                said, scored = question.split([task.announce, task.ask])
                put(answers, pool, group, f"{low}-{high}", store, tokens, said, scored, values_of(scored),
                    where.tolist())
            progress.update(g * args.streams + s + 1)
    return n


def values_of(scored: torch.Tensor) -> torch.Tensor:
    """Of alias and value in turn, the values."""
    return torch.arange(len(scored)) % 2 == 1


def lengths(shortest: int, longest: int) -> list[int]:
    """shortest, 4 times that, … up to longest."""
    found = []
    while shortest <= longest:
        found.append(shortest)
        shortest *= 4
    return found


def recall_by_length(answers: Answers, pool: SessionPool, task: RecallTask, args: Namespace) -> None:
    """Facts at the start of the stream, and among its last 32 blocks, asked for when it has each length."""
    K, shown = task.block, lengths(32 * task.block, args.max_length)
    progress = Progress("tokens of recall streams", args.length_streams * sum(shown), "tokens", every_s=15)
    for s in range(args.length_streams):
        rng = np.random.default_rng((args.seed, s, 1))
        # the last two blocks of a length are near the tail: left out
        first, width = rng.permutation(30), task.episode_blocks
        starts = first[:width * len(shown)].reshape(-1, width)
        near = [first[-width:], *(n // K - 32 + rng.permutation(30)[:width] for n in shown[1:])]
        stream = task.stream_rows("val", np.array([args.streams + s]), shown[-1], np.concatenate([starts, near])[None])
        tokens, questions = torch.from_numpy(stream.tokens[0]), torch.from_numpy(stream.questions[0])
        store = store_of(pool, tokens[:0])
        history = History(pool.gpt, pool.mc, store)
        for i, n in enumerate(shown):
            history.append(tokens[history.n_tokens:n])
            for group, places, question in (("start", starts[i], questions[i]),
                                            ("near", near[i], questions[len(shown) + i])):
                said, scored = question.split([task.announce, task.ask])
                put(answers, pool, f"recall, {group}", str(n), store, tokens[:n], said, scored, values_of(scored),
                    places.tolist())
            progress.update(s * sum(shown) + sum(shown[:i + 1]))


def text_by_length(answers: Answers, pool: SessionPool, tokenizer: Tokenizer, args: Namespace) -> None:
    """The loss of the same continuations of the same passages, with more and more other text in front of them."""
    c, n = (pool.mc.config, pool.gpt.config.sequence_len // pool.mc.config.block_size * pool.mc.config.block_size
            - pool.mc.config.horizon)
    n = n // c.block_size * c.block_size
    front = open_token_cache(open_corpus("stdlib"), "train", tokenizer).tokens
    passages = LongRows(open_token_cache(open_corpus("stdlib"), "val", tokenizer), n + c.horizon, args.seed,
                        "val").row_tokens(np.arange(args.passages))[0]
    shown = lengths(n, args.max_length)
    progress = Progress("passages", len(shown) * args.passages, "passages", every_s=15)
    store = store_of(pool, torch.empty(0, dtype=torch.int64))
    history = History(pool.gpt, pool.mc, store)
    for i, length in enumerate(shown):
        index = np.arange(history.n_tokens, length - n) % len(front)
        history.append(torch.from_numpy(front[index].astype(np.int64)))
        before = torch.from_numpy(front[np.arange(max(history.n_tokens - pool.focus_config.budget, 0),
                                                  history.n_tokens) % len(front)].astype(np.int64))
        for p, passage in enumerate(torch.from_numpy(passages)):
            said, scored = passage[:n], passage[n:n + c.horizon]
            put(answers, pool, "text", str(length), store, before, said, scored,
                torch.ones(c.horizon, dtype=torch.bool), None)
            progress.update(i * args.passages + p + 1)


def stream_markdown(title: str, rows: list[dict], value: str) -> list[str]:
    """Groups and places down, systems across."""
    places = list(dict.fromkeys((r["group"], r["place"]) for r in rows))
    systems = [s for s in SYSTEMS if any(r["system"] == s for r in rows)]
    cells = {(r["group"], r["place"], r["system"]): r for r in rows}
    shown = []
    for group, place in places:
        found = [cells[group, place, s] for s in systems]
        lods = ", ".join(f"{count:g} LOD{lod}" for lod, count in found[0]["entries_by_lod"].items())
        shown.append((group, place, *(cell(r[value], r[f"{value}_interval"]) for r in found), found[0]["questions"],
                      lods, f"{found[0]['omitted']:,.0f}"))
    head = ("history", "place", *(LABELS[s] for s in systems), "questions", "entries by LOD (lens)",
            "tokens left out (lens)")
    return [f"### {title}", "", *table(head, shown), ""]


def plot_stream(parts: dict[str, list[dict]], path: Path) -> None:
    figure, axes = new_figure(1, len(parts), width=5.2, height=3.4)
    for axis, (part, rows) in zip(axes[0], parts.items()):
        distance, value = part == "distance", "acc" if part == "distance" else "nll"
        for style, group in zip(("-", "--"), dict.fromkeys(r["group"] for r in rows)):
            for system in SYSTEMS:
                line = [r for r in rows if r["group"] == group and r["system"] == system]
                if line:
                    places = range(len(line)) if distance else [int(r["place"]) for r in line]
                    axis.plot(places, [r[value] for r in line], style, marker="o", markersize=3,
                              color=COLOUR_OF[system], label=f"{LABELS[system]}, {group}")
                    axis.fill_between(places, *zip(*(r[f"{value}_interval"] for r in line)), color=COLOUR_OF[system],
                                      alpha=0.12, linewidth=0)
        if distance:
            axis.set_xticks(range(len(line)), [r["place"] for r in line])
            axis.set_ylim(-0.02, 1.02)
        else:
            axis.set_xscale("log", base=2)
        axis.set_xlabel("windows between fact and question" if distance else "tokens of history")
        axis.set_ylabel("accuracy of the answers" if distance else "nats per judged token")
        axis.legend(fontsize=7, frameon=False)
        axis.tick_params(labelsize=8)
    save_figure(figure, path)


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of a run with --mc_enabled=1 on --data=recall")
    parser.add_argument("--text_checkpoint_dir", help="also: one trained with --mc_enabled=1 on text")
    parser.add_device("auto (CUDA when there is one), cpu or cuda")
    parser.add_argument("--windows", type=int, default=64, help="length of the streams, in budgets")
    parser.add_argument("--streams", type=int, default=32,
                        help="streams per filler, each with one question per bin of distances")
    parser.add_argument("--filler", default="pairs,text",
                        help="what surrounds the facts: pairs (of other keys, again and again), text, or both")
    parser.add_argument("--max_length", type=int, default=0,
                        help="longest history [tokens] of recall and text against length; 0: leave these out")
    parser.add_argument("--length_budget", type=int, default=320, help="W of these")
    parser.add_argument("--length_streams", type=int, default=4, help="recall streams of these")
    parser.add_argument("--passages", type=int, default=32, help="passages of text of these")
    parser.add_seed("the places of the facts")
    parser.add_out("where report and plot go", "stream")
    session_config.add_flags(parser, budget=256)


def load_pool(checkpoint_dir: str, args: Namespace, budget: int,
              device: torch.device) -> tuple[SessionPool, Tokenizer, dict]:
    names = Namespace(checkpoint_dir=checkpoint_dir, step="latest", nanochat_checkpoint=None, nanochat_tokenizer=None)
    model, tokenizer, meta = model_from_flags(names, device)
    if not meta.get("mc"):
        raise UserError(f"the checkpoint in {checkpoint_dir} has no MegaContext: it was trained with --mc_enabled=0")
    return sessions.open_pool(model, meta, checkpoint_dir,
                              session_config.from_flags(args, budget=budget)), tokenizer, meta


def run(args: Namespace) -> None:
    check_least(args, windows=2, streams=1, max_length=0, length_budget=1, length_streams=1, passages=1)
    kinds = args.filler.split(",")
    if not set(kinds) <= {"pairs", "text"}:
        raise UserError(f"--filler={args.filler}: pairs, text, or pairs,text")
    out, device = output_folder(args.out or base_dir() / "stream", "stream.json",
                                "stream.md"), init_distributed(args.device).device
    pool, tokenizer, meta = load_pool(args.checkpoint_dir, args, args.mc_budget, device)
    if meta["flags"]["data"] != "recall":
        raise UserError(f"the model in {args.checkpoint_dir} was trained on {meta['flags']['data']}, not on "
                        "--data=recall: it knows no facts to be asked for")
    task = RecallTask.for_tokenizer(tokenizer, seed=meta["flags"]["seed"])
    if (K := pool.mc.config.block_size) != task.block:
        raise UserError(f"the model in {args.checkpoint_dir} was trained with --mc_block_size={K}, --data=recall "
                        f"stores facts in blocks of {task.block} tokens; "
                        "only models of that block size are judged")
    text = open_token_cache(open_corpus("stdlib"), "val", tokenizer).tokens if "text" in kinds else None
    by_place, by_length = Answers(), Answers()
    with torch.inference_mode():
        n = recall_by_distance(by_place, pool, task, {kind: text if kind == "text" else None for kind in kinds}, args)
        if args.max_length:
            recall_by_length(by_length, load_pool(args.checkpoint_dir, args, args.length_budget, device)[0], task, args)
        of_text = Answers()
        if args.max_length and args.text_checkpoint_dir:
            text_pool, text_tokenizer, _ = load_pool(args.text_checkpoint_dir, args, args.length_budget, device)
            text_by_length(of_text, text_pool, text_tokenizer, args)
    parts = {name: t.report() for name, t in (("distance", by_place), ("length", by_length), ("text", of_text))
             if t.by_place}
    titles = {"distance": f"Accuracy by distance in windows of {pool.focus_config.budget} entries, streams of {n:,} tokens", "length": "NLL of recall by length of the history",  # noqa: E501
              "text": "NLL of text by length of the history"}
    lines = [line for name, rows in parts.items()
             for line in stream_markdown(titles[name], rows, "acc" if name == "distance" else "nll")]
    if by_length.by_place:
        lines += stream_markdown("Accuracy of recall by length of the history", parts["length"], "acc")
    write_file(out / "stream.md", "\n".join(lines))
    report = {"n": n, "windows": args.windows, "budget": pool.focus_config.budget, "streams": args.streams,
              "seed": args.seed,
              "trained_lods": meta["mc"]["trained_lods"], "checkpoint": str(args.checkpoint_dir), **parts}
    write_file(out / "stream.json", json.dumps(report, indent=1))
    plot_stream(parts, out / "stream.png")
    print("\n".join(lines))
    print(f"report in {out}")
    accuracy = {group: {s: {r["place"]: round(r["acc"], 4) for r in parts["distance"] if r["group"] == group
                            and r["system"] == s} for s in SYSTEMS} for group in kinds}
    summary = {key: report[key] for key in ("n", "windows", "budget", "streams", "seed")}
    print(json.dumps({**summary, "accuracy": accuracy,
                      "least_lens": min(r["acc"] for r in parts["distance"] if r["system"] == "lens"),
                      "report": str(out / "stream.json")}))
