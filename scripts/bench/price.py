"""The learned price of `--mc_allocator=threshold:a,b,c`: three scalars, fitted to what showing a block is worth.

    price = a + b · best logit + c · market price        (`mc.session.price`)

At one query per refocus, each block is worth u nats to the next `interval` tokens (gate gradient of the
full pass), and the place it takes
κ: the mean worth of the last block that the lens fits in. Showing what lies above the price gains Σ (u − κ) over those
blocks; the fit minimizes its convex bound Σ |u − κ| · softplus(−sign(u − κ) · (logit − price)). Half of the rows are
fitted, the other half judge.

Shapes: B rows, Q refocuses of a row, N blocks, X = B · Q.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mc.focus_allocator import FocusConfig
from mc.model import MegaContext, load_mega_context
from mc.session.price import MARKET, Allocator, room
from mc.store.history import check_sessions
from mc.teachers import gate_utility, keep_gradients, over_horizon
from nanochat.common import UserError
from nanochat.dataloader import judged_rows, source_of
from nanochat.gpt import GPT, Captured, token_losses
from nanochat.loading import load_model
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import add_checkpoint_flag, add_device_flag, check_device, print_json
from scripts.eval.statistics import bootstrap_interval


class Examples(NamedTuple):
    logits_XN: Tensor  # of the lens, float64; −inf where a block is no rival
    utility_XN: Tensor  # nats, float64
    room_X: Tensor  # blocks that the budget holds

    @staticmethod
    def cat(parts: list["Examples"]) -> "Examples":
        return Examples(*map(torch.cat, zip(*parts)))

    def place(self) -> float:
        """κ [nats]: mean worth of the block to which the lens gives the last place; at least 0."""
        order_XN = self.logits_XN.argsort(1, descending=True)
        last_X1 = order_XN.gather(1, (self.room_X - 1).clamp(max=order_XN.shape[1] - 1)[:, None])
        return max(float(self.utility_XN.gather(1, last_X1).mean()), 0.0)


def refocus_examples(gpt: GPT, mc: MegaContext, cfg: FocusConfig, tokens_BT: Tensor, targets_BT: Tensor,
                     interval: int) -> Examples:
    """Of the second half of each row, one query every `interval` tokens."""
    T, K, every = tokens_BT.shape[1], cfg.block_size, slice(None)
    captured: list[Captured] = []
    queries, cursors = slice(T // 2, T), range(T // 2 + 1, T - interval + 2, interval)
    embeds = gpt.embed(tokens_BT).detach().requires_grad_()
    hidden = gpt.hidden(tokens_BT, inputs_embeds=embeds, capture=captured, lift_windows=True)
    keep_gradients(captured)
    # leaves the gradient at every attention output
    torch.autograd.grad(token_losses(gpt.logits(hidden), targets_BT).sum(), embeds)
    count = (T - cfg.recent) // K
    with torch.no_grad():
        utility = over_horizon(gate_utility(captured, every, queries, count, K), interval)[:, ::interval]
        seen = [mc.lens_logits(embeds[:, :n], torch.full((len(embeds),), n, device=embeds.device))[:, :count]
                for n in cursors]
        logits = torch.stack([F.pad(x, (0, count - x.shape[1])) for x in seen], 1)
    cursor_Q = torch.tensor(cursors, device=tokens_BT.device)
    rival_QN = (torch.arange(count, device=tokens_BT.device) + 1) * K <= cursor_Q[:, None] - cfg.recent
    return Examples(logits.double().masked_fill(~rival_QN, -torch.inf).flatten(0, 1).cpu(),
                    utility.double().flatten(0, 1).cpu(),
                    room(cursor_Q, cfg).repeat(len(tokens_BT)).cpu())


def gained(found: Examples, weights: tuple[float, float, float], place: float) -> Tensor:
    """[X] nats: Σ (u − κ) over the blocks above the price."""
    above_XN = found.logits_XN > Allocator(weights=weights).price(found.logits_XN, found.room_X)[:, None]
    return ((found.utility_XN - place) * above_XN).sum(1)


def fit_price(found: Examples, place: float) -> tuple[float, float, float]:
    """The weights of the learned price."""
    worth_XN = (found.utility_XN - place).masked_fill(found.logits_XN.isinf(), 0)
    worth_XN = worth_XN / worth_XN.abs().mean()
    logits_XN = found.logits_XN.masked_fill(found.logits_XN.isinf(), 0)
    best_X = Allocator(weights=(0.0, 1.0, 0.0)).price(found.logits_XN, found.room_X)
    market_X = Allocator().price(found.logits_XN, found.room_X)
    features_X3 = torch.stack([torch.ones_like(best_X), best_X, market_X], 1)
    weights_3 = torch.tensor(MARKET).double().requires_grad_()
    optimizer = torch.optim.LBFGS([weights_3], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        above_XN = logits_XN - (features_X3 @ weights_3)[:, None]
        value = (worth_XN.abs() * F.softplus(-worth_XN.sign() * above_XN)).mean() + 1e-4 * (weights_3
                                                                                            - weights_3.new_tensor(MARKET)).square().sum()  # noqa: E501
        value.backward()
        return value

    optimizer.step(loss)
    a, b, c = weights_3.detach().tolist()
    return a, b, c


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_flag(parser)
    parser.add_argument("--rows", type=int, default=64, help="training rows; half are fitted, half judge")
    parser.add_argument("--batch", type=int, default=8, help="rows at a time")
    parser.add_argument("--interval", type=int, default=32, help="tokens between two refocuses")
    add_device_flag(parser)


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    gpt, meta = load_model(args.checkpoint_dir, device=args.device)
    mc = load_mega_context(args.checkpoint_dir, meta["step"], meta, gpt.config.n_embd, args.device)
    check_sessions(mc)
    T = gpt.config.sequence_len
    if args.rows < 2 or args.batch < 1 or not 1 <= args.interval <= T // 2:
        raise UserError(f"--rows={args.rows} --batch={args.batch} --interval={args.interval}: at least 2, 1, and 1 to "
                        f"{T // 2}")
    source = source_of(meta, "train", tokenizer=Tokenizer.load())
    parts = []
    for first in range(0, args.rows, args.batch):
        tokens, targets = (x.to(args.device)
                           for x in judged_rows(source, np.arange(first, min(first + args.batch, args.rows))))
        parts.append(refocus_examples(gpt, mc, mc.focus_config(), tokens, targets, args.interval))
    every, half = Examples.cat(parts), sum(len(p.room_X) for p in parts) // 2
    fitted, judged = Examples(*(x[:half] for x in every)), Examples(*(x[half:] for x in every))
    place = fitted.place()
    weights = fit_price(fitted, place)
    market, learned = (gained(judged, w, place).numpy() for w in (MARKET, weights))
    value = "threshold:" + ",".join(f"{w:.4g}" for w in weights)
    interval = bootstrap_interval(lambda i: (learned - market)[i].mean(), len(market))
    print(f"a place is worth {place:.4f} nats; gained on {len(market)} refocuses that were not fitted: market "
          f"{market.mean():+.4f}, learned {learned.mean():+.4f} nats")
    print(f"--mc_allocator={value}")
    print_json({"allocator": value, "place": place, "refocuses": len(market), "market": float(market.mean()),
                "learned": float(learned.mean()),
                "difference_interval": interval})
