"""A history on disk, filled from real files: what keeping it costs beside computing it, how fast it
opens and reads, what 8 bits cost.

Machines are shared and noisy, so the store's overhead is a ratio of neighbours: every few batches the same tokens go
through GistNet and lens keys without any store, just before they are ingested. Gathers take turns with fancy indexing
of a numpy.memmap that holds the same records in one file.

Shapes: N tokens or nodes, D width, B rows.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.mega_context import build_tree
from mc.store.catalog import open_history
from mc.store.disk.store import DiskStore
from mc.store.edits import edit_source
from mc.store.history import BATCH_BLOCKS, MAX_BLOCKS, History
from mc.store.ingest import Ingest, find_files, texts_of
from mc.store.networks import Networks, load_networks
from mc.store.ram import VOID, StoreFormat, int8_rows
from nanochat.checkpoint import load_model_state
from nanochat.common import FlagParser, UserError
from nanochat.dataloader import eval_rows, judged_rows, source_of
from nanochat.dataset import Progress
from scripts.bench.base import TRAINED_WITH_MC, print_json
from scripts.eval.comparison import FocusComparison
from scripts.eval.statistics import bootstrap_interval, median_interval

COMPARED_EVERY = 2  # batches: one in so many is also computed without a store
GATHERED, GATHERS = 256, 2000
STORED = (torch.bfloat16, torch.float16, torch.int8)


def bytes_per_slot(format: StoreFormat, max_lod: int) -> float:
    """Of records: 4 for the token, and each level's gists and keys divided by the tokens that a node covers."""
    f, scale = format, 4 if format.dtype == torch.int8 else 0
    gist, keys = f.dtype.itemsize * f.d_model + scale, f.n_keys * (f.dtype.itemsize * f.key_dim + scale)
    return 4 + keys / f.block_size + sum(gist / f.block_size**lod for lod in range(1, max_lod + 1))


