"""D5: each gist names its own block's content, and teaches GistNet and embeddings to."""

import dataclasses
import math

import pytest
import torch

from mc.arms.contrast import contrast_loss
from mc.arms.naming import naming
from tiny_mc import T, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


def reached(*modules) -> set[str]:
    return {f"{i}.{name}" for i, m in enumerate(modules) for name, p in m.named_parameters() if p.grad is not None
            and p.grad.any()}


def test_naming_is_the_cross_entropy_of_cosines():
    query, gist, own = torch.randn(2, 3, 5).double(), torch.randn(2, 4, 5).double(), torch.tensor([1, 3, 0])
    total = 0.0
    for b in range(2):
        for i in range(3):
            cosines = [torch.cosine_similarity(query[b, i], g, 0) / 0.1 for g in gist[b]]
            total += torch.logsumexp(torch.stack(cosines), 0) - cosines[own[i]]
    torch.testing.assert_close(naming(query, gist, own), total / 6)


@pytest.mark.parametrize("n_gists", [1, 2])
def test_contrast_falls_when_gists_name_their_blocks_and_teaches_gistnet_and_embeddings(n_gists):
    gpt = tiny_base()
    mc = tiny_mc(gpt, gists_per_block=n_gists, budget=40).model
    optimizer, losses = torch.optim.Adam(mc.gistnet.parameters(), lr=1e-2), []
    for step in range(25):
        loss = contrast_loss(mc.build_tree(gpt.embed(tiny_batch().inputs)))
        losses.append(loss.item())
        gpt.zero_grad(), mc.zero_grad()
        loss.backward()
        optimizer.step()
        if not step:
            assert reached(gpt, mc) == {"0.transformer.wte.weight"} | {f"1.gistnet.{name}"
                                                                       for name, _ in mc.gistnet.named_parameters()}
    assert losses[-1] < losses[0] - 0.3  # over ten seeds of weights and rows 0.72 to 1.34, with two gists 0.63 to 0.93
    alike = mc.build_tree(gpt.embed(torch.full((2, T), 3)))  # all blocks alike: nothing to tell apart
    expected = sum(math.log(n) for n in alike.shape.counts[1:]) / 2
    assert contrast_loss(alike).item() == pytest.approx(expected, abs=1e-6)


def test_contrast_teaches_the_gist_and_not_what_it_is_to_name():
    """A gradient into the content would pull embeddings towards gists; it reaches them through GistNet alone."""
    built = tiny_mc(tiny_base()).model.build_tree(tiny_base().embed(tiny_batch().inputs))
    table = built.table_BND.detach().requires_grad_()
    contrast_loss(dataclasses.replace(built, table_BND=table)).backward()
    tokens = built.shape.counts[0]
    assert not table.grad[:, :tokens].any() and table.grad[:, tokens:].any()
