"""What the lens is taught: how much each block of history matters to each query, read off
the full-context pass as it ran.

Both teachers use what attention captured (`nanochat.gpt.Captured`), on a chosen range of query rows, so the pass itself
runs unchanged at full speed and the cost is that of a few rows.

    attention mass   Σ_{k in block} P[q,k], mean over layers and heads
    gate gradient    −∂L/∂g at g = 0, for a gate g[q, block] added to the attention logits
                     of query q on the block's keys:
                     first-order utility of showing the block. From the softmax's Jacobian, with dO the gradient at the
                     attention's output O:  ∂L/∂g[q,b] = Σ_{k in b} P[q,k] · (dO_q·v_k − dO_q·O_q),
                                             summed over layers and heads.
                     The ordinary backward pass leaves dO behind where `keep_gradients` asked for it, so all blocks and
                     queries come from one backward.

Shapes: B rows, Q query rows, N blocks, H heads, G kv heads, E head width, S entries of the pass.
"""

import math
from typing import Sequence

import torch
from torch import Tensor

from nanochat.gpt import GPT, Captured, token_losses


def _precise(x: Tensor) -> Tensor:
    """At least float32: autocast leaves q and k in one precision, v and the output in
    another, and differences follow."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _for_heads(x_BGSE: Tensor, n_head: int) -> Tensor:
    """[B, H, S, E] precise; nothing is copied that need not be."""
    share = n_head // x_BGSE.shape[1]
    return _precise(x_BGSE if share == 1 else x_BGSE.repeat_interleave(share, 1))


def attention_weights(layer: Captured, rows: slice, queries: slice) -> Tensor:
    """Attention weights [B, H, Q, S'] of some queries on the keys up to the last of them."""
    q = _precise(layer.q[rows, :, queries])
    k, Q = _for_heads(layer.k[rows, :, :queries.stop], q.shape[1]), q.shape[2]
    logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    # only the queries' own span has keys after a query
    later = torch.ones(Q, Q, dtype=torch.bool, device=q.device).triu(1)
    logits[..., queries.start:].masked_fill_(later, -torch.inf)
    return logits.softmax(-1)


def _per_block(x_BQS: Tensor, n_blocks: int, block_size: int) -> Tensor:
    return x_BQS[..., :n_blocks * block_size].unflatten(-1, (n_blocks, block_size)).sum(-1)


@torch.no_grad()
def attention_mass(captured: Sequence[Captured], rows: slice, queries: slice, n_blocks: int, block_size: int) -> Tensor:
    """[B, Q, N] share of attention on each of the first n_blocks blocks, the first token (the sink) left out.

    Mean over layers and heads (a maximum is ruled by flat heads). captured: layers that see everything. n_blocks must
    lie before the last query.
    """
    total = 0.0
    for layer in captured:
        weights = attention_weights(layer, rows, queries)
        weights[..., 0] = 0
        total = total + _per_block(weights.mean(1), n_blocks, block_size)
    return total / len(captured)


@torch.no_grad()
def gate_utility(captured: Sequence[Captured], rows: slice, queries: slice, n_blocks: int, block_size: int) -> Tensor:
    """[B, Q, N] first-order utility of each block for each query, in units of the loss that was differentiated.

    Call after `keep_gradients` and the backward pass of that loss. Raises RuntimeError when one of them has not run.
    """
    total = 0.0
    for layer in captured:
        if layer.y.grad is None:
            raise RuntimeError("gate utility needs the gradient at the attention's output: run keep_gradients, then "
                               "backward, first")
        weights = attention_weights(layer, rows, queries)
        v = _for_heads(layer.v[rows, :, :queries.stop], weights.shape[1])
        d_out, out = _precise(layer.y.grad[rows, :, queries]), _precise(layer.y[rows, :, queries])
        gain = _per_block((weights * (d_out @ v.transpose(-1, -2))).sum(1), n_blocks, block_size)
        mean = (d_out * out).sum(-1, keepdim=True)
        total = total - gain + (_per_block(weights, n_blocks, block_size) * mean).sum(1)
    return total


def keep_gradients(captured: Sequence[Captured]) -> None:
    """Before the backward pass: that it leaves its gradient at every attention's output, for `gate_utility`."""
    for layer in captured:
        if layer.y.requires_grad:
            layer.y.retain_grad()


def continuation_pass(gpt: GPT, tokens_BT: Tensor, targets_BT: Tensor, n: int) -> list[Captured]:
    """The attention of a full pass over rows [B, T], with the gradient of the losses of the targets
    after n tokens at every output.

    For `gate_utility` of queries n − 1 … T − 2. The model's parameters get no gradient.
    """
    captured: list[Captured] = []
    with torch.enable_grad():
        embeds = gpt.embed(tokens_BT).detach().requires_grad_()
        hidden = gpt.hidden(tokens_BT, inputs_embeds=embeds, capture=captured, lift_windows=True)[:, n - 1:-1]
        keep_gradients(captured)
        torch.autograd.grad(token_losses(gpt.logits(hidden), targets_BT[:, n - 1:-1]).sum(), embeds)
    return captured


def over_horizon(per_query_BQN: Tensor, horizon: int) -> Tensor:
    """[B, Q − horizon + 1, N]: at query t the sum over rows [t, t + horizon), which predict tokens (t, t + horizon]."""
    # a running sum in bfloat16 drowns its parts
    x_BQN = per_query_BQN.to(torch.promote_types(per_query_BQN.dtype, torch.float32))
    total = torch.nn.functional.pad(x_BQN, (0, 0, 1, 0)).cumsum(1)
    return total[:, horizon:] - total[:, :-horizon]


def beyond_average(signal_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """What a block has beyond the mean of the visible ones.

    Most heads attend flatly, so a block's share of attention is nearly that of any other (recall, 32 blocks: 0.11 on
    the right one); what lies above the mean names it.
    """
    mean = (signal_BQN * visible_BQN).sum(-1, keepdim=True) / visible_BQN.sum(-1, keepdim=True).clamp_min(1)
    return signal_BQN - mean
