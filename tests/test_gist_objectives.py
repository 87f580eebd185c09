"""D3, D5, C5: the terms on gists themselves reach what they are for, and nothing else; bands; gists of hidden states; arms side by side."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc import gist_benchmark
from mc.focus_allocator import FocusConfig, GreedyAllocator, check_feasible, entries_needed
from mc.gist_objectives import BAND_EDGES, HorizonHead, blocks_in_band, contrast_loss, entries_shown, naming
from mc.losses import row_mean
from mc.model import MegaContext
from mc.working_context import entries_used
from nanochat.common import UserError
from nanochat.dataloader import make_source
from nanochat.gpt import token_losses
from tiny_mc import K, T, VOCAB, planted, randomize, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)


def reached(*modules) -> set[str]:
    return {f"{i}.{name}" for i, m in enumerate(modules) for name, p in m.named_parameters() if p.grad is not None and p.grad.any()}


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
            assert reached(gpt, mc) == {"0.transformer.wte.weight"} | {f"1.gistnet.{name}" for name, _ in mc.gistnet.named_parameters()}
    assert losses[-1] < losses[0] - 0.3
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
    assert said == ("" if all(taught) else "note: --mc_horizon_gist_weight=1.0 teaches nothing at LOD2, of which a row of 31 tokens has fewer than two nodes; "
                                           "it would with a --max_seq_len of 32\n")
    tiny_mc(gpt, T=T, budget=16, lens_queries=8)
    assert not capsys.readouterr().err


def test_the_horizon_is_foreseen_from_the_past_and_is_the_next_node():
    """The query of node i does not change with what comes after it, and names node i + 1: a head that is told so has nothing to lose."""
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


def shown(scores: torch.Tensor, blocks_B: torch.Tensor, n_B: torch.Tensor, cfg: FocusConfig) -> torch.Tensor:
    """[B] entries of the allocator's cut that shows so many of the best blocks."""
    rank = scores.argsort(1, descending=True).argsort(1)
    state = GreedyAllocator(cfg).allocate(scores.masked_fill(rank >= blocks_B[:, None], -torch.inf), n_B)
    return entries_used(GreedyAllocator(cfg).cut(state)[0])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([3, 4, 8]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 2**20), st.booleans())
def test_the_entries_of_a_cut_are_known_before_it_is_made(k, max_lod, n_gists, recent, seed, latest_first):
    """Of as many of the best blocks as one likes: those of one parent share their path, those in the tail are raw anyway."""
    gen = torch.Generator().manual_seed(seed)
    n_B = torch.randint(recent * k, 200, (48,), generator=gen)
    blocks = 200 // k
    cfg = FocusConfig(256, k, max_lod, recent=recent * k, n_gists=n_gists)
    scores = torch.arange(blocks).float().expand(48, -1) if latest_first else torch.rand(48, blocks, generator=gen)
    blocks_B = torch.randint(blocks + 1, (48,), generator=gen)
    known = entries_shown(scores.argsort(1, descending=True).argsort(1), n_B, cfg)
    assert torch.equal(known.gather(1, blocks_B[:, None])[:, 0], shown(scores, blocks_B, n_B, cfg))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([4, 8]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**20), st.floats(0, 1), st.booleans(), st.sampled_from([2, 4, 5]))
