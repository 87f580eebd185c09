"""C5: gists of hidden states know the past and nothing else, and do not bend the base."""

import pytest
import torch

from nanochat.common import UserError
from tiny_mc import K, T, VOCAB, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


def reached(*modules) -> set[str]:
    return {f"{i}.{name}" for i, m in enumerate(modules) for name, p in m.named_parameters() if p.grad is not None
            and p.grad.any()}


@torch.no_grad()
def test_gists_of_hidden_states_know_what_stood_before_their_block_and_nothing_later():
    gpt, tokens = tiny_base(), tiny_batch().inputs
    mc = tiny_mc(gpt, gist_source="hidden").model

    def gists(tokens: torch.Tensor) -> torch.Tensor:
        middle: list[torch.Tensor] = []
        gpt.hidden(tokens, middle=middle)
        return mc.build_tree(gpt.embed(tokens), *middle).levels[1]

    before, changed = gists(tokens), tokens.clone()
    changed[:, 2 * K] = (changed[:, 2 * K] + 1) % VOCAB
    moved = (gists(changed) - before).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [False] * 2 + [True] * (T // K - 2)
    with pytest.raises(UserError, match="hidden states of the base"):
        mc.build_tree(gpt.embed(tokens))


def test_gists_of_hidden_states_do_not_bend_the_base():
    gpt = tiny_base()
    mc, middle = tiny_mc(gpt, gist_source="hidden").model, []
    tokens = tiny_batch().inputs
    gpt.hidden(tokens, middle=middle)
    mc.build_tree(gpt.embed(tokens), *middle).levels[1].square().mul(torch.rand(gpt.config.n_embd)).sum().backward()
    assert reached(gpt, mc) - {"0.transformer.wte.weight"} == {f"1.gistnet.{n}"
                                                               for n, _ in mc.gistnet.named_parameters()}
