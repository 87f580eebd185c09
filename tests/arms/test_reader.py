"""Readers of the lens: start as the bilinear lens, depend on all that they read and on nothing else, the
same in training and in use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mc.arm import KINDS, load
from mc.arms.reader import WIDTH, Reader
from mc.config import MCConfig
from mc.lensnet import CURSORS, RERANKED
from mc.model import MegaContext
from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from nanochat.optim import MuonAdamW, check_groups
from tiny_mc import VOCAB, randomize, step, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)
READERS = tuple(KINDS["lens"])
EXACT = dict(rtol=0, atol=1e-9)
K, D, RECENT, MAX_LOD = 4, 16, 8, 3
kinds = pytest.mark.parametrize("kind", READERS)


def make(kind: str, seed: int = 0) -> Reader:
    reader = load(KINDS["lens"][kind]).reader(D, K, MAX_LOD, RECENT).double()
    randomize(reader, seed)
    return reader


def context(n_blocks: int, cursors: list[int], rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a reader is given: n_blocks blocks and all complete nodes above them."""
    rng = torch.Generator().manual_seed(seed)
    counts = {lod: n_blocks // K ** (lod - 1) for lod in range(1, MAX_LOD + 1)}
    lod = torch.cat([torch.full((count,), lod) for lod, count in counts.items()])
    index = torch.cat([torch.arange(count) for count in counts.values()])
    normal = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    Q = len(cursors)
    return dict(logits_BQN=3 * normal(rows, Q, n_blocks), tail_BQTD=normal(rows, Q, RECENT, D),
                cursor_BQ=torch.tensor([cursors] * rows),
                gists_BED=normal(rows, len(lod), D), lod_E=lod, index_E=index)  # fmt: skip


@kinds
@pytest.mark.parametrize("n_blocks", [1, 31, 33])
def test_training_starts_from_the_bilinear_lens(kind, n_blocks):
    given = context(n_blocks, [n_blocks * K + 2])
    assert torch.equal(load(KINDS["lens"][kind]).reader(D, K, MAX_LOD, RECENT).double()(**given), given["logits_BQN"])
    changed = make(kind)(**given) != given["logits_BQN"]
    assert changed.all()


@kinds
@pytest.mark.parametrize("what", ["logit", "gist", "gist above", "token", "cursor", "place", "level"])
def test_every_score_depends_on_every_input(kind, what):
    """Trap 7: whatever changes, the scores of the first and of the last blocks change."""
    reader, given = make(kind), context(20, [20 * K + 1], rows=1)
    before = reader(**given) - given["logits_BQN"]
    rows = {"logit": range(18), "gist": range(20), "gist above": range(20, 26), "token": range(RECENT),
            "place": range(1, 20), "level": range(20, 26), "cursor": [0]}[what]
    for i in rows:
        other = {name: x.clone() for name, x in given.items()}
        if what == "logit":
            other["logits_BQN"][..., i] = other["logits_BQN"].amax() + 0.5
        elif what in ("gist", "gist above"):
            other["gists_BED"][:, i] = other["gists_BED"][:, i].flip(-1)
        elif what == "token":
            other["tail_BQTD"][:, :, i] = other["tail_BQTD"][:, :, i].flip(-1)
        elif what == "cursor":
            other["cursor_BQ"] += 1
        elif what == "place":  # two blocks change places, each with its content: for both the distance is another
            other["index_E"][[i, i - 1]] = given["index_E"][[i - 1, i]]
        else:
            other["lod_E"][i] = 5 - other["lod_E"][i]  # 2 and 3 change places; all of them before the cursor still
            other["index_E"][i] = 0
        after = reader(**other) - other["logits_BQN"]
        assert (after != before).all(), (i, (after != before).tolist())


@kinds
def test_a_permutation_of_the_nodes_permutes_the_scores(kind):
    reader, given = make(kind), context(21, [21 * K, 13 * K + 2])
    shuffle = torch.randperm(21, generator=torch.Generator().manual_seed(3))
    order = torch.cat([shuffle, torch.randperm(6, generator=torch.Generator().manual_seed(4)) + 21])
    other = given | dict(logits_BQN=given["logits_BQN"][..., shuffle], gists_BED=given["gists_BED"][:, order],
                         lod_E=given["lod_E"][order], index_E=given["index_E"][order])  # fmt: skip
    torch.testing.assert_close(reader(**other), reader(**given)[..., shuffle], **EXACT)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(READERS), st.integers(1, 33), st.data())
