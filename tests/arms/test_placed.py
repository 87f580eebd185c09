"""C9, C15: some rows of the LM pass at the positions of their primary working context, against a slow reference."""

import pytest
import torch

from mc.far_history import draw_far_history, place_far
from nanochat.common import UserError
from nanochat.gpt import token_losses
from tiny_mc import K, N, T, step, tiny_base, tiny_batch, tiny_mc, values

torch.set_num_threads(1)


def entry_of(primary, b: int, token: int, G: int) -> tuple[int, int, int] | None:
    """(slot, first token, tokens) of the entry that holds a token; None behind the last one."""
    for slot in range(int(primary.valid_BM[b].sum())):
        lod, index = int(primary.lod_BM[b, slot]), int(primary.index_BM[b, slot])
        length = K**lod // (G if lod else 1)
        if index * length <= token < (index + 1) * length:
            return slot, index * length, length
    return None


def slow_rotary(gpt, config, primary, b: int, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: the expected rotation over the span of the entry that holds it."""
    frequencies, angles, amplitudes = gpt.inverse_frequencies("cpu"), [], []
    count = int(primary.valid_BM[b].sum())
    for token in range(T):
        held = entry_of(primary, b, token, config.gists_per_block)
        if held is None:
            place, amplitude = float(token), 1.0
        else:
            slot, _, length = held
            place = float(starts[b, slot]) + (length - 1) / 2
            damped = torch.exp(-((length**2 - 1) / 12) * frequencies**2 / 2)
            amplitude = config.damping_floor + (1 - config.damping_floor) * damped
            if config.positions == "contiguous":
                last = int(primary.index_BM[b, count - 1])
                place = float(last - (count - 1) + slot)
            if config.positions != "gaussian":
                amplitude = 1.0
        angles.append(place * frequencies)
        amplitudes.append(amplitude * torch.ones_like(frequencies))
    angle, amplitude = torch.stack(angles), torch.stack(amplitudes)
    return (angle.cos() * amplitude)[None, :, None], (angle.sin() * amplitude)[None, :, None]


@pytest.mark.parametrize("config", [
    {}, {"placed_stride": 2}, {"placed_stride": 2, "row_stride": 2, "micro_batch": 8}, {"variants": 3},
    {"positions": "centre"}, {"positions": "contiguous"}, {"gists_per_block": 2, "budget": 36},
    {"far_tokens": 400, "far_entries": 40}, {"far_tokens": 400, "far_entries": 40, "variants": 2, "placed_stride": 2},
])  # fmt: skip
def test_the_loss_is_that_of_every_chosen_row_read_at_its_primary_contexts_positions(config):
    gpt, config = tiny_base(), {"placed_stride": 1, "arms": "placed", **config}
    mc, batch = tiny_mc(gpt, **config), tiny_batch(range(config.get("micro_batch", 4)))
    result, c, losses = mc.training_step(gpt, batch, 0), mc.config, []
    stride, primary = c.row_stride, result.primary
    starts = primary.index_BM * torch.where(primary.lod_BM > 0, K**primary.lod_BM // c.gists_per_block, 1)
    if c.far_tokens:
        far = draw_far_history(c, mc.model.gistnet, gpt.embed(batch.inputs), batch.rows, slice(None),
                               torch.full((4,), N), 1, mc.seed, 0)
        moved, *_ = place_far(starts, far)
        assert (moved < starts).any(), "the far history pushes nothing back"
        starts = moved
    for b in range(0, len(primary.lod_BM), c.of("placed_stride")):
        tokens, targets = batch.inputs[b * stride, None], batch.targets[b * stride, None]
        hidden = gpt.hidden(tokens, rotary=slow_rotary(gpt, c, primary, b, starts))
        wanted = targets >= 0
        losses.append(token_losses(gpt.logits(hidden), targets)[wanted].mean())
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(result.metrics["mc.loss.placed"], expected.detach())
    without = tiny_mc(gpt, **{k: v for k, v in config.items() if k not in ("arms", "placed_stride")})
    share = len(losses) / len(batch.inputs)
    torch.testing.assert_close(result.loss - without.training_step(gpt, batch, 0).loss, share * expected)
    full = token_losses(gpt(batch.inputs), batch.targets)
    assert (expected - full[full > 0].mean()).abs() > 1e-6 or c.positions == "contiguous"


def test_positions_of_another_variant_give_another_loss():
    """It is the primary one that counts, not the first."""
    gpt, batch = tiny_base(), tiny_batch()
    four = tiny_mc(gpt, arms="placed", placed_stride=1, variants=4, cuts="random:1")
    one = tiny_mc(gpt, arms="placed", placed_stride=1, variants=4, cuts="random:1")
    arm, seen = one.model.arms["placed"], []
    plain = arm.lm_part

    def of_the_first(looked, embeds, primary, far):
        seen.append(primary)
        order = looked.nll_VR.argsort(0)
        assert (order[0] != 0).any(), "the first variant is the best of every row"
        return plain(looked, embeds, first, far)

    first = tiny_mc(gpt, cuts="random:1", variants=1).training_step(gpt, batch, 0).primary
    arm.lm_part = of_the_first
    assert four.training_step(gpt, batch, 0).metrics["mc.loss.placed"] != one.training_step(gpt, batch, 0).metrics["mc.loss.placed"]  # noqa: E501
    assert not torch.equal(seen[0].index_BM, first.index_BM)


def test_it_teaches_the_base_alone():
    gpt, found = tiny_base(), []
    for arms in ("", "placed"):
        mc = tiny_mc(gpt, arms=arms)
        gpt.zero_grad(), mc.model.zero_grad()
        step(mc, gpt, tiny_batch())
        found.append({name: p.grad.clone() for m in (gpt, mc.model) for name, p in m.named_parameters()
                      if p.grad is not None})
    assert {n for n in found[0] if not torch.equal(found[0][n], found[1][n])} >= {n for n, _ in gpt.named_parameters()}
    for name, _ in mc.model.named_parameters():
        assert torch.equal(found[0][name], found[1][name]), name


def test_rows_add_up_and_a_stride_that_does_not_fit_is_refused():
    gpt = tiny_base()
    mc = tiny_mc(gpt, arms="placed", placed_stride=2)
    whole, halves = (step(mc, gpt, tiny_batch()),
                     [step(mc, gpt, tiny_batch(rows), accumulation=2) for rows in ((0, 1), (2, 3))])
    torch.testing.assert_close((halves[0].loss + halves[1].loss) / 2, whole.loss)
    assert values(whole.metrics)["mc.loss.placed"] > 0
    with pytest.raises(UserError, match="--mc_placed_stride=3 does not divide the 4 rows"):
        tiny_mc(gpt, arms="placed", placed_stride=3)
