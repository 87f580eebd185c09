"""What the lens learns from: polarity of every target on a planted block, what a query has read, whom it reaches."""

import pytest
import torch

from mc import lens_loss
from mc.config import TEACHERS
from mc.lens_loss import dense_parts
from mc.teachers import attention_mass
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from tiny_mc import K, N, R, T, VOCAB, lesson_of, step, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)
DENSE_TEACHERS = ("attention", "gate")
BLOCKS, EDITABLE = T // K, (N - R) // K
ASKER, ANSWER = 1, 2


# ---------------------------------------------------------------------------------------------------------------------
# Polarity: one block holds what the continuation asks for


def asking_base() -> GPT:
    """One layer without positions: ASKER attends to ANSWER, every other token to everything alike; what
    is attended to is predicted."""
    gpt = GPT(GPTConfig(T, VOCAB, 1, 1, 1, 64, value_embeds=False, smear=False, resid_scalars=False, backout=False,
                        rope_fraction=0.0)).double()
    layer = gpt.transformer.h[0]
    with torch.no_grad():
        gpt.transformer.wte.weight.copy_(torch.eye(64))
        gpt.lm_head.weight.copy_(torch.eye(64))
        for matrix in (layer.attn.c_k, layer.attn.c_v, layer.attn.c_proj):
            matrix.weight.copy_(torch.eye(64))
        layer.mlp.c_proj.weight.zero_()
        # the unused dims keep its attention from being sure
        layer.attn.c_q.weight.zero_()[[ANSWER, *range(VOCAB, 64)], ASKER] = 1
    return gpt


def planted_batch(block: int) -> Batch:
    tokens = 3 + torch.arange(4 * T).view(4, T) * 7 % (VOCAB - 3)
    tokens[:, block * K:(block + 1) * K:2] = ANSWER
    tokens[:, N - 1] = ASKER
    targets = torch.full_like(tokens, -1)
    targets[:, N - 1] = ANSWER
    return Batch(tokens, targets, torch.arange(4), 4)


CASES = [(kind, {}) for kind in TEACHERS]
CASES += [(kind, {"lens_rank": 1.0}) for kind in DENSE_TEACHERS]


@pytest.mark.parametrize("block", [0, 5, EDITABLE - 1])
@pytest.mark.parametrize("kind, more", CASES, ids=str)
def test_every_target_wants_the_planted_block_most(kind, block, more, monkeypatch):
    """Utility = NLL before − NLL after, positive where detail helps: a step along −gradient raises the
    planted block above every other."""
    gpt = asking_base()
    settings = {"counterfactual": {"lens_edits": EDITABLE}, "preference": {"variants": 12}}
    mc = tiny_mc(gpt, gist="mean", teacher=kind, lens_horizon=1,
                 **{"cuts": "random:1", **settings.get(kind, {}), **more})
    logits = torch.zeros(BLOCKS, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(mc.model, "bilinear_logits", lambda embeds, n, keys=None: logits.expand(len(embeds), -1))
    monkeypatch.setattr(mc.model, "tail_votes", lambda embeds, n: logits.expand(len(embeds), R, -1))
    monkeypatch.setattr(mc.model.lensnet, "keys", lambda embeds: embeds.shape[1] // K)
    monkeypatch.setattr(mc.model.lensnet,
                        "logits", lambda embeds, count, asked: 2
                        * (logits[:count].expand(len(embeds), asked.stop - asked.start, -1),))
    for at in range(3):
        step(mc, gpt, planted_batch(block), at)
    gradient = logits.grad
    assert gradient.argmin() == block and gradient[block] < 0
    assert gradient[block] < gradient[torch.arange(BLOCKS) != block].min() - 1e-9


@pytest.mark.parametrize("teacher", DENSE_TEACHERS)
@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("place", [T - 12, T - 7])
def test_a_query_has_read_what_stands_before_its_target_and_nothing_of_it(teacher, horizon, place, monkeypatch):
    """At the queries that a target names, the logits depend on the last token that was read and not on
    the one after it (trap 12a)."""
    seen, true = [], lens_loss.lens_loss
    monkeypatch.setattr(lens_loss, "lens_loss", lambda logits, target, visible:
                        seen.append((logits.detach().masked_fill(~visible, 0), target.sum(-1) > 0))
                        or true(logits, target, visible))

    def taught(changed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, Q, N] with the tail, and which queries [B, Q] have a target."""
        seen.clear()
        gpt = asking_base()
        tokens = planted_batch(0).inputs
        tokens[:, N - 1], tokens[:, place] = 3, ASKER
        targets = torch.full_like(tokens, -1)
        targets[:, place] = ANSWER
        if changed is not None:
            tokens[:, changed] = (tokens[:, changed] + 1 - 3) % (VOCAB - 3) + 3
        step(tiny_mc(gpt, gist="mean", teacher=teacher, lens_horizon=horizon, cuts="recency:1", lens_queries=24), gpt,
             Batch(tokens, targets, torch.arange(4), 4))
        return seen[1]

    plain, asked = taught()
    queries = asked.any(0).nonzero()[:, 0].tolist()
    assert len(queries) == horizon
    for query, last in zip(queries, range(place - horizon + 1, place + 1)):
        assert torch.equal(taught(last + 1)[0][:, query], plain[:, query])
        if last != place:  # without the asker there is no target
            assert not torch.equal(taught(last)[0][:, query], plain[:, query])


# ---------------------------------------------------------------------------------------------------------------------
# Whom it reaches


def test_each_part_reaches_the_lens_alone():
    """Every target and term by itself: a gradient in each weight of the lens, none elsewhere (trap 6)."""
    gpt = tiny_base()
    mc = tiny_mc(gpt, teacher="attention:1,gate:1,counterfactual:1,preference:1", variants=3, lens_rank=1.0,
                 lens_zero_sum=1.0, lens_illegal=1.0, lens_kl=1.0)
    lesson = lesson_of(mc, gpt, tiny_batch())
    signals = {"attention": attention_mass, "gate": mc.model.arms["gate"].signal}
    dense, _, asked = dense_parts(mc.model, lesson, signals)
    parts = dense + [part for arm in mc.model.arms.values() for part in arm.lens_parts(mc.model, lesson, asked)]
    assert [name for name, _, _ in parts] == ["attention", "gate", "rank", "rank", "zero_sum", "illegal", "kl",
                                              "counterfactual", "preference"]
    alone = [(name, part) for name, _, part in parts]
    everything = [*gpt.named_parameters(), *mc.model.named_parameters()]
    for name, part in alone:
        for p in (p for _, p in everything):
            p.grad = None
        part.backward(retain_graph=True)
        reached = {n for n, p in everything if p.grad is not None and p.grad.any()}
        wanted = {n for n, _ in everything if n.startswith("lensnet")}
        if name in ("attention", "gate", "rank"):
            assert reached == wanted, name
        else:  # a constant shift by distance may cancel
            assert wanted - {"lensnet.distance_steps"} <= reached <= wanted, name
