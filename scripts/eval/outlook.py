"""What sessions of a model will show of a history that its budget does not tile: said when its training starts."""

from collections.abc import Sequence
from dataclasses import replace

from mc.focus_allocator import FocusConfig
from mc.session.refocus import PathEdits


def outlook(cfg: FocusConfig, n_tokens: int) -> str:
    """What a session of about n_tokens shows with as many blocks raw as it can, as a phrase: ranges over
    a block's worth of lengths."""
    K, raw, gists, omitted = cfg.block_size, [], [], []
    for n in range(n_tokens, n_tokens + K):
        edits, count = PathEdits(cfg), cfg.budget // K
        blocks = {(2 * i + 1) * (n // K) // (2 * count) for i in range(count)}  # spread over the history
        edits.advance(n, blocks)
        edits.refocus(dict.fromkeys(blocks, 1.0))
        lod, _ = edits.cut()
        raw.append(int((lod == 0).sum()))
        gists.append(int((lod > 0).sum()))
        omitted.append(1 - int((K**lod).sum()) / n)
    (r0, r1), (g0, g1), (o0, o1) = ((min(x), max(x)) for x in (raw, gists, omitted))
    return (f"{r0}-{r1} raw tokens and {g0}-{g1} gists in {cfg.budget} entries, {o0:.1%}-{o1:.1%} of the history left "
            "out and searched all the same")


def session_note(cfg: FocusConfig, trained_lods: Sequence[int]) -> str:
    """In a line, what sessions of a model will show of a history of 1,048,576 tokens, with default
    settings. cfg: of its training."""
    top = next((lod - 1 for lod in range(1, cfg.max_lod + 1) if lod not in trained_lods), cfg.max_lod)
    return (f"sessions: gists of LOD1 to LOD{top} are trained; of 1,048,576 tokens they show "
            f"{outlook(replace(cfg, max_lod=top, n_gists=1), 2**20)}")