def test_many_cursors_are_each_alone_with_what_they_have_passed(kind, n_blocks, data):
    """Masks against leaving out: neither the future nor missing tokens of a short tail are read."""
    cursors = data.draw(st.lists(st.integers(K, n_blocks * K + 3), min_size=1, max_size=3))
    tokens = [min(cursor, RECENT) for cursor in cursors]
    reader, given = make(kind), context(n_blocks, cursors, seed=n_blocks)
    for q, count in enumerate(tokens):
        given["tail_BQTD"][:, q, :RECENT - count] = 0
    together = reader(**given)
    for q, (cursor, count) in enumerate(zip(cursors, tokens)):
        passed = (given["index_E"] + 1) * K ** given["lod_E"] <= cursor
        blocks = int(passed[:n_blocks].sum())
        alone = reader(given["logits_BQN"][:, q:q + 1, :blocks], given["tail_BQTD"][:, q:q + 1, RECENT - count:],
                       given["cursor_BQ"][:, q:q + 1],
                       given["gists_BED"][:, passed], given["lod_E"][passed], given["index_E"][passed])  # fmt: skip
        torch.testing.assert_close(together[:, q:q + 1, :blocks], alone, **EXACT)


@kinds
def test_its_loss_teaches_all_of_it_and_nothing_else(kind):
    reader, given = make(kind), context(12, [12 * K, 30])
    inputs = [given[name].requires_grad_() for name in ("logits_BQN", "tail_BQTD", "gists_BED")]
    reader(**given).square().sum().backward()
    assert all(x.grad is None for x in inputs)
    assert [name for name, p in reader.named_parameters() if p.grad is None or not p.grad.any()] == []


@kinds
def test_it_learns_what_no_block_can_tell_by_itself(kind):
    """Wanted: the second best by the bilinear logit. What that is depends on the other blocks."""
    torch.manual_seed(0)
    reader = load(KINDS["lens"][kind]).reader(D, K, MAX_LOD, RECENT)
    optimizer, hits = torch.optim.Adam(reader.parameters(), lr=3e-3), []
    for seed in range(100):
        given = {name: x.float() if x.is_floating_point() else x
                 for name, x in context(8, [12 * K] * 32, rows=2, seed=seed).items()}
        wanted = given["logits_BQN"].topk(2).indices[..., 1]
        scores = reader(**given)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten()).backward()
        optimizer.step()
        hits.append((scores.argmax(-1) == wanted).float().mean())
    # By chance 1/8, by the logits alone never. Over ten seeds 0.39 to 0.80 (transformer), 0.58 to 0.78
    # (perceiver), 0.73 to 0.88 (slots).
    assert torch.stack(hits[-10:]).mean() > 0.25


