"""All systems by name."""

from mc.systems import gists, kv, raw, token_drop
from mc.systems.interface import Models, System
from nanochat.common import UserError

SYSTEMS: dict[str, type[System]] = {kind.name: kind for kind in (
    raw.FullContext, raw.SlidingWindow, raw.WindowAndSinks, raw.RandomBlocks, raw.BM25Blocks, raw.MeanEmbeddingBlocks, raw.LearnedRetrieverBlocks,
    token_drop.SurprisalDrop, gists.MeanGists, gists.EvenGists, gists.RecencyGists, gists.RandomGists, gists.LensGists, gists.OracleGists, kv.SnapKV, kv.Quest)}


def make_system(name: str, models: Models, budget: int, seed: int = 0) -> System:
    """UserError for an unknown name, or what the system refuses."""
    if name not in SYSTEMS:
        raise UserError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name](models, budget, seed)