class MeasuredIngest(Ingest):
    """Counts seconds of every commit, and of the same tokens without a store every few commits."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stored: list[tuple[float, float]] = []  # wall and processor seconds of a commit
        self.alone: list[tuple[int, float, float]] = []  # which one, and the same without a store

    def _write(self) -> None:
        commit, write = len(self.stored), super()._write
        compared = self._slots and commit and commit % COMPARED_EVERY == 0  # the first one warms up
        slots_N = torch.cat(self._slots) if compared else None
        for alone in (True, False) if commit // COMPARED_EVERY % 2 else (False, True):
            if not alone:
                self.stored.append(_seconds(write))
            elif compared:
                self.alone.append((commit, *_seconds(lambda: compute(self.history, slots_N))))


def _seconds(work) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


@torch.no_grad()
def compute(history: History, slots_N: Tensor) -> None:
    """All nodes of a batch of whole blocks, and the lens keys; kept nowhere."""
    gpt, mc, K = history.gpt, history.mc, history.block_size
    made = []
    for ids_NK in slots_N[: len(slots_N) // K * K].view(-1, K).split(MAX_BLOCKS):
        valid_NK = ids_NK != VOID
        embeds_NKD = gpt.embed(ids_NK.clamp_min(0)) * valid_NK[..., None]
        mc.lensnet.keys(embeds_NKD.flatten(0, 1)[None])
        made.append(mc.gistnet(embeds_NKD, valid_NK, 1)[:, 0])
    level_ND = torch.cat(made)
    for lod in range(2, history.max_lod + 1):
        level_ND = mc.gistnet(level_ND[: len(level_ND) // K * K].view(-1, K, level_ND.shape[1]), None, lod)[:, 0]


def ingest(networks: Networks, folder: Path, text: Path, tokens: int) -> dict:
    """Fill a new store with at least `tokens` tokens of the files below `text`."""
    history, catalog = open_history(networks.gpt, networks.mc, "disk", folder)
    catalog.add_version(networks.fingerprint, networks.origin)
    work = MeasuredIngest(history, catalog, networks.tokenizer)
    progress, begin = Progress("ingest", tokens, "tokens", every_s=30), time.perf_counter()
    for path in find_files([text]):
        for document in texts_of(path):
            work.add(document)
        progress.update(work.report.tokens)
        if work.report.tokens >= tokens:
            break
    else:
        raise UserError(f"--texts={text} holds {work.report.tokens:,} tokens, --tokens={tokens:,} asks for more")
    work.finish()
    closing = _seconds(lambda: (history.store.close(), catalog.close()))
    wall = time.perf_counter() - begin - sum(seconds for _, seconds, _ in work.alone)
    stored, alone = np.array(work.stored[:-1]), np.array(work.alone)
    alone = alone[alone[:, 0] < len(stored)]  # the last batch is not full
    pairs = stored[alone[:, 0].astype(int)] / alone[:, 1:]
    return {
        "tokens": work.report.tokens,
        "slots": history.n_tokens,
        "sources": work.report.sources,
        "text_bytes": work.report.bytes,
        "wall_s": wall,
        "tokens_per_s": work.report.tokens / wall,
        "commit_share_of_wall": (stored[:, 0].sum() + closing[0]) / wall,
        "gistnet_alone_tokens_per_s": work.limit / float(np.median(alone[:, 1])),
        "commit_tokens_per_s": work.limit / float(np.median(stored[:, 0])),
        "pairs": len(pairs),
        "store_over_alone_wall": [float(np.median(pairs[:, 0])), *median_interval(pairs[:, 0])],
        "store_over_alone_processor": [float(np.median(pairs[:, 1])), *median_interval(pairs[:, 1])],
    }


def opening(networks: Networks, folder: Path, times: int = 7) -> dict:
    """Seconds to open, median and most: for reading, and for writing with the catalog brought into agreement."""

    def write() -> None:
        history, catalog = open_history(networks.gpt, networks.mc, "disk", folder)
        history.store.close(), catalog.close()

    read = [_seconds(lambda: DiskStore.open(folder, "r").close())[0] for _ in range(times)]
    both = [_seconds(write)[0] for _ in range(times)]
    return {"times": times, "read_s": [float(np.median(read)), max(read)],
            "write_and_catalog_s": [float(np.median(both)), max(both)]}


def gathering(folder: Path, scratch: Path) -> dict:
    """Seconds of a gather of 256 random LOD1 gists from a warm cache, the store and numpy.memmap in turns."""
    with DiskStore.open(folder, "r") as store:
        n, D = store.n_nodes(1), store.format.d_model
        flat = np.memmap(scratch, np.float32, "w+", shape=(n, D))
        for index_N in torch.arange(n).split(1 << 16):
            flat[index_N.numpy()] = store.gists(1, index_N).float()
        flat.flush()
        flat = np.memmap(scratch, np.float32, "r", shape=(n, D))
        rng, seconds = np.random.default_rng(0), np.zeros((GATHERS, 2))
        for row in seconds:
            index = rng.integers(0, n, GATHERED)
            index_N = torch.from_numpy(index)
            row[0] = _seconds(lambda: store.gists(1, index_N))[0]
            row[1] = _seconds(lambda: torch.from_numpy(flat[index]))[0]
    seconds = seconds[GATHERS // 10 :]
    p50, p95 = np.quantile(seconds, 0.5, axis=0), np.quantile(seconds, 0.95, axis=0)
    return {
        "nodes": GATHERED,
        "gathers": len(seconds),
        "store_us": [1e6 * p50[0], 1e6 * p95[0]],
        "memmap_us": [1e6 * p50[1], 1e6 * p95[1]],
        "ratio": [p50[0] / p50[1], p95[0] / p95[1]],
    }


def sizes(folder: Path, max_lod: int) -> dict:
    """Bytes on disk per slot and per token, against the arithmetic."""
    with DiskStore.open(folder, "r") as store:
        n, format = store.n_tokens, store.format
        records = sum(path.stat().st_blocks * 512 for path in folder.glob("[LK]*/*.ctx"))
        void = sum(int((store.tokens(index_N) == VOID).sum()) for index_N in torch.arange(n).split(1 << 20))
    catalog = sum(path.stat().st_size for path in folder.glob("catalog.sqlite*"))
    theory = bytes_per_slot(format, max_lod)
    return {
        "records": records,
        "catalog": catalog,
        "theory_per_slot": theory,
        "records_per_slot": records / n,
        "void_share": void / n,
        "records_over_theory": records / n / theory,
        "all_over_theory": (records + catalog) / n / theory,
        "all_per_token": (records + catalog) / (n - void),
    }


def editing(networks: Networks, folder: Path) -> dict:
    """A token replaced, and a block inserted, in the source in the middle of the store."""
    history, catalog = open_history(networks.gpt, networks.mc, "disk", folder)
    found = {}
    with catalog, history.store:
        source = catalog.sources_in(history.n_tokens // 2, history.n_tokens, history.store)[0]
        ids_N = torch.arange(history.block_size) + 1
        for name, removed, new_N in (("replace", len(ids_N), ids_N), ("insert", 0, ids_N)):
            before = history.store.disk_bytes()
            report = edit_source(history, catalog, source.id, 1, removed, new_N)
            found[name] = {
                "recomputed": report.recomputed,
                "moved": report.moved,
                "record_bytes": report.record_bytes,
                "seconds": report.seconds,
                "file_bytes": history.store.disk_bytes() - before,
            }
        found["compact_s"] = _seconds(history.store.compact)[0]
    return found


@torch.no_grad()
def stored_dtypes(networks: Networks, checkpoint_dir: Path, contexts: int, batch: int = 16) -> dict:
    """What keeping gists in fewer bits than float32 adds to ΔNLL [nats]: held-out rows, their history
    as gists, recent tokens raw."""
    _, meta = load_model_state(checkpoint_dir)
    gpt, mc, c = networks.gpt, networks.mc, networks.mc.config
    T = gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    source = source_of(meta, "val", tokenizer=networks.tokenizer)
    contexts = eval_rows(source, contexts * T)
    nll: dict[tuple[str, int], list[Tensor]] = {}
    for first in range(0, contexts, batch):
        rows = np.arange(first, min(first + batch, contexts))
        tokens, targets = (x[:, :n + c.horizon] for x in judged_rows(source, rows))
        focus = FocusComparison(gpt, mc, tokens, targets, n, 0, torch.from_numpy(rows))
        for dtype in (torch.float32, *STORED):
            focus.tree = build_tree(focus.embeds, lambda x, m, lod: as_stored(mc.gistnet(x, m, lod), dtype),
                                    c.block_size, c.max_lod)
            for lod in range(1, c.max_lod + 1):
                nll.setdefault((str(dtype).removeprefix("torch."), lod), []).append(focus.at_lod(lod).nll_B.double())
    found: dict = {"contexts": contexts, "tokens_each": c.horizon}
    for (name, lod), parts in nll.items():
        nll_B, exact_B = torch.cat(parts).numpy(), torch.cat(nll["float32", lod]).numpy()
        delta_B = nll_B - exact_B
        found[f"{name} LOD{lod}"] = {
            "nll": float(nll_B.mean()),
            "added": float(delta_B.mean()),
            "interval": bootstrap_interval(lambda i: delta_B[i].mean(), len(delta_B)),
        }
    return found


def as_stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors as a store of this dtype gives them back."""
    if dtype == torch.int8:
        rows, scale = int8_rows(x)
        return (rows * scale).to(x.dtype)
    return x.to(dtype).to(x.dtype)


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--texts", type=Path, required=True,
                        help="folder of text files, e.g. what runs/fetch_text.sh fetches")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens of history to ingest")
    parser.add_argument(
        "--dir",
        type=Path,
        help="where the store is written, and removed at the end (needs about 90 bytes a token, twice); default: a "
             "temporary folder",
    )
    parser.add_argument("--contexts", type=int, default=128,
                        help="held-out rows for what fewer bits cost; 0: leave that out")


