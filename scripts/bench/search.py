"""The lens's search over the keys of long histories: its time, and what it finds, against scoring every block.

One trained lens, real histories and tails of its own, every length in turn in one process. Recall@k: share of the k
blocks with the highest focus logits that are among the k best found. Found: share of the blocks that a
question is about among the 16 best.

    rows     what the model was trained on. Text: the corpus's training documents in order, tails from
             held-out ones. Recall: the stored
             blocks of one row after another, which repeat the same keys all over; tails are questions to the first rows
    needle   text with 32 blocks of pairs among its first 128 blocks; tails are questions to them (a recall checkpoint)

Shapes: N blocks, T tokens of a tail, D width.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
import torch

from mc.lensnet import LOCAL_MEAN
from mc.model import load_mega_context
from mc.session.key_search import PAGE, KeySearch
from nanochat.common import FlagParser, UserError
from nanochat.dataset import open_corpus
from nanochat.loading import check_tokenizer, load_model
from nanochat.tasks.recall import RecallTask
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import TRAINED_WITH_MC, print_json

LENGTHS = (4_096, 65_536, 262_144, 1_048_576, 10_485_760)
FOUND_WITHIN = 16
KS = (1, 4, 16)


class Case(NamedTuple):
    tokens_N: np.ndarray  # int64 history
    tails: list[np.ndarray]  # int64 tokens that end where the lens is asked
    about: list[np.ndarray]  # blocks that each tail is about; empty when nobody knows


def text_tokens(data: str, split: str, tokenizer: Tokenizer, n: int | None = None) -> np.ndarray:
    """int64, the first n or all. UserError if there are fewer."""
    tokens = open_token_cache(open_corpus(data), split, tokenizer).tokens
    n = n or len(tokens)
    if len(tokens) < n:
        raise UserError(f"--data={data} has {len(tokens)} {split} tokens, fewer than the {n} asked for; lower "
                        "--longest or give more text")
    return tokens[:n].astype(np.int64)


def text_case(data: str, tokenizer: Tokenizer, n: int, queries: int, length: int) -> Case:
    held_out = text_tokens(data, "val", tokenizer)
    ends = np.linspace(length, len(held_out), queries).astype(int)
    return Case(text_tokens(data, "train", tokenizer, n), [held_out[end - length:end] for end in ends], [])


def recall_case(task: RecallTask, n: int, queries: int, length: int, filler_N: np.ndarray | None) -> Case:
    """Questions to the first rows' blocks, which stand among others of their kind, or
    scattered over the start of a text."""
    asked = 4 if filler_N is None else 1
    episodes = -(-queries // asked)
    stored = task.blocks * task.block
    rows = task.rows("val", np.arange(asked), task.blocks, stored + episodes * task.episode).tokens
    if filler_N is None:
        history = [task.rows("val", np.arange(i, i + 512), task.blocks,
                             stored + task.episode).tokens[:, :stored].ravel()
                   for i in range(0, -(-n // stored), 512)]
        history, places = np.concatenate(history)[:n], np.arange(asked * task.blocks)
    else:
        places = np.random.default_rng(0).permutation(LENGTHS[0] // task.block)[:task.blocks]
        history = filler_N.copy()
        history.reshape(-1, task.block)[places] = rows[0, :stored].reshape(task.blocks, task.block)
    key_of_alias = np.argsort(task.alias_of_key)
    tails, about = [], []
    for row in range(asked):
        for start in range(stored, rows.shape[1] - 1, task.episode):
            end = start + task.announce
            tails.append(rows[row, end - length:end])
            keys = task.keys.start + key_of_alias[rows[row, start:end:2] - task.aliases.start]
            about.append(places[row * task.blocks
                                + np.unique(np.nonzero(np.isin(rows[row, :stored], keys))[0] // task.block)])
    return Case(history, tails[:queries], about[:queries])


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--history", default="rows", choices=("rows", "needle"),
                        help="rows: what the model was trained on; needle: pairs in text")
    parser.add_argument("--data", default="stdlib",
                        help="text of a history: the embedded corpus 'stdlib' or a directory")
    parser.add_argument("--longest", type=int, default=1_048_576,
                        help=f"tokens of the longest history, of {', '.join(map(str, LENGTHS))}")
    parser.add_argument("--queries", type=int, default=32, help="tails per length")


def run(args: argparse.Namespace) -> None:
    """Measure, print a table and, last, one JSON line."""
    lengths = [n for n in LENGTHS if n <= args.longest]
    if not lengths or args.queries < 1:
        raise UserError(f"--longest={args.longest} --queries={args.queries}: at least {LENGTHS[0]} tokens and one tail")
    gpt, meta = load_model(args.checkpoint_dir)
    mc, tokenizer = load_mega_context(args.checkpoint_dir, meta["step"], meta, gpt.config.n_embd), Tokenizer.load()
    check_tokenizer(meta, tokenizer, args.checkpoint_dir)
    lens, flags, K = mc.lensnet, meta["flags"], mc.config.block_size
    of_pairs, tail = flags["data"] == "recall", lens.config.tail + LOCAL_MEAN
    if args.history == "needle" and not of_pairs:
        raise UserError(f"--history=needle asks for pairs, the checkpoint learned --data={flags['data']}; give a "
                        "recall checkpoint")
    if of_pairs:
        filler = text_tokens(args.data, "train", tokenizer, lengths[-1]) if args.history == "needle" else None
        task = RecallTask.for_tokenizer(tokenizer, blocks=flags["recall_blocks"], seed=flags["seed"])
        case = recall_case(task, lengths[-1], args.queries, tail, filler)
        if K != task.block:
            case = case._replace(about=[])  # their blocks are not the lens's
    else:
        case = text_case(args.data, tokenizer, lengths[-1], args.queries, tail)

    with torch.inference_mode():
        ids = torch.from_numpy(case.tokens_N)
        keys_NPC = torch.cat([lens.keys(gpt.embed(piece[None]))[0] for piece in ids.split(4096 * K)])
        tails = [gpt.embed(torch.from_numpy(x)[None]) for x in case.tails]
    systems, grown = {}, {}
    for n in lengths:
        blocks = n // K
        for name, limits in (("search", {}), ("flat", {"flat_limit": -(-blocks // PAGE) * PAGE})):
            systems[name, n], begin = KeySearch(lens, lambda index: keys_NPC.index_select(0, index),
                                                **limits), time.perf_counter()
            systems[name, n].grow(blocks)
            grown[name, n] = time.perf_counter() - begin
    times = {at: [] for at in systems}
    recalls = {n: [] for n in lengths}
    found = {at: [] for at in systems}
    for n, query in [(n, 0) for n in lengths] + [(n, i) for i in range(len(tails)) for n in lengths]:
        best = {}
        for name in ("search", "flat"):
            search = systems[name, n]
            begin, busy = time.perf_counter(), time.thread_time()
            index, logits = search.top(tails[query], n, FOUND_WITHIN)
            times[name, n].append((time.perf_counter() - begin, time.thread_time() - busy))
            best[name] = index[logits.argsort(descending=True)].numpy()
            if case.about:
                found[name, n].append(np.isin(case.about[query], best[name]).mean())
        recalls[n].append([np.isin(best["flat"][:k], best["search"][:k]).mean() for k in KS])

    threads, result = torch.get_num_threads(), []
    print(f"{args.history} of {flags['data']}, {len(tails)} tails of {tail} tokens, {threads} "
          f"thread{'s' * (threads > 1)}, times in ms")
    print("   tokens  search median   p95   cpu |  flat median   p95   cpu | recall@1    @4   @16 | found  flat | "
          "scored  grow s")
    for n in lengths:
        row = {"tokens": n, "scored": systems["search", n].n_exact, "grow_s": grown["search", n]}
        for name in ("search", "flat"):
            wall, cpu = 1e3 * np.array(times[name, n][1:]).T  # the first is the warm-up
            row |= {f"{name}_ms": np.median(wall), f"{name}_p95_ms": np.quantile(wall, 0.95),
                    f"{name}_cpu_ms": np.median(cpu)}
            row[f"{name}_found"] = float(np.mean(found[name, n][1:])) if case.about else None
        row |= {f"recall_{k}": value for k, value in zip(KS, np.mean(recalls[n][1:], axis=0))}
        result.append({name: value if value is None else round(float(value), 4) for name, value in row.items()})
        hit = "{search_found:6.3f} {flat_found:5.3f}".format(**row) if case.about else "            "
        print("{tokens:9d} {search_ms:14.2f} {search_p95_ms:5.2f} {search_cpu_ms:5.2f} | {flat_ms:12.2f} "
              "{flat_p95_ms:5.1f} {flat_cpu_ms:5.1f} | "
              "{recall_1:8.3f} {recall_4:5.3f} {recall_16:5.3f} |".format(**row), hit,
              "| {scored:6d} {grow_s:7.2f}".format(**row))
    print_json({"history": args.history, "data": flags["data"], "threads": threads, "queries": len(tails),
                "lengths": result})
