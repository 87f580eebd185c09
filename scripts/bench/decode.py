"""Decoding over long histories, MegaContext beside vanilla.

Same weights, in one process: ingest, time per generated token and device memory against the length of the history.
Vanilla is the full KV cache with windows lifted. Machines are shared and noisy, so the lengths and both systems take
turns, one refocus interval each, and what is reported are ratios of neighbours: medians over
rounds, with a bootstrap interval.

Vanilla reads its history up to --vanilla_prefill tokens; for longer ones its cache is filled with copies of those keys
and values, on which the time of a decode step does not depend.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.session import config as session_config
from mc.session import session as sessions
from mc.store.disk.store import DiskStore
from mc.store.history import store_format
from mc.store.ram import Store
from nanochat.common import FlagParser, UserError, base_dir, pick_device
from nanochat.dataloader import source_of
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.loading import load_model
from nanochat.outputs import output_folder, write_file
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import TRAINED_WITH_MC, print_json
from scripts.eval.figures import BLUE, VERMILION, new_figure, save_figure
from scripts.eval.statistics import median_interval

LENGTHS = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576, 10_485_760)
CONTROLLER = ("lens", "allocator")
LABELS = {"mc": "MegaContext", "mc_disk": "MegaContext, history on disk", "vanilla": "vanilla, full KV cache"}


def history_tokens(meta: dict, tokenizer: Tokenizer, n: int) -> Tensor:
    """int64 [n] tokens of the kind that the model was trained on: its rows one after the other."""
    T = meta["model_config"]["sequence_len"]
    source = source_of(meta, "train", tokenizer=tokenizer)
    rows, parts = 256, []
    while len(parts) * rows * T < n:
        parts.append(source.row_tokens(np.arange(len(parts) * rows, (len(parts) + 1) * rows))[0][:, :T].ravel())
    return torch.from_numpy(np.concatenate(parts)[:n])


@dataclass
class Measured:
    """One system at one length: seconds per token [rounds, interval], and what it took to get there."""

    tokens_per_second: float | None  # of reading the history; None: not measured
    bytes: int
    seconds: list[list[float]] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # seconds per token
    host_bytes: int = 0
    omitted: int = 0  # tokens of the history in no entry

    @property
    def per_round(self) -> np.ndarray:
        """[rounds] mean seconds per token of each round, a refocus included."""
        return np.array(self.seconds).mean(1)

    def summary(self) -> dict:
        flat = 1e3 * np.array(self.seconds)
        return {"tokens_per_second": self.tokens_per_second, "bytes": self.bytes, "host_bytes": self.host_bytes,
                "omitted_tokens": self.omitted, "median_ms": float(np.median(flat)),
                "p95_ms": float(np.quantile(flat, 0.95)), "mean_ms": float(np.median(flat.mean(1))),
                "parts_ms": {k: 1e3 * v for k, v in self.parts.items()}}


class Vanilla:
    """Greedy decoding with a KV cache that holds the whole history."""

    def __init__(self, gpt: GPT, history_N: Tensor, new_tokens: int, prefill: int):
        self.gpt, n = gpt, len(history_N)
        self.cache = KVCache(gpt.config, 1, n + new_tokens, gpt.lm_head.weight.device, gpt.lm_head.weight.dtype)
        begin, read = time.perf_counter(), min(n, prefill)
        with torch.inference_mode():
            for piece in history_N[:read].to(gpt.lm_head.weight.device).split(512):
                hidden = gpt.hidden(piece[None], cache=self.cache, lift_windows=True)
            self.next = gpt.logits(hidden[:, -1]).argmax(-1)
        rate = read / (time.perf_counter() - begin) if read == n else None
        for name in ("k", "v", "k_unshifted", "x_unsmeared"):
            if (buffer := getattr(self.cache, name)) is not None:
                dim = 1 if name == "x_unsmeared" else 2
                for start in range(read, n, read):
                    count = min(read, n - start)
                    buffer.narrow(dim, start, count).copy_(buffer.narrow(dim, 0, count))
        self.cache.lengths = self.cache.lengths + n - read
        self.cache.used = n
        # of the other buffers it needs the last entry only
        self.measured = Measured(rate, (self.cache.k.nbytes + self.cache.v.nbytes) * n // (n + new_tokens))

    @torch.inference_mode()
    def generate(self, count: int) -> list[float]:
        """Seconds of each token."""
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            hidden = self.gpt.hidden(self.next[:, None], cache=self.cache, lift_windows=True)
            self.next = self.gpt.logits(hidden[:, -1]).argmax(-1)
            int(self.next)
            seconds.append(time.perf_counter() - begin)
        return seconds


def held_bytes(root, *apart) -> int:
    """Bytes of all tensors that an object holds, through its attributes and containers;
    what `apart` hold is left out."""
    def storages(objects, seen: set[int]) -> dict[int, int]:
        found: dict[int, int] = {}
        left = list(objects)
        while left:
            item = left.pop()
            if id(item) in seen or isinstance(item,
                                              (type, str, bytes, int, float)) or callable(item) and not hasattr(item,
                                                                                                                "__dict__"):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                left += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple, set, frozenset)):
                left += item
            elif hasattr(item, "__dict__"):
                left += vars(item).values()
        return found

    seen: set[int] = set()
    storages(apart, seen)
    return sum(storages([root], seen).values())


def device_bytes(session: sessions.Session) -> int:
    """What inference holds beside the base's weights and the host's store and index, and the most
    that a pass needs for a moment."""
    pool = session.pool
    return held_bytes(pool, pool.gpt, session.history.store, session.search) + pool.pass_bytes


def host_bytes(session: sessions.Session) -> int:
    """Bytes of a history: token ids, gists and lens keys as records, and the search's index as it is held."""
    f, store = session.history.store.format, session.history.store
    size = torch.finfo(f.read_dtype).bits // 8
    nodes = sum(session.history.shape.counts[1:])
    records = 8 * store.n_tokens + size * (nodes * f.d_model + store.n_nodes(1) * f.n_keys * f.key_dim)
    return records + held_bytes(session.search, store, session.pool.mc)