def run(args: argparse.Namespace) -> None:
    if args.tokens < 1 or args.contexts < 0:
        raise UserError(f"--tokens={args.tokens} --contexts={args.contexts}: at least 1 and 0")
    networks = load_networks(args.checkpoint_dir)
    least = (2 * COMPARED_EVERY + 2) * BATCH_BLOCKS * networks.mc.config.block_size
    if args.tokens < least:
        raise UserError(f"--tokens={args.tokens:,}: at least {least:,}, a few batches to compare")
    found = {}
    if args.contexts:
        found["stored_dtypes"] = stored_dtypes(networks, args.checkpoint_dir, args.contexts)
        for name, row in found["stored_dtypes"].items():
            if isinstance(row, dict):
                print(
                    f"history as {name}: NLL {row['nll']:.4f}, added {row['added']:+.5f} "
                    f"[{row['interval'][0]:+.5f}, {row['interval'][1]:+.5f}]"
                )
    folder = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        found["ingest"] = ingest(networks, folder / "store", args.texts, args.tokens)
        i = found["ingest"]
        ratio = i["store_over_alone_wall"]
        print(
            f"{i['tokens']:,} tokens of {i['sources']:,} sources in {i['wall_s']:.0f} s: {i['tokens_per_s']:,.0f} "
            "tokens/s, "
            "tokenizing included; "
            f"with store / GistNet alone {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}], {i['pairs']} pairs",
            flush=True,
        )
        found["opening"] = opening(networks, folder / "store")
        found["sizes"] = sizes(folder / "store", networks.mc.config.max_lod)
        found["gathering"] = gathering(folder / "store", folder / "flat")
        found["editing"] = editing(networks, folder / "store")
        o, s, g = found["opening"], found["sizes"], found["gathering"]
        print(
            f"opening {o['read_s'][0] * 1e3:.1f} ms to read, {o['write_and_catalog_s'][0] * 1e3:.0f} ms to write "
            f"with the catalog (medians of {o['times']})"
        )
        print(
            f"{s['records_per_slot']:.2f} bytes per slot, {s['records_over_theory']:.4f} of the arithmetic, "
            f"{s['all_over_theory']:.4f} with the catalog"
        )
        print(
            f"gather of {g['nodes']} gists: p50 {g['store_us'][0]:.0f} µs, p95 {g['store_us'][1]:.0f} µs; of "
            "numpy.memmap's "
            f"{g['ratio'][0]:.2f} and {g['ratio'][1]:.2f}"
        )
        print(f"edits in the middle: {json.dumps(found['editing'])}", flush=True)
    finally:
        shutil.rmtree(folder)
    print_json(found)
