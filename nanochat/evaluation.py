"""Held-out loss in nats per token and, comparable between tokenizers, in bits per byte.

    bits per byte = sum of nats over targets that stand for bytes / (ln 2 · sum of those bytes)

Targets that stand for no bytes (special tokens) count in the loss but on neither side of bits per byte. Sums run over
all ranks before the division, so the numbers do not depend on how rows were spread.
"""

import math
from typing import Iterable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, token_losses


class Evaluation(NamedTuple):
    loss: float  # nats per target
    bpb: float | None  # bits per byte; None without `token_bytes`
    targets: int
    bytes: int


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Batch], steps: int,
             token_bytes: Tensor | np.ndarray | None = None) -> Evaluation:
    """Means over `steps` batches of this rank and of all others. token_bytes int [V]: bytes that each id stands for.

    Every rank must call it. UserError, with the numbers, when there are fewer batches or nothing to divide by.
    """
    if steps < 1:
        raise UserError(f"evaluation over {steps} batches: at least 1")
    device = model.lm_head.weight.device
    sizes_V = None if token_bytes is None else torch.as_tensor(token_bytes, device=device)
    if sizes_V is not None and len(sizes_V) != model.config.vocab_size:
        raise UserError(f"bytes of {len(sizes_V)} ids for a model of {model.config.vocab_size}: tokenizer and model do "
                        "not belong together")
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # nats, targets, nats of bytes, bytes, batches missing
    batches = iter(batches)
    for done in range(steps):
        batch = next(batches, None)
        if batch is None:
            sums[4] = steps - done
            break
        nats_BS = token_losses(model(batch.inputs), batch.targets).double()
        sums[:2] += torch.stack([nats_BS.sum(), (batch.targets >= 0).sum()])
        if sizes_V is not None:
            bytes_BS = sizes_V[batch.targets.clamp_min(0)] * (batch.targets >= 0)
            sums[2:4] += torch.stack([nats_BS[bytes_BS > 0].sum(), bytes_BS.sum()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    nats, targets, byte_nats, num_bytes, missing = sums.tolist()
    if missing:
        raise UserError(
            f"evaluation asks for {steps} batches a rank, {int(missing)} were missing: ask for fewer eval tokens")
    if not targets:
        raise UserError(f"no target among the {steps} evaluation batches: nothing to take a mean of")
    if sizes_V is not None and not num_bytes:
        raise UserError(f"the {int(targets)} evaluation targets stand for 0 bytes of text: bits per byte does not "
                        "exist here")
    bpb = None if sizes_V is None else byte_nats / (math.log(2) * num_bytes)
    return Evaluation(nats / targets, bpb, int(targets), int(num_bytes))