class InSession:
    """Greedy decoding in a session of its own."""

    def __init__(self, pool: sessions.SessionPool, history_N: Tensor, store: Store | None = None):
        self.pool, self.session = pool, pool.open(store)
        begin = time.perf_counter()
        self.session.begin(history_N)
        rate = len(history_N) / (time.perf_counter() - begin)
        self.generate(2 * pool.interval)
        self.measured = Measured(rate, device_bytes(self.session), host_bytes=host_bytes(self.session))
        pool.timing.seconds.clear()
        pool.timing.synchronize = True

    def generate(self, count: int) -> list[float]:
        """Seconds of each token."""
        seconds, steps = [], self.session.generate(count, temperature=0)
        for _ in range(count):
            begin = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - begin)
        return seconds


def measure_decoding(pool_of, gpt: GPT, history_N: Tensor, lengths: list[int], *, rounds: int, vanilla_longest: int,
                     vanilla_prefill: int,
            disk: Path | None) -> dict[int, dict[str, Measured]]:
    """Every length and all systems in turn. pool_of() makes a pool for one session; disk: a folder
    for sessions on disk stores."""
    running: dict[int, dict] = {}
    for n in lengths:
        systems = running[n] = {"mc": InSession(pool_of(), history_N[:n])}
        if disk:
            pool = pool_of()
            systems["mc_disk"] = InSession(pool, history_N[:n],
                                           DiskStore.create(disk / str(n), store_format(gpt, pool.mc)))
        if n <= vanilla_longest:
            systems["vanilla"] = Vanilla(gpt, history_N[:n], (rounds + 1) * systems["mc"].pool.interval,
                                         vanilla_prefill)
            systems["vanilla"].generate(systems["mc"].pool.interval)
        rates = {name: system.measured.tokens_per_second for name, system in systems.items()}
        print(f"{n:>10,} tokens read: " + ", ".join(f"{LABELS[name]} {rate:,.0f} tokens/s"
                                                    for name, rate in rates.items() if rate), flush=True)
    for _ in range(rounds):
        for systems in running.values():
            for system in systems.values():
                system.measured.seconds.append(system.generate(systems["mc"].pool.interval))
    for systems in running.values():
        for name in systems.keys() & {"mc", "mc_disk"}:
            pool, systems[name].measured.omitted = systems[name].pool, systems[name].session.omitted_tokens
            systems[name].measured.parts = {part: seconds / (rounds * pool.interval)
                                            for part, seconds in sorted(pool.timing.seconds.items())}
    return {n: {name: system.measured for name, system in systems.items()} for n, systems in running.items()}


