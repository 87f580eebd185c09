"""D3: a hidden state names the next node's gist; whom that reaches, and at which levels."""

import pytest
import torch

from mc.arms.horizon import HorizonHead
from tiny_mc import K, VOCAB, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


def reached(*modules) -> set[str]:
    return {f"{i}.{name}" for i, m in enumerate(modules) for name, p in m.named_parameters() if p.grad is not None
            and p.grad.any()}


def test_the_horizon_loss_teaches_head_base_and_gistnet_but_neither_lens_nor_bias(monkeypatch):
    gpt = tiny_base()
    mc = tiny_mc(gpt, horizon_gist_weight=1.0)
    hidden = gpt.hidden(tiny_batch().inputs)
    mc.model.horizon_head.loss(hidden, mc.model.build_tree(gpt.embed(tiny_batch().inputs))).backward()
    got = reached(gpt, mc.model)
    taught = {f"1.{n}" for n, _ in mc.model.named_parameters() if n.startswith(("gistnet", "horizon_head"))}
    assert {n for n in got if n.startswith("1.")} == taught
    assert {f"0.{n}" for n, _ in gpt.named_parameters() if "lm_head" not in n} == {n for n in got if n.startswith("0.")}


@pytest.mark.parametrize("T, taught", [(32, [True, True]), (31, [True, False])])
def test_a_level_of_which_a_row_has_one_node_learns_no_horizon_and_a_note_says_so(T, taught, capsys):
    gpt = tiny_base()
    mc = tiny_mc(gpt, T=T, budget=16, lens_queries=8, horizon_gist_weight=1.0)
    said = capsys.readouterr().err
    mc.training_step(gpt, tiny_batch(T=T), 0).loss.backward()
    assert [m.weight.grad is not None for m in mc.model.horizon_head.levels] == taught
    assert said == ("" if all(taught) else "note: --mc_horizon_gist_weight=1.0 teaches nothing at LOD2, of which a row "
                                           "of 31 tokens has fewer than two nodes; "
                                           "it would with a --max_seq_len of 32\n")
    tiny_mc(gpt, T=T, budget=16, lens_queries=8)
    assert not capsys.readouterr().err


def test_the_horizon_is_foreseen_from_the_past_and_is_the_next_node():
    """The query of node i does not change with what comes after it, and names node i + 1: a head that is
    told so has nothing to lose."""
    gpt, seen = tiny_base(), []
    mc = tiny_mc(gpt).model
    tokens = tiny_batch().inputs
    tree = mc.build_tree(gpt.embed(tokens))
    head = HorizonHead(gpt.config.n_embd, 2).double()
    for matrix in head.levels:
        torch.nn.init.eye_(matrix.weight)
    told = torch.zeros_like(tree.levels[0])
    told[:, K - 1:-1:K] = tree.levels[1][:, 1:]
    seen.append(head.loss(told, tree))
    told[:, K - 1:-1:K] = tree.levels[1][:, :-1]
    assert seen[0] < head.loss(told, tree) - 1  # the present node is the wrong one

    later = tokens.clone()
    later[:, 2 * K:] = (later[:, 2 * K:] + 1) % VOCAB
    assert torch.equal(gpt.hidden(tokens)[:, 2 * K - 1], gpt.hidden(later)[:, 2 * K - 1])
