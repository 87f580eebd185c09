"""A MegaContext small enough for float64 tests: blocks of 4 tokens, three levels, 64 tokens a row, nothing left at zero."""

import torch

from mc.config import MCConfig, from_dict
from mc.keyed_random import uniform
from mc.lens_loss import Lesson
from mc.runtime import MCController
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from tiny_gpt import tiny_gpt

K, T, H, W, R, N = 4, 64, 8, 32, 8, 56  # block, row, continuation, budget, protected tokens, history
VOCAB = 50
SMALL = dict(block_size=K, max_lod=2, far_tokens=0, gist_width=16, budget=W, horizon=H, start=0.0, ramp=0, lens_horizon=4, lens_queries=24,
             lens_key_dim=16, lens_keys=2)


def tiny_base(seed: int = 0, dtype: torch.dtype = torch.float64, **config) -> GPT:
    """Every feature on, windows that see everything."""
    return tiny_gpt(seed, dtype, **{"sequence_len": 128, "n_layer": 3, **config})


def planted(shift: int) -> GPT:
    """A base without layers' work whose head names (token + shift) mod 40, sure of it."""
    gpt = GPT(GPTConfig(128, VOCAB, 1, 4, 4, 64, value_embeds=False)).double()
    with torch.no_grad():
        gpt.transformer.wte.weight.copy_(torch.eye(64))
        gpt.lm_head.weight.zero_()[:40, :40] = 20 * torch.eye(40).roll(shift, 0)
    return gpt


def randomize(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * std)


def tiny_mc(gpt: GPT, *, micro_batch: int = 4, num_iterations: int = 10, seed: int = 0, T: int = T, **config) -> MCController:
    if config.get("gist") == "mean":  # it has no weights, and its width is refused
        config = {"gist_width": MCConfig.gist_width, **config}
    mc = MCController(from_dict({**SMALL, **config}), gpt, T=T, micro_batch=micro_batch, num_iterations=num_iterations, seed=seed)
    mc.model.to(gpt.lm_head.weight.dtype)
    randomize(mc.model)
    return mc


def tiny_batch(rows=(0, 1, 2, 3), T: int = T, seed: int = 0) -> Batch:
    """Rows that are a function of their numbers, every fifth target ignored."""
    rows = torch.as_tensor(rows)
    tokens = (uniform(rows, T + 1, seed, "tokens") * VOCAB).long()
    targets = tokens[:, 1:].masked_fill(torch.arange(T) % 5 == 0, -1)
    return Batch(tokens[:, :-1].contiguous(), targets, rows, T)


def step(mc: MCController, gpt: GPT, batch: Batch, at: int = 0, accumulation: int = 1):
    """One micro-step with its gradients, as the training loop does it: the result with the metrics of both halves."""
    result = mc.training_step(gpt, batch, at)
    (result.loss / accumulation).backward()
    return result._replace(metrics=result.metrics | mc.after_backward(accumulation)[1])


def lesson_of(mc: MCController, gpt: GPT, batch: Batch, at: int = 0) -> Lesson:
    """What a micro-step gives the lens to learn, after its backward pass."""
    seen, teach = [], mc._teach_lens
    mc._teach_lens = lambda lesson, trace: seen.append(lesson) or teach(lesson, trace)
    step(mc, gpt, batch, at)
    mc._teach_lens = teach
    return seen[0]


def values(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Without the times."""
    return {name: float(x) for name, x in metrics.items() if not name.startswith("mc.time")}
