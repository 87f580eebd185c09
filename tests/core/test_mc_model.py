"""The working-context pass: without gists it is the vanilla pass, each entry is its own node, and
one rule gives every target."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.config import RETIRED, MCConfig, add_flags, complete, from_dict, from_flags, to_dict
from mc.far_history import FarHistory, draw_far_history, place_far
from mc.gaussian_rope import entry_rotary
from mc.model import Entries, MegaContext, fingerprint, load_mega_context, read_rows, recency_scores, run_entries, take, with_continuation  # noqa: E501
from mc.mega_context import build_tree
from mc.working_context import Cut, coarsest, entries_used, from_expanded
from nanochat.checkpoint import save_checkpoint
from nanochat.common import FlagParser, UserError
from tiny_mc import SMALL, H, K, N, R, W, randomize, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)
tokens = tiny_batch().inputs
n_B = torch.full((4,), N)


def mega(gpt, **config) -> MegaContext:
    return tiny_mc(gpt, **config).model


def random_entries(mc: MegaContext, seed: int = 0, n: torch.Tensor = n_B) -> Entries:
    scores = torch.randn(4, N // K, generator=torch.Generator().manual_seed(seed))
    return with_continuation(mc.allocator.cut(mc.allocator.allocate(scores, n))[0], n, H - 1)


def spy(gpt, monkeypatch) -> dict:
    """What the next pass through the base is given, and what its layers capture."""
    seen: dict = {"captured": []}
    hidden = gpt.hidden

    def listening(idx, **kwargs):
        seen.update(kwargs, idx=idx)
        return hidden(idx, capture=seen["captured"], **kwargs)

    monkeypatch.setattr(gpt, "hidden", listening)
    return seen


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_without_gists_the_pass_is_the_vanilla_pass(dtype, tolerance, kv_heads, monkeypatch):
    """What the base is given is bit-identical. The bias of keys, zero here, rides in a wider head,
    whose dot products a kernel may
    sum in another order: hence the tolerance on what comes out."""
    gpt = tiny_base(dtype=dtype, n_kv_head=kv_heads)
    mc = mega(gpt)
    vanilla = gpt.hidden(tokens[:, :N + H - 1])
    for capacity in (N, N + 5):
        seen = spy(gpt, monkeypatch)
        out = run_entries(gpt, mc, mc.build_tree(gpt.embed(tokens)), tokens,
                          with_continuation(coarsest(n_B, K, 0, capacity), n_B, H - 1))
        out = out[:, :N + H - 1]
        assert torch.equal(seen["idx"][:, :N + H - 1], tokens[:, :N + H - 1]) and not seen["key_bias"].any()
        assert torch.equal(seen["inputs_embeds"][:, :N + H - 1], gpt.embed(tokens[:, :N + H - 1]))
        for got, expected in zip(seen["rotary"], gpt.rotary(torch.arange(N + H - 1))):
            assert torch.equal(got[:, :N + H - 1], expected.expand(4, -1, -1, -1))
        torch.testing.assert_close(out, vanilla, rtol=0, atol=tolerance)
        given_all = {k: seen[k] for k in ("inputs_embeds", "rotary", "linked")}
        monkeypatch.undo()
        unbiased = gpt.hidden(seen["idx"], **given_all)[:, :N + H - 1]
        if capacity == N:
            assert torch.equal(unbiased, vanilla)  # smear and key shift too


@pytest.mark.parametrize("n_gists", [1, 2])
def test_to_tensor_gathers_each_entry_s_own_vector(n_gists):
    """C8: each vector of the tree spells its (lod, index): what comes out equals the entries in time order, zeros
    behind them, and gradients go back there and nowhere else."""
    gistnet = lambda x, mask, lod: torch.zeros(len(x), n_gists, 2)  # noqa: E731
    tree = build_tree(torch.zeros(2, 16, 2), gistnet, K, 2, n_gists=n_gists)
    spelt = torch.cat([torch.tensor([[lod, i] for i in range(x.shape[1])]).float()
                       for lod, x in enumerate(tree.levels)])
    table = (spelt + 1000 * torch.arange(2.0)[:, None, None]).requires_grad_()  # tells the rows apart
    expanded = [torch.tensor([[True, False, False, True], [False, True, False, False]]), torch.tensor([[True], [True]])]
    cut, fits = from_expanded(expanded, torch.tensor([16, 9]), K, 15, n_gists)
    assert fits.all()
    entries = with_continuation(cut, torch.tensor([16, 9]), 0)
    vectors, valid = entries.to_tensor(tree.with_table(table))
    assert torch.equal(valid, entries.valid_BM) and valid.sum(1).tolist() == entries_used(cut).tolist()
    assert vectors.shape == (2, 15, 2) and vectors.dtype == table.dtype
    want = torch.stack([entries.lod_BM, entries.index_BM], -1) + 1000 * torch.arange(2)[:, None, None]
    assert torch.equal(vectors, torch.where(valid[..., None], want, 0).float())
    vectors.sum().backward()
    assert set(table.grad.flatten().tolist()) == {0.0, 1.0} and table.grad.sum() == 2 * valid.sum()


def test_key_bias_lies_between_nothing_and_the_log_of_the_width():
    mc = mega(tiny_base())
    lod = torch.tensor([[0, 1, 2, 0]])
    bias = mc.key_bias(lod)
    assert bias[0, 0] == bias[0, 3] == 0 and 0 < bias[0, 1] < math.log(K) and 0 < bias[0, 2] < 2 * math.log(K)
    bias.sum().backward()
    assert mc.gist_bias.grad.all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.lists(st.integers(W // K, N // K), min_size=4, max_size=4),
       G=st.sampled_from([1, 2]))
@torch.no_grad()
def test_each_entry_is_its_own_nodes_gist(seed, n, G):
    gpt = tiny_base()
    mc = mega(gpt, gists_per_block=G, budget=W + 8 * (G - 1))
    embeds, n = gpt.embed(tokens), K * torch.tensor(n)
    entries = random_entries(mc, seed, n)
    vectors = mc.build_tree(embeds).gather(*entries[:3])

    def gist(b: int, lod: int, index: int) -> torch.Tensor:
        if lod == 0:
            return embeds[b, index]
        node, i = divmod(index, G)
        below = K * (G if lod > 1 else 1)
        children = torch.stack([gist(b, lod - 1, below * node + j) for j in range(below)])
        return mc.gistnet(children[None], None, lod)[0, i]

    for b in range(4):
        covered = 0
        for w in range(entries.lod_BM.shape[1]):
            if not entries.valid_BM[b, w]:
                assert not vectors[b, w].any()
                continue
            lod, index = int(entries.lod_BM[b, w]), int(entries.index_BM[b, w])
            width = K**lod // G if lod else 1
            assert index * width == covered
            covered += width
            torch.testing.assert_close(vectors[b, w], gist(b, lod, index), rtol=0, atol=1e-12)
        assert covered == n[b] + H - 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.lists(st.integers(W // K, N // K), min_size=4, max_size=4))
def test_an_entry_predicts_the_token_after_its_span(seed, n):
    mc, n = MegaContext(MCConfig(**SMALL), 32), K * torch.tensor(n)
    entries = random_entries(mc, seed, n)
    for count, before in ((R + H - 1, R), (W + H - 1, W), (H, 1)):
        read = read_rows(entries, K, count, before)
        for b in range(4):
            rows = [(int(s), int(t)) for s, t, v in zip(read.slot_BP[b], read.token_BP[b], read.valid_BP[b]) if v]
            assert len(rows) == len(set(rows)), "an entry is read twice"
            for slot, token in rows:
                assert entries.lod_BM[b, slot] == 0 and token == entries.index_BM[b, slot]
            used = int(entries.used_B[b])
            wanted = range(max(used - before, 0), used + count - before)
            assert [s for s, _ in rows] == [s for s in wanted if entries.valid_BM[b, s] and entries.lod_BM[b, s] == 0]
    gists = entries.valid_BM & (entries.lod_BM > 0)
    read = read_rows(entries, K, W + H - 1, W)
    token = torch.zeros_like(entries.lod_BM).scatter(1, read.slot_BP, read.token_BP)
    # gists follow the same rule
    assert torch.equal(token[gists], ((entries.index_BM + 1) * K**entries.lod_BM - 1)[gists])


def test_with_continuation_appends_right_behind_each_rows_cut():
    mc, n = MegaContext(MCConfig(**SMALL), 32), torch.tensor([56, 40, 32, 48])
    cut = mc.allocator.cut(mc.allocator.allocate(torch.full((4, N // K), -torch.inf), n))[0]
    entries = with_continuation(cut, n, 7)
    assert entries.lod_BM.shape == (4, W + 7)
    for b in range(4):
        used = int(cut.valid_BW[b].sum())
        assert entries.used_B[b] == used < W
        for whole, part in zip(entries[:2], cut[:2]):
            assert whole[b, :used].tolist() == part[b, :used].tolist() and not whole[b, used + 7:].any()
        assert entries.lod_BM[b, used:used + 7].tolist() == [0] * 7
        assert entries.index_BM[b, used:used + 7].tolist() == list(range(int(n[b]), int(n[b]) + 7))
        assert entries.valid_BM[b].tolist() == [True] * (used + 7) + [False] * (W - used)


@torch.no_grad()
def test_only_raw_entries_that_follow_their_predecessor_are_linked(monkeypatch):
    gpt = tiny_base()
    mc = mega(gpt)
    entries, seen = random_entries(mc), spy(gpt, monkeypatch)
    run_entries(gpt, mc, mc.build_tree(gpt.embed(tokens)), tokens, entries)
    for b in range(4):
        shown = [(int(x), int(i)) for x, i, v in zip(*(y[b] for y in entries[:3])) if v]
        follows = [w > 0 and shown[w][0] == shown[w - 1][0] == 0 and shown[w][1] == shown[w - 1][1] + 1
                   for w in range(len(shown))]
        assert seen["linked"][b].tolist() == follows + [False] * (W + H - 1 - len(shown))
        assert (seen["idx"][b] >= 0).tolist() == [x == 0 for x, _ in shown] + [False] * (W + H - 1 - len(shown))
        assert seen["key_bias"][b][:len(shown)].gt(0).tolist() == [x > 0 for x, _ in shown]
    assert 5 < seen["linked"].sum() < entries.valid_BM.sum() - 20


@torch.no_grad()
def test_smear_and_key_shift_stop_at_gists(monkeypatch):
    """A gist's vector reaches the first layer's keys at its own entry alone; a token's reaches the next token's too."""
    gpt = tiny_base()
    mc = mega(gpt)
    entries, tree = random_entries(mc), mc.build_tree(gpt.embed(tokens))

    def keys(table) -> torch.Tensor:
        seen = spy(gpt, monkeypatch)
        run_entries(gpt, mc, type(tree)(table, tree.shape), tokens, entries)
        monkeypatch.undo()
        return seen["captured"][0].k[0].transpose(0, 1)

    lod, index = entries.lod_BM[0].tolist(), entries.index_BM[0].tolist()
    gist = next(w for w in range(W) if lod[w] > 0 and lod[w + 1] == 0)
    token = next(w for w in range(W) if lod[w:w + 3] == [0, 0, 0] and index[w + 1] == index[w] + 1)
    before = keys(tree.table_BND)
    for slot, reach in ((gist, {gist}), (token, {token, token + 1, token + 2})):
        table = tree.table_BND.clone()
        table[0, tree.shape.node_row(lod[slot], index[slot])] *= -1
        table[0, tree.shape.node_row(lod[slot], index[slot])] += 1
        changed = (keys(table) != before).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(changed) <= reach and {slot} <= set(changed) and (len(reach) == 1 or token + 1 in changed)


@torch.no_grad()
def test_an_entrys_output_depends_on_what_stands_before_it_alone():
    gpt = tiny_base()
    mc = mega(gpt)
    entries, tree = random_entries(mc), mc.build_tree(gpt.embed(tokens))
    out = run_entries(gpt, mc, tree, tokens, entries)
    other = tokens.clone()
    other[:, N] = (other[:, N] + 1) % 50
    changed = run_entries(gpt, mc, mc.build_tree(gpt.embed(other)), other, entries) != out
    for b, used in enumerate(entries.used_B.tolist()):
        assert not changed[b, :used].any() and changed[b, used:used + H - 1].any(-1).all()


@torch.no_grad()
def test_padding_changes_nothing():
    gpt = tiny_base()
    mc = mega(gpt)
    entries, tree = random_entries(mc), mc.build_tree(gpt.embed(tokens))
    out = run_entries(gpt, mc, tree, tokens, entries)
    padded = Entries(*(torch.nn.functional.pad(x, (0, 6)) for x in entries[:3]), entries.used_B)
    got = run_entries(gpt, mc, tree, tokens, padded)[:, :out.shape[1]]
    torch.testing.assert_close(got[entries.valid_BM], out[entries.valid_BM], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_far_history_is_a_longer_cut_in_time_order():
    """Against one row at a time, its entries put in order by hand, no padding."""
    gpt = tiny_base(rope_fraction=0.5, n_kv_head=4)
    mc = mega(gpt)
    entries, tree = random_entries(mc), mc.build_tree(gpt.embed(tokens))
    far_config = MCConfig(**{**vars(mc.config), "far_tokens": 200, "far_entries": 24})
    far = draw_far_history(far_config, mc.gistnet, gpt.embed(tokens), torch.arange(4), slice(None),
                           torch.full((4,), N), 1, 0, 7)
    out = run_entries(gpt, mc, tree, tokens, entries, far)
    start, far_start, far_length = place_far(entries.index_BM * K**entries.lod_BM, far)
    assert out.shape[1] == entries.lod_BM.shape[1] and (far_length.sum(1) > 0).sum() > 2 and len((start != entries.index_BM * K**entries.lod_BM).any(1).unique()) == 2  # noqa: E501
    for b in range(4):
        own = [(int(start[b, w]), int(entries.lod_BM[b, w]), w) for w in range(out.shape[1]) if entries.valid_BM[b, w]]
        stored = [(int(far_start[b, f]), int(far.cut.lod_BW[b, f]), ~f) for f in range(24) if far.cut.valid_BW[b, f]]
        both = sorted(own + stored, key=lambda e: e[0])
        at, lod = (torch.tensor([e[i] for e in both])[None] for i in (0, 1))
        ids = torch.tensor([[int(tokens[b, entries.index_BM[b, w]]) if level == 0 else -1 for _, level, w in both]])
        vectors = torch.stack([tree.gather(entries.lod_BM, entries.index_BM, entries.valid_BM)[b, w] if w >= 0
                               else far.vectors_BFD[b, ~w] for *_, w in both])
        linked = torch.tensor([[i > 0 and both[i][1] == both[i - 1][1] == 0 and both[i][0] == both[i - 1][0] + 1
                                for i in range(len(both))]])
        rotary = entry_rotary(gpt, at, K**lod)
        hidden = gpt.hidden(ids, inputs_embeds=vectors[None], rotary=rotary, linked=linked,
                            key_bias=mc.key_bias(lod))[0]
        for i, (*_, w) in enumerate(both):
            if w >= 0:
                torch.testing.assert_close(out[b, w], hidden[i], rtol=0, atol=1e-9)


@torch.no_grad()
def test_an_empty_far_history_changes_nothing():
    gpt = tiny_base()
    mc = mega(gpt)
    entries, tree = random_entries(mc), mc.build_tree(gpt.embed(tokens))
    nothing = torch.zeros(4, 6, dtype=torch.int64)
    far = FarHistory(Cut(nothing, nothing, nothing.bool(), K), torch.zeros(4, 6, 32).double(), torch.zeros(4).long(),
                     torch.tensor([20, 0, 16, 40]))
    out, plain = run_entries(gpt, mc, tree, tokens, entries, far), run_entries(gpt, mc, tree, tokens, entries)
    torch.testing.assert_close(out[entries.valid_BM], plain[entries.valid_BM], rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [{"positions": "centre"}, {"positions": "contiguous"}, {"damping_floor": 0.7}])
@torch.no_grad()
def test_position_settings_change_the_pass(config):
    gpt = tiny_base(n_kv_head=4, rope_fraction=0.5)
    plain, other = mega(gpt), mega(gpt, **config)
    entries, tree = random_entries(plain), plain.build_tree(gpt.embed(tokens))
    assert not torch.allclose(run_entries(gpt, plain, tree, tokens, entries),
                              run_entries(gpt, other, tree, tokens, entries))


@torch.no_grad()
def test_rows_are_independent_and_follow_their_permutation():
    gpt = tiny_base()
    mc = mega(gpt)
    order, entries, embeds = torch.tensor([2, 0, 3, 1]), random_entries(mc), gpt.embed(tokens)
    out = run_entries(gpt, mc, mc.build_tree(embeds), tokens, entries)
    again = run_entries(gpt, mc, mc.build_tree(embeds[order]), tokens[order], Entries(*(x[order] for x in entries)))
    torch.testing.assert_close(again, out[order], rtol=0, atol=1e-12)


def test_recency_scores_and_take():
    assert recency_scores(torch.tensor([8, 4]), 3).tolist() == [[0, 1, 2]] * 2
    x = torch.randn(2, 5, 3)
    assert torch.equal(take(x, torch.tensor([[4, 0], [1, 1]])), torch.stack([x[0, [4, 0]], x[1, [1, 1]]]))


def test_config_survives_flags_and_dicts():
    parser = FlagParser()
    add_flags(parser)
    assert from_flags(parser.parse_args([])) == MCConfig()
    config = from_flags(parser.parse_args(["--mc_budget=64", "--mc_gist=mean", "--mc-start", "0.5"]))
    assert config == MCConfig(budget=64, gist="mean", start=0.5) == from_dict(to_dict(config))
    with pytest.raises(UserError, match="unknown fields: colour"):
        from_dict({"colour": 1})


def test_flags_of_an_arm_are_there_when_it_is_named():
    plain, arms = FlagParser(), FlagParser()
    argv = ["--mc_arms=contrast,kl", "--mc-teacher", "counterfactual:1,attention:0.5", "--mc_lens_kl=0.3"]
    add_flags(plain, [])
    add_flags(arms, argv)
    added = {a.dest for a in arms._actions} - {a.dest for a in plain._actions}
    assert added == {"mc_contrast_weight", "mc_lens_kl", "mc_lens_edits"}
    config = from_flags(arms.parse_args(argv))
    assert config.of_arms == {"contrast_weight": 0.1, "lens_kl": 0.3,
                              "lens_edits": 8} and config == from_dict(to_dict(config))
    with pytest.raises(UserError, match="--mc_lens_rank is a setting of the arm rank; name it too: --mc_arms=rank"):
        add_flags(FlagParser(), ["--mc_lens_rank=0.5"])
    with pytest.raises(UserError, match="name it too: --mc_teacher=counterfactual"):
        add_flags(FlagParser(), ["--mc-lens-edits", "4"])
    with pytest.raises(UserError, match="there is no arm contrats; there are several"):
        add_flags(FlagParser(), ["--mc_arms=contrats"])


BEFORE_ARMS = dict(gist="slots", teacher="gate", gists_per_block=1, gist_source="embeddings", contrast_weight=0.0,
                   horizon_gist_weight=0.0, bands=0, lens_rank=0.0,
                   # what every checkpoint said of them when it used none
                   lens_zero_sum=0.0, lens_illegal=0.0, lens_kl=0.0, lens_edits=8)


def test_checkpoints_from_before_arms_are_read_as_what_they_used():
    assert from_dict(BEFORE_ARMS | RETIRED) == MCConfig(gist="slots", teacher="gate", far_tokens=0)
    used = from_dict(BEFORE_ARMS | dict(contrast_weight=0.2, bands=1, gist_source="hidden", lens_kl=0.3))
    assert used.named_arms() == ["hidden", "contrast", "bands", "kl", "gist_slots",
                                 "gate"] and used.of("lens_kl") == 0.3 and used.gist_source == "hidden"
    assert from_dict(to_dict(used)) == used


@pytest.mark.parametrize("name, value", [("lens_normalize", 1), ("gist_pool", "cls"), ("gist_head", "mlp"),
                                         ("gist_shared", 0), ("targets", "raw"), ("split", "random"),
                                         ("lod_axis", 1), ("alibi", 1), ("max_gap", 3), ("far_nodes", 8)])
def test_checkpoints_that_used_what_is_gone_are_refused(name, value):
    with pytest.raises(UserError, match=f"made with {name}={value}, which this version does not have"):
        from_dict({name: value})


def test_settings_of_arms_are_in_what_histories_are_named_by():
    """A fingerprint is that of the version which had every setting: old histories are found again."""
    every = complete(MCConfig(gist="slots", teacher="gate"))
    assert set(BEFORE_ARMS) | set(RETIRED) <= set(every) and all(every[name] == value
                                                                 for name, value in (BEFORE_ARMS | RETIRED).items())
    assert complete(from_dict({"gist_source": "hidden"}))["gist_source"] == "hidden" and complete(from_dict({"gists_per_block": 2}))["gists_per_block"] == 2  # noqa: E501


@pytest.mark.parametrize("wrong, message", [
    ({"gist": "sum"}, "use one of mean"), ({"budget": 0}, "at least 1"), ({"block_size": 1}, "at least 2"),
    ({"start": 1.0}, r"in \[0, 1\)"), ({"damping_floor": 1.5}, r"in \[0, 1\]"), ({"recent": 33}, "not a multiple"),
    ({"lens_queries": 8, "lens_horizon": 8}, "must exceed"),
    ({"positions": "centre", "damping_floor": 0.2}, "no effect"),
    ({"cuts": "random:0.5"}, "sum to 1"), ({"cuts": "random:x"}, "not policy:share"),
    ({"cuts": "best:1"}, "shares of"), ({"cuts": "random:2,lens:-1"}, "≥ 0"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        MCConfig(**wrong)


@pytest.mark.parametrize("budget, recent, protected",
                         [(128, 0, 32), (1024, 0, 128), (64, 0, 32), (4096, 0, 128), (128, 64, 64)])
def test_protected_tokens_are_whole_blocks(budget, recent, protected):
    assert MCConfig(budget=budget, recent=recent).protected == protected


def test_a_saved_mega_context_is_loaded_as_it_was(tmp_path):
    gpt = tiny_base(dtype=torch.float32)
    mc = tiny_mc(gpt)
    randomize(mc.model, seed=5)
    meta = {"mc": mc.meta()}
    save_checkpoint(tmp_path, 1, model=gpt.state_dict(), optimizer_shard={}, meta=meta, mc=mc.state_dict(), loader={})
    loaded = load_mega_context(tmp_path, 1, meta, gpt.config.n_embd)
    assert loaded.config == mc.config and meta["mc"]["trained_lods"] == [1, 2]
    assert loaded.state_dict().keys() == mc.state_dict().keys()
    assert all(torch.equal(x, mc.state_dict()[name]) for name, x in loaded.state_dict().items())
    with pytest.raises(UserError, match="no MegaContext"):
        load_mega_context(tmp_path, 1, {}, gpt.config.n_embd)


def test_fingerprint_is_of_what_is_stored():
    """Histories stay readable where only training or the budget differs; not where their
    gists or keys would be others."""
    gpt = tiny_base()
    same, other = mega(gpt), mega(gpt, wc_weight=0.7, lens_queries=16, budget=W + 8)
    other.load_state_dict(same.state_dict())
    stored = fingerprint(gpt, same)
    assert fingerprint(gpt, other) == stored
    assert fingerprint(gpt, mega(gpt, lens_keys=4)) != stored
    with torch.no_grad():
        next(other.gistnet.parameters()).add_(1e-3)
    assert fingerprint(gpt, other) != stored
