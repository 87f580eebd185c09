"""The gate as the lens's teacher: taught behind the backward pass, as the gradients of that
pass say, on a frozen base too."""

import pytest
import torch

from mc.lens_loss import lens_objective
from tiny_mc import lesson_of, step, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_lens_is_taught_behind_the_backward_pass(frozen):
    gpt = tiny_base().requires_grad_(not frozen)
    mc = tiny_mc(gpt, teacher="gate")
    result = mc.training_step(gpt, tiny_batch(), 0)
    assert "mc.loss.lens" not in result.metrics
    result.loss.backward()
    lens = list(mc.model.lensnet.parameters())
    assert all(p.grad is None for p in lens)
    _, metrics = mc.after_backward()
    assert all(p.grad is not None and p.grad.any() for p in lens) and metrics["mc.loss.lens"] > 0
    assert (gpt.lm_head.weight.grad is None) == frozen


def test_accumulation_scales_what_it_teaches_as_it_scales_the_rest():
    found = []
    for accumulation in (1, 4):
        gpt = tiny_base()
        mc = tiny_mc(gpt, teacher="gate")
        step(mc, gpt, tiny_batch(), accumulation=accumulation)
        found.append([p.grad.clone() for p in mc.model.lensnet.parameters()])
    for one, four in zip(*found):
        torch.testing.assert_close(four, one / 4)


def test_without_the_gradients_there_is_nothing_to_learn_from():
    gpt = tiny_base()
    mc = tiny_mc(gpt, teacher="gate")
    lesson = lesson_of(mc, gpt, tiny_batch())
    for layer in lesson.captured:
        layer.y.grad = None
    with pytest.raises(RuntimeError, match="keep_gradients"):
        lens_objective(mc.model, lesson)


def test_only_the_gate_keeps_gradients():
    for teacher in ("attention", "gate"):
        gpt = tiny_base()
        kept = [layer.y.retains_grad for layer in lesson_of(tiny_mc(gpt, teacher=teacher), gpt, tiny_batch()).captured]
        assert kept == [teacher == "gate"] * len(kept)
