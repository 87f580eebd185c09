"""Positions of working-context entries: rotary angles at global centres, damped by the entry's width.

An entry covering tokens [s, s+n) stands at μ = s + (n−1)/2 with variance σ² = (n²−1)/12 (a uniform span; zero for a raw
token, so raw entries are rotated exactly as in the base). The expectation of the rotation e^{iωp} over a Gaussian span
is e^{iωμ}·e^{−ω²σ²/2}: a wide entry loses its high-frequency phase (the damping of a Gaussian's characteristic
function). It is applied after QK-norm, in the same table as the rotation, so the norm cannot undo it.
`floor` keeps a share of every
frequency: at LOD4 the rotated part would vanish and its keys go blind.

Angles are taken in float64 at global positions: 1e-9 rad at ten million tokens, where
float32 is wrong by half a radian.

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


def entry_rotary(gpt: GPT, start_BW: Tensor, length_BW: Tensor, *, scheme: str = "gaussian",
                 floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """cos, sin [B, W, 1, F] for entries covering [start, start+length), in the dtype `gpt.rotary` gives.

    scheme: "gaussian" (centre and damping), "centre" (no damping), "contiguous" (entries
    numbered in order, ending at the
    global position of the last: what published systems with compressed entries do).
    """
    centre = start_BW.double() + (length_BW.double() - 1) / 2
    frequencies = gpt.inverse_frequencies(start_BW.device)
    if scheme == "contiguous":
        order = torch.arange(start_BW.shape[1], device=start_BW.device, dtype=torch.float64)
        last = ((length_BW > 0).sum(1, keepdim=True) - 1).clamp_min(0)
        centre = centre.gather(1, last) + order - last
    angle = centre[..., None] * frequencies
    amplitude = damping(length_BW.clamp_min(1), frequencies, floor) if scheme == "gaussian" else 1.0
    dtype = torch.float64 if gpt.lm_head.weight.dtype == torch.float64 else torch.float32
    return (angle.cos() * amplitude).to(dtype).unsqueeze(2), (angle.sin() * amplitude).to(dtype).unsqueeze(2)