def test_bands_open_one_after_the_other_and_are_what_the_cuts_have(k, max_lod, n_gists, seed, done, latest_first, ratio):
    n, gen = 512, torch.Generator().manual_seed(seed)
    cfg = FocusConfig(n // ratio, k, max_lod, recent=k, n_gists=n_gists)
    if sum(entries_needed(n, cfg)) > cfg.budget:
        return
    draw_B, n_B = torch.rand(64, generator=gen), torch.full((64,), n)
    scores = torch.arange(n // k).float().expand(64, -1) if latest_first else torch.rand(64, n // k, generator=gen)
    scores = scores.masked_fill(torch.arange(n // k) == n // k - 1, -torch.inf)  # the tail
    rank = scores.argsort(1, descending=True).argsort(1)
    entries_B = shown(scores, blocks_in_band(draw_B, done, n_B, rank, cfg), n_B, cfg)
    bands, reach_BN = min(int(3 * done) + 1, 3), entries_shown(rank, n_B, cfg)
    block = sum(map(cfg.price, range(1, max_lod + 1)))
    for draw, entries, reach in zip(draw_B.tolist(), entries_B.tolist(), reach_BN.tolist()):
        band = int(draw * bands)
        most, least = (max(min(n / edge if edge else n, cfg.budget), reach[0]) for edge in ((0.0, *BAND_EDGES)[band], BAND_EDGES[band]))
        if any(least <= x <= most for x in reach):
            assert least <= entries <= most
        assert abs(entries - most * (least / most) ** (draw * bands - band)) <= block, "log-uniform within the band, in whole blocks"


@pytest.mark.parametrize("policy", ["random", "recency"])
def test_training_begins_with_cuts_of_at_most_five_tokens_per_entry(policy):
    gpt, history = tiny_base(sequence_len=256), 248
    mc = tiny_mc(gpt, T=256, budget=64, bands=1, cuts=f"{policy}:1", micro_batch=8)
    used = mc.training_step(gpt, tiny_batch(range(8), T=256), 0).primary.used_B
    assert (used >= history / BAND_EDGES[0]).all()


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
    assert reached(gpt, mc) - {"0.transformer.wte.weight"} == {f"1.gistnet.{n}" for n, _ in mc.gistnet.named_parameters()}


@pytest.fixture(scope="module")
def arms_alone_and_together():
    base = tiny_base(dtype=torch.float32, sequence_len=64).requires_grad_(False)
    settings = ["gist=transformer,block_size=4,gist_width=16", "gist=slots,block_size=8,gists_per_block=2,gist_width=16,frozen=1",
                "gist=mean,block_size=4,kl_weight=0", "window=19"]
    source = make_source("random", "train", T=40, seed=0, tokenizer=type("Tokens", (), {"vocab_size": VOCAB})())

    def train(texts: list[str]) -> list[gist_benchmark.Arm]:
        arms = [gist_benchmark.make_arm(text, base, 0, 8, 8, 32) for text in texts]
        gist_benchmark.train(arms, base, source, 3, 2, 40, 32, 8)
        return arms

    return base, train(settings), [train([text])[0] for text in settings]


def test_arms_trained_together_are_the_arms_trained_alone(arms_alone_and_together):
    base, together, alone = arms_alone_and_together
    for a, b in zip(together, alone):
        for (name, x), y in zip([*a.mc.named_parameters(), *a.gpt.named_parameters()], [*b.mc.parameters(), *b.gpt.parameters()]):
            assert torch.equal(x, y), (a.name, name)
    assert together[1].gpt is base and together[0].gpt is not base
    moved = [name for name, p in together[0].gpt.named_parameters() if not torch.equal(p, dict(base.named_parameters())[name])]
    assert moved and not any("wte" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("window", [8, 13, 32])
def test_a_window_arm_is_trained_on_what_follows_its_last_raw_tokens_alone(window):
    base = tiny_base(dtype=torch.float32, sequence_len=40)
    arm = gist_benchmark.make_arm(f"window={window},kl_weight=0", base, 0, 8, 8, 32)
    batch = tiny_batch(T=40)
    tokens, targets = batch.inputs, batch.targets
    loss = lambda rows: gist_benchmark.loss_of(arm, rows, targets, None, None, 32)
    alone = arm.gpt.hidden(tokens[:, 32 - window:], positions=torch.arange(32 - window, 40))[:, -16:-1]  # 8 recent tokens, and the continuation but its last
    wanted = row_mean(token_losses(arm.gpt.logits(alone), targets[:, 24:39]), targets[:, 24:39] >= 0).mean()
    torch.testing.assert_close(loss(tokens), wanted)
    other = tokens.clone()
    other[:, :32 - window] = (other[:, :32 - window] + 1) % VOCAB
    assert torch.equal(loss(other), loss(tokens))
    other[:, 32 - window] = (other[:, 32 - window] + 1) % VOCAB
    assert not torch.equal(loss(other), loss(tokens))


@pytest.mark.parametrize("text", ["gist=slots,depth=3", "gist=slots,block_size=x", "gist=slots,block_size=4,lod=2",
                                  "gist=slots,block_size=4,bands=1", "window=7", "window=33", "window=16,frozen=1", "window=16,block_size=4"])
def test_arms_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="--arms"):
        gist_benchmark.parse(text, 8, 8, 32)


@pytest.mark.parametrize("text", ["gist=mean,block_size=8,max_lod=2", "gist=mean,block_size=32,max_lod=2", "gist=slots,block_size=16,max_lod=2,gists_per_block=2", "gist=mean,block_size=8"])
def test_an_arm_has_the_entries_that_its_judge_asks_for(text):
    config, _, _ = gist_benchmark.parse(text, 32, 64, 1024)
    check_feasible(1024, MegaContext(config, 16).focus_config())


def test_an_arm_is_trained_on_the_next_token():
    """A base that says the next of a counting row: no loss on targets that follow, a large one on the tokens themselves (trap 1)."""
    tokens = (torch.arange(41) + 3 * torch.arange(4)[:, None]) % 40
    losses = []
    for shift in (1, 0):
        arm = gist_benchmark.make_arm("gist=mean,block_size=4,kl_weight=0,frozen=1", planted(shift), 0, 8, 8, 32)
        arm.mc.double()
        losses.append(gist_benchmark.loss_of(arm, tokens[:, :-1], tokens[:, 1:], None, None, 32).item())
    assert losses[0] < 0.01 and losses[1] > 10


@pytest.mark.parametrize("term", ["wc_weight", "kl_weight", "contrast_weight"])
def test_every_term_of_an_arm_teaches_gistnet(term):
    base, batch, found = tiny_base(dtype=torch.float32, sequence_len=40), tiny_batch(T=40), []
    with torch.no_grad():
        teacher = base.logits(base.hidden(batch.inputs)[:, 24:-1])
    for weight in (1, 2):
        arm = gist_benchmark.make_arm(f"gist=slots,block_size=4,gist_width=16,{term}={weight}", base, 0, 8, 8, 32)
        randomize(arm.mc.gistnet)
        gist_benchmark.loss_of(arm, batch.inputs, batch.targets, teacher, None, 32).backward()
        found.append([p.grad for p in arm.mc.gistnet.parameters()])
    assert not any(torch.equal(a, b) for a, b in zip(*found))


def test_an_arms_optimizer_has_gistnet_and_the_bases_body():
    arm = gist_benchmark.make_arm("gist=slots,block_size=4,gist_width=16", tiny_base(dtype=torch.float32, sequence_len=40), 0, 8, 8, 32)
    have = [id(p) for group in arm.optimizer.param_groups for p in group["params"]]
    body = (p for name, p in arm.gpt.named_parameters() if not name.startswith(("transformer.wte", "lm_head", "value_embeds")))
    assert sorted(have) == sorted(map(id, [*arm.mc.gistnet.parameters(), arm.mc.gist_bias, *body]))