def ratio(over: Measured, under: Measured) -> dict[str, float]:
    """Median over rounds of the ratio of neighbours, with a 95 % bootstrap interval."""
    ratios = over.per_round / under.per_round
    low, high = median_interval(ratios)
    return {"ratio": float(np.median(ratios)), "low": low, "high": high}


def crossover(results: dict[int, dict[str, Measured]]) -> int | None:
    """Tokens of history from which on MegaContext is faster, interpolated in log length; None: nowhere measured."""
    points = [(n, float(np.log(np.median(r["vanilla"].per_round / r["mc"].per_round)))) for n, r in results.items()
              if "vanilla" in r]
    for (n0, y0), (n1, y1) in zip([(points[0][0], points[0][1]), *points], points):
        if y1 >= 0:
            return n1 if y0 >= 0 else int(n0 * (n1 / n0) ** (-y0 / (y1 - y0)))
    return None


def decoding_report(results: dict[int, dict[str, Measured]], facts: dict) -> dict:
    least, most = min(results, key=lambda n: abs(n - 4096)), max((n for n in results if n <= 2 ** 20),
                                                                 default=max(results))
    share = {n: sum(r["mc"].parts.get(part, 0) for part in CONTROLLER) / r["mc"].per_round.mean()
             for n, r in results.items()}
    speedups = {n: ratio(r["vanilla"], r["mc"]) for n, r in results.items() if "vanilla" in r}
    times = ratio(results[most]["mc"], results[least]["mc"])
    return {"time_ratio_1m_over_4k": times["ratio"], "time_ratio_interval": [times["low"], times["high"]],
            "ratio_lengths": [most, least],
            "memory_ratio_1m_over_4k": results[most]["mc"].bytes / results[least]["mc"].bytes,
            "speedup_64k": speedups[65_536]["ratio"] if 65_536 in speedups else None,
            "controller_share": max(share.values()), "crossover_tokens": crossover(results) if speedups else None,
            "disk_over_ram": ratio(results[most]["mc_disk"], results[most]["mc"]) if "mc_disk" in results[most]
            else None, **facts,
            "curve": [{"history": n, "controller_share": share[n], "speedup": speedups.get(n),
                       **{name: m.summary() for name, m in r.items()}} for n, r in results.items()]}