@kinds
def test_flops_are_those_of_the_shapes(kind):
    reader, given = make(kind), context(33, [100, 120, 134], rows=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        reader(**given)
    assert reader.flops(3, 33, len(given["lod_E"]), RECENT) == counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# In training


@kinds
def test_every_parameter_is_in_one_group_moves_is_saved_and_restored(kind):
    gpt = tiny_base(dtype=torch.float32)
    mc = tiny_mc(gpt, lens=kind)
    optimizer = MuonAdamW(mc.param_groups())
    check_groups({"mc": mc.model}, optimizer.param_groups)
    muon = {id(p) for g in optimizer.param_groups if g["kind"] == "muon" for p in g["params"]}
    assert {name for name, p in mc.model.lensnet.reader.named_parameters()
            if id(p) not in muon} <= {"body.score.weight"}
    before = {name: p.detach().clone() for name, p in mc.model.named_parameters()}
    for i in range(3):
        step(mc, gpt, tiny_batch(range(4 * i, 4 * i + 4)), at=i)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert [name for name, p in mc.model.named_parameters() if torch.equal(p, before[name])] == []
    other = tiny_mc(gpt, lens=kind)
    other.load_state_dict({name: x.clone() for name, x in mc.state_dict().items()})
    embeds, n = gpt.embed(tiny_batch().inputs), torch.tensor([56, 40, 32, 60])
    assert torch.equal(mc.model.lens_logits(embeds, n), other.model.lens_logits(embeds, n))


@kinds
def test_the_bilinear_part_learns_as_it_does_alone(kind):
    gpt, gradients = tiny_base(), []
    for lens in ("bilinear", kind):
        mc = tiny_mc(gpt, lens=lens, cuts="random:1")
        randomize(mc.model.lensnet.query_mlp, 3)
        state = tiny_mc(gpt).state_dict()
        mc.model.load_state_dict(mc.state_dict() | state)
        step(mc, gpt, tiny_batch())
        gradients.append({name: p.grad for name, p in mc.model.lensnet.named_parameters() if "reader" not in name})
        gpt.zero_grad(set_to_none=True)
    alone, read = gradients
    for name, grad in alone.items():
        torch.testing.assert_close(read[name], grad, **EXACT)


@pytest.mark.parametrize("strides",
                         [dict(row_stride=2), dict(lens_row_stride=2), dict(row_stride=2, lens_row_stride=4)])
def test_what_is_taught_are_the_logits_of_use(strides, monkeypatch):
    """At the same row and cursor, with any strides."""
    gpt, batch, seen = tiny_base(), tiny_batch(), []
    mc = tiny_mc(gpt, lens="transformer", **strides)
    reread = mc.model.reread
    monkeypatch.setattr(mc.model, "reread", lambda *a: seen.append((a[3], reread(*a))) or seen[-1][1])
    step(mc, gpt, batch)
    cursor_BQ, logits_BQN = seen[-1]
    rows = slice(None, None, mc.config.lens_row_stride)
    assert logits_BQN.shape[:2] == (4 // rows.step, min(CURSORS, mc.config.lens_queries))
    for q in range(cursor_BQ.shape[1]):
        used = mc.model.lens_logits(gpt.embed(batch.inputs)[rows], cursor_BQ[:, q])
        visible = (torch.arange(used.shape[1]) + 1) * K <= cursor_BQ[:, q, None] - mc.config.protected
        count = logits_BQN.shape[-1]
        torch.testing.assert_close(logits_BQN[:, q][visible[:, :count]], used[visible], **EXACT)


def test_the_controllers_flops_count_it():
    gpt = tiny_base()
    alone, read = (tiny_mc(gpt, lens=lens) for lens in ("bilinear", "perceiver"))
    added = (read.flops_per_token(gpt) - alone.flops_per_token(gpt)) * 64
    assert added == pytest.approx(3 * read.model.lensnet.reader.flops(CURSORS, 16, 16 + 4, 8) + 64
                                  * read.model.gistnet.flops_per_token(), rel=1e-9)
    assert added > 3 * CURSORS * 16 * WIDTH**2


# ---------------------------------------------------------------------------------------------------------------------
# In a session


@kinds
@pytest.mark.parametrize("n, more", [(16, 1), (31, 1), (77, 3), (150, 33)])
def test_a_session_scores_as_a_batch_does(kind, n, more):
    """Where all blocks are candidates."""
    gpt = tiny_base()
    mc = MegaContext(MCConfig(block_size=K, max_lod=3, gist_width=16, budget=40, recent=8, horizon=8, lens_key_dim=16,
                              lens_keys=2, lens_queries=24,
                              lens_horizon=4, lens=kind), gpt.config.n_embd).double()  # fmt: skip
    randomize(mc)
    session, seen = SessionPool(gpt, mc, SessionConfig(), trained_lods=(1, 2, 3)).open(), []
    scores = session._scores
    session._scores = lambda logits: seen.append(logits) or scores(logits)
    ids = torch.randint(VOCAB, (n + more,), generator=torch.Generator().manual_seed(n))
    session.begin(ids[:n].tolist())
    session.logits()
    session.append(ids[n:].tolist())
    session.refocus()
    assert (n + more) // K <= RERANKED
    for count, found in ((n, seen[0]), (n + more, seen[-1])):
        batch = mc.lens_logits(gpt.embed(ids[None, :count]), torch.tensor([count]))[0]
        assert sorted(found) == list(range(count // K))
        torch.testing.assert_close(torch.tensor([found[i] for i in range(count // K)], dtype=torch.float64), batch,
                                   **EXACT)
