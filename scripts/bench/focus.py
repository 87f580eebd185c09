"""What refocusing does on long streams of text: how much is edited, how long blocks stay, how
full the budget is, and the loss.

Held-out documents one after the other, cut into streams of `--tokens`; a session reads each from its second budget on
as if it were generated, with a refocus every `--mc_interval` tokens. Everything comes from the meter that a session
has in use (`mc.session.meter`).

    swap rate     (expands + collapses by edits) ÷ blocks shown raw or as LOD1, mean over refocuses
    residency     refocuses that blocks shown by an edit stayed shown, together ÷ times one
                  of them was hidden (at least 1)
    thrash        share of the edits' flips that undo another edit's of at most 2 × cooldown refocuses ago
    utilization   entries ÷ the largest count reachable within the budget, mean over refocuses
    nll_window    of the same tokens, read in the same pieces behind as many raw tokens as the budget has entries
"""

import argparse
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.session import config as session_config
from mc.session import session as sessions
from mc.session.meter import SessionMeter
from nanochat.common import FlagParser, UserError, pick_device
from nanochat.dataset import Progress, open_corpus
from nanochat.gpt import GPT, token_losses
from nanochat.loading import load_model
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import print_json
from scripts.eval.statistics import bootstrap_interval


class Values:
    """A recorder that keeps every value by the metric's name."""

    def __init__(self):
        self.of: dict[str, list[float]] = defaultdict(list)

    def record(self, name: str, value: float, **attributes: str | int) -> None:
        self.of[name.removeprefix("mc.session.")].append(float(value))


@torch.no_grad()
def window_nll(gpt: GPT, tokens_N: Tensor, begin: int, budget: int, interval: int, batch: int = 32) -> float:
    """Nats per token from `begin` on, in pieces of `interval` tokens, each behind the `budget` tokens
    before it at their positions."""
    starts, total = torch.arange(begin, len(tokens_N), interval), 0.0
    for start_B in starts.split(batch):
        place_BT = start_B[:, None] + torch.arange(-budget, interval)
        inside = place_BT < len(tokens_N)
        tokens_BT = tokens_N[place_BT.clamp_max(len(tokens_N) - 1)]
        targets_BP = tokens_BT.masked_fill(~inside, -1)[:, budget:]
        device = gpt.lm_head.weight.device
        hidden = gpt.hidden(tokens_BT[:, :-1].to(device), positions=place_BT[:, :-1].to(device),
                            lift_windows=True)[:, budget - 1:]
        total += float(token_losses(gpt.logits(hidden), targets_BP.to(device)).sum())
    return total / (len(tokens_N) - begin)


class Stream(NamedTuple):
    """What one stream saw."""

    nll: float  # nats per token read
    nll_window: float
    values: dict[str, list[float]]  # of `mc.session.*`, per refocus
    stays: list[float]  # of blocks shown by an edit and hidden again [refocuses]
    lasting: list[float]  # of those still shown at the end


def read_stream(pool: sessions.SessionPool, tokens_N: Tensor, begin: int) -> Stream:
    """The first `begin` tokens as a history, the others one by one."""
    session, values = pool.open(), Values()
    try:
        session.meter = SessionMeter(values, pool.focus_config.cooldown)
        session.begin(tokens_N[:begin])
        total = 0.0
        for piece in tokens_N[begin:].split(pool.interval):
            total += float(token_losses(session.score(piece)[None], piece[None].to(pool.device)).sum())
        plain = window_nll(pool.gpt, tokens_N, begin, pool.focus_config.budget, pool.interval)
        return Stream(total / (len(tokens_N) - begin), plain, values.of, values.of["residency"],
                      session.meter.staying(session.focus.refocuses))
    finally:
        session.close()


def stream_summary(streams: list[Stream]) -> dict[str, float]:
    """Means over all refocuses of all streams."""
    every = {name: np.concatenate([s.values[name] for s in streams])
             for name in ("swap_rate", "expands", "collapses", "forced", "undone", "utilization")}
    stays = np.concatenate([s.stays for s in streams])
    every_stay = np.concatenate([stays, *(s.lasting for s in streams)])
    flipped = every["expands"].sum() + every["collapses"].sum()
    return {"nll": float(np.mean([s.nll for s in streams])),
            "nll_window": float(np.mean([s.nll_window for s in streams])),
            "swap_rate": float(every["swap_rate"].mean()),
            "swap_rate_p95": float(np.quantile(every["swap_rate"], 0.95)),
            "residency": float(every_stay.sum() / max(len(stays), 1)),
            "residency_p95": float(np.quantile(every_stay, 0.95)) if len(every_stay) else 0.0,
            "blocks_shown": len(every_stay),
            "thrash": float(every["undone"].sum() / max(flipped, 1)), "utilization": float(every["utilization"].mean()),
            "utilization_p5": float(np.quantile(every["utilization"], 0.05)), "forced": float(every["forced"].mean()),
            "refocuses": len(every["swap_rate"])}


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of a run with --mc_enabled=1 on text")
    parser.add_argument("--data", default="",
                        help="what is read: stdlib, or a directory of texts; empty: what the model was trained on")
    parser.add_argument("--tokens", type=int, default=16384, help="length of a stream [tokens]")
    parser.add_argument("--streams", type=int, default=4, help="streams, from the start of the held-out text on")
    parser.add_device()
    session_config.add_flags(parser, budget=256)


def run(args: argparse.Namespace) -> None:
    args.device = pick_device(args.device)
    gpt, meta = load_model(args.checkpoint_dir, device=args.device)
    pool = sessions.open_pool(gpt, meta, args.checkpoint_dir, session_config.from_flags(args))
    begin = 2 * pool.focus_config.budget
    if args.streams < 1 or args.tokens <= begin:
        raise UserError(f"--streams={args.streams} --tokens={args.tokens}: at least one stream, longer than twice the "
                        f"budget of {pool.focus_config.budget}")
    tokens = open_token_cache(open_corpus(args.data or meta["flags"]["data"], meta["flags"]["text_column"]), "val",
                              Tokenizer.load()).tokens
    if len(tokens) < args.streams * args.tokens:
        raise UserError(f"--streams={args.streams} --tokens={args.tokens}: the held-out text has {len(tokens):,} "
                        "tokens; lower one of them")
    progress, streams = Progress("streams", args.streams, "streams", every_s=15), []
    for s in range(args.streams):
        text = torch.from_numpy(tokens[s * args.tokens:(s + 1) * args.tokens].astype(np.int64))
        streams.append(read_stream(pool, text, begin))
        progress.update(s + 1)
    out = stream_summary(streams)
    nll = np.array([s.nll for s in streams])
    windows = args.tokens / pool.focus_config.budget
    print(f"{len(streams)} streams of {args.tokens:,} tokens, {windows:g} budgets of {pool.focus_config.budget} "
          f"entries; {out['refocuses']} refocuses")
    for name, value in out.items():
        print(f"  {name:16s} {value:.4g}")
    print_json({"tokens": args.tokens, "budget": pool.focus_config.budget, "interval": pool.interval,
                "block_size": pool.focus_config.block_size,
                **out, "nll_interval": bootstrap_interval(lambda i: nll[i].mean(), len(nll)),
                "nll_by_stream": nll.round(5).tolist()})