def plot_decoding(found: dict, path: Path) -> None:
    """Time per token and device memory against length, PNG and PDF."""
    figure, (axes,) = new_figure(1, 2, width=4.5, height=3.4)
    for name, color, marker in (("mc", BLUE, "o"), ("vanilla", VERMILION, "s")):
        points = [(c["history"], c[name]) for c in found["curve"] if name in c]
        if points:
            n = [p[0] for p in points]
            axes[0].plot(n, [p[1]["mean_ms"] for p in points], color=color, marker=marker, label=LABELS[name])
            axes[0].fill_between(n, [p[1]["median_ms"] for p in points], [p[1]["p95_ms"] for p in points], color=color,
                                 alpha=0.15, lw=0)
            axes[1].plot(n, [p[1]["bytes"] / 2 ** 20 for p in points], color=color, marker=marker, label=LABELS[name])
    for axis, title in zip(axes,
                           ("ms per generated token (band: median to p95)", "device memory besides the weights [MiB]")):
        axis.set(xscale="log", yscale="log", xlabel="history [tokens]", title=title)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend()
    save_figure(figure, path)


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--longest", type=int, default=1_048_576,
                        help=f"longest history in tokens; measured are {', '.join(f'{n:,}' for n in LENGTHS)} up to it")
    parser.add_argument("--vanilla_longest", type=int, default=262_144,
                        help="longest history for vanilla: its cache grows with it")
    parser.add_argument("--vanilla_prefill", type=int, default=16_384,
                        help="history that vanilla really reads; a longer cache is filled with copies")
    parser.add_switch("--disk", False, "1: also sessions whose history is on disk, in a temporary folder")
    parser.add_argument("--rounds", type=int, default=16, help="refocus intervals timed at each length")
    parser.add_device()
    parser.add_out("folder of decode.json and the plot", "evals/decode")
    session_config.add_flags(parser, untrained="report")


def run(args: argparse.Namespace) -> None:
    lengths = [n for n in LENGTHS if n <= args.longest]
    if not lengths or args.rounds < 2 or args.vanilla_prefill < 1:
        raise UserError(f"--longest={args.longest} --rounds={args.rounds} --vanilla_prefill={args.vanilla_prefill}: at "
                        f"least {LENGTHS[0]} tokens, 2 rounds and 1 token")
    args.device = pick_device(args.device)
    gpt, meta = load_model(args.checkpoint_dir, device=args.device)
    config = session_config.from_flags(args)
    out = output_folder(args.out or base_dir() / "evals" / "decode", "decode.json", "decode.png")
    pool = sessions.open_pool(gpt, meta, args.checkpoint_dir, config)
    if pool.untrained:
        print(f"note: LOD {', '.join(map(str, pool.untrained))} were not trained; what is measured here is time and memory")  # noqa: E501
    history_N = history_tokens(meta, Tokenizer.load(), max(lengths))
    with tempfile.TemporaryDirectory() as folder:
        results = measure_decoding(lambda: sessions.open_pool(gpt, meta, args.checkpoint_dir, config), gpt, history_N,
                                   lengths, rounds=args.rounds,
                          vanilla_longest=args.vanilla_longest, vanilla_prefill=args.vanilla_prefill,
                                   disk=Path(folder) if args.disk else None)
    found = decoding_report(results, {"budget": config.budget or pool.focus_config.budget, "interval": pool.interval,
                                      "rounds": args.rounds, "kv_policy": config.kv_policy,
                             "device": args.device, "threads": torch.get_num_threads(),
                                      "untrained_lods": pool.untrained})
    print(f"{'history':>10}  {'MC ms/token':>11} {'p95':>6}  {'base':>6} {'refill':>6} {'lens':>6} {'alloc.':>6} "
          f"{'ingest':>6}  {'left out':>10}  {'vanilla':>8}  {'speed-up':>20}")
    for c in found["curve"]:
        parts, speedup = c["mc"]["parts_ms"], c["speedup"]
        print(f"{c['history']:>10,}  {c['mc']['mean_ms']:>11.2f} {c['mc']['p95_ms']:>6.2f}  "
              + " ".join(f"{parts.get(p, 0):>6.3f}"
                         for p in ("base", "refill", "lens", "allocator",
                                   "ingest")) + f"  {c['mc']['omitted_tokens']:>10,}"
              + (f"  {c['vanilla']['mean_ms']:>8.2f}  {speedup['ratio']:>5.2f} [{speedup['low']:.2f}, "
                 f"{speedup['high']:.2f}]" if speedup else ""))
    write_file(out / "decode.json", json.dumps(found, indent=1))
    plot_decoding(found, out / "decode.png")
    print(f"decode.json and the plot are in {out}")
    print_json(found)
