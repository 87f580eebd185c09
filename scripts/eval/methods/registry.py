"""All systems by name, and what they read with from a checkpoint."""

from pathlib import Path

import torch

from mc.model import load_mega_context
from nanochat.common import UserError
from nanochat.loading import load_model
from scripts.eval.methods import gists
from scripts.eval.methods import token_classifier as keep_drop
from scripts.eval.methods import kv
from scripts.eval.methods import raw
from scripts.eval.methods import token_drop
from scripts.eval.methods.interface import Models, Method, again

INTERVALS = (1, 4, 8, 16, 32)  # tokens between two looks of "gists_lens_again", "gists_lens_again_4", …

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (
    raw.FullContext, raw.SlidingWindow, again(raw.SlidingWindow), raw.WindowAndSinks, raw.RandomBlocks, raw.BM25Blocks, again(raw.BM25Blocks),
    raw.MeanEmbeddingBlocks, raw.LearnedRetrieverBlocks, again(raw.LearnedRetrieverBlocks),
    token_drop.SurprisalDrop, keep_drop.LearnedDrop,
    gists.MeanGists, gists.EvenGists, gists.RecencyGists, gists.RandomGists, gists.LensGists,
    *(again(gists.LensGists, interval) for interval in INTERVALS), gists.OracleGists, kv.SnapKV, kv.Quest)}


def method_named(name: str) -> type[Method]:
    """UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    return METHODS[name]


def make_method(name: str, models: Models, budget: int, seed: int = 0) -> Method:
    """UserError for an unknown name, or what the system refuses."""
    return method_named(name)(models, budget, seed)


def load_models(checkpoint_dir: Path | str, step: int | str = "latest", device: torch.device | str = "cpu",
                keep_drop_file: Path | str = "") -> tuple[Models, dict]:
    """(what the checkpoint holds, its meta). The classifier: of `keep_drop_file`, or else the one beside the checkpoint, if any."""
    gpt, meta = load_model(checkpoint_dir, step, device)
    mc = load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd, device) if meta.get("mc") else None
    beside = Path(checkpoint_dir) / keep_drop.FILE
    file = Path(keep_drop_file) if keep_drop_file else beside if beside.exists() else None
    return Models(gpt, mc, keep_drop.load_token_classifier(file, device) if file else None), meta
