"""Positions of working-context entries: rotary angles at global centres, damped by the entry's width.

An entry covering tokens [s, s+n) stands at μ = s + (n−1)/2 with variance σ² = (n²−1)/12 (a uniform span; zero for a raw token,
so raw entries are rotated exactly as in the base). The expectation of the rotation e^{iωp} over a Gaussian span is
e^{iωμ}·e^{−ω²σ²/2}: a wide entry loses its high-frequency phase (the damping of a Gaussian's characteristic function). It is
applied after QK-norm, in the same table as the rotation, so the norm cannot undo it. `floor` keeps a share of every
frequency: at LOD4 the rotated part would vanish and its keys go blind.

Angles are taken in float64 at global positions: 1e-9 rad at ten million tokens, where float32 is wrong by half a radian.

Shapes: B rows, W entries, F = head width / 2 frequencies.
"""

import torch
from torch import Tensor

from nanochat.gpt import GPT

SCHEMES = ("gaussian", "centre", "contiguous")


def damping(length_BW: Tensor, inverse_frequencies_F: Tensor, floor: float) -> Tensor:
    """[B, W, F] float64 factor in [floor, 1]; exactly 1 where length is 1."""
    variance = (length_BW.double().square() - 1) / 12
    damped = torch.exp(-0.5 * variance[..., None] * inverse_frequencies_F.square())
    return floor + (1 - floor) * damped


def entry_rotary(gpt: GPT, start_BW: Tensor, length_BW: Tensor, *, scheme: str = "gaussian", floor: float = 0.1,
                 lod_axis: bool = False, lod_BW: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """cos, sin [B, W, 1, F] for entries covering [start, start+length), in the dtype `gpt.rotary` gives.

    scheme: "gaussian" (centre and damping), "centre" (no damping), "contiguous" (entries numbered in order, ending at the
    global position of the last: what published systems with compressed entries do).
    lod_axis: the pairs that partial RoPE leaves unrotated turn by the entry's LOD instead, one radian per level at the first
    of them and falling like the token frequencies; raw entries (LOD 0) stay as in the base.
    """
    centre = start_BW.double() + (length_BW.double() - 1) / 2
    frequencies = gpt.inverse_frequencies(start_BW.device)
    if scheme == "contiguous":
        order = torch.arange(start_BW.shape[1], device=start_BW.device, dtype=torch.float64)
        last = ((length_BW > 0).sum(1, keepdim=True) - 1).clamp_min(0)
        centre = centre.gather(1, last) + order - last
    angle = centre[..., None] * frequencies
    if lod_axis:
        unrotated = frequencies == 0
        rank = (unrotated.cumsum(0) - 1).clamp_min(0).double()
        lod_frequencies = unrotated * gpt.config.rope_base ** (-rank / unrotated.sum().clamp_min(1))
        angle = angle + lod_BW.double()[..., None] * lod_frequencies
    amplitude = damping(length_BW.clamp_min(1), frequencies, floor) if scheme == "gaussian" else 1.0
    dtype = torch.float64 if gpt.lm_head.weight.dtype == torch.float64 else torch.float32
    return (angle.cos() * amplitude).to(dtype).unsqueeze(2), (angle.sin() * amplitude).to(dtype).unsqueeze(2)


def alibi_slopes(n_head: int, device=None) -> Tensor:
    """[H] float64 logits per token of distance: m_h = 2^(−8(h+1)/H) (ALiBi, arXiv 2108.12409)."""
    return 2.0 ** (-8.0 * torch.arange(1, n_head + 1, device=device, dtype=torch.float64) / n_head)


def alibi_bias(start_BW: Tensor, length_BW: Tensor, cursor_B: Tensor, n_head: int) -> Tensor:
    """[B, H, W] logit bias −m_h·(cursor − centre): ALiBi for entries.

    A bias that falls linearly with the distance to the query differs from one measured to a fixed cursor by a constant per
    query, which the softmax ignores, so one bias per key serves all queries.
    """
    centre = start_BW.double() + (length_BW.double() - 1) / 2
    slopes_H = alibi_slopes(n_head, start_BW.device)
    return (slopes_H[None, :, None] * (centre - cursor_B[:, None])[:, None])
