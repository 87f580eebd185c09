"""Every system: within the budget, the tail shown, the continuation unseen, a batch as its rows
alone, everything where all fits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import VOCAB, K, R, W, tiny_base, tiny_mc

from mc.working_context import check
from nanochat.common import UserError
from nanochat.gpt import Captured
from scripts.eval.comparison import plain_outcomes
from scripts.eval.methods.interface import KVChoice, Models, View, best, kv_bytes, pack, pass_flops, read_chosen
from scripts.eval.methods.kv import PAGE
from scripts.eval.methods.registry import METHODS, make_method
from scripts.eval.methods.token_classifier import TokenClassifier, TokenClassifierConfig

H = 6
CHEAP = ["random_blocks", "dense_mean", "dense_learned", "sinks", "gists_random", "drop_surprisal", "drop_learned"]
ODD = (1, 7, 31, 32, 33, 61)  # lengths of history, tokens


@pytest.fixture(scope="module")
def models() -> Models:
    gpt = tiny_base()
    with torch.no_grad():
        return Models(gpt, tiny_mc(gpt).model,
                      TokenClassifier(TokenClassifierConfig(gpt.config.n_embd, width=16, span=8)).double())


def rows(n: int, count: int = 3, seed: int = 0, extra: int = H) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + n)
    tokens = torch.randint(VOCAB, (count, n + extra), generator=generator)
    targets = torch.cat([tokens[:, 1:], torch.full((count, 1), -1)], 1)
    targets[:, ::3] = -1
    return tokens, targets, torch.arange(count) + 10


def shown_tokens(shown, n: int) -> list[set[int]]:
    """Which tokens of the history each row shows raw (of a View or a Cut)."""
    if isinstance(shown, View):
        return [set(index[valid].tolist()) for index, valid in zip(shown.index_BW, shown.valid_BW)]
    return [set(index[valid & (lod == 0)].tolist()) for lod, index, valid in zip(*shown[:3])]


def last_look(name: str) -> int:
    """Tokens of the continuation that were said when it looks for the last time."""
    interval = METHODS[name].interval
    return (H - 1) // interval * interval


@pytest.mark.parametrize("n", ODD)
@pytest.mark.parametrize("name", METHODS)
def test_no_more_than_the_budget_with_the_tail_and_in_order(models, name, n):
    system = make_method(name, models, W)
    tokens, targets, numbers = rows(n)
    with torch.no_grad():
        shown = system.show(tokens[:, :n], numbers)
    judged = system.judge(tokens, targets, n, numbers)
    limit = n if name == "full" else min(W, n)
    assert int(judged.outcome.entries_B.max()) <= (min(W, n + last_look(name)) if "_again" in name else limit)
    assert judged.outcome.nll_B.isfinite().all() and judged.cost.flops > 0 and judged.cost.bytes > 0
    if isinstance(shown, KVChoice):
        return  # the masks themselves: below
    if isinstance(shown, View):
        assert shown.valid_BW.sum(1).eq(limit).all(), "raw tokens use the whole budget"
        for index, valid in zip(shown.index_BW, shown.valid_BW):
            kept = index[valid]
            assert (kept.diff() > 0).all() and kept.max() < n and not valid[len(kept):].any()
    else:
        check(shown, torch.full((len(tokens),), n), W, max_lod=2)
    for raw in shown_tokens(shown, n):
        assert raw >= set(range(max(n - R, 0), n)), "the recent tokens are shown raw"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gists_oracle"])
def test_the_continuation_changes_nothing_before_it(models, name):
    """The first prediction is made from the history alone."""
    n = 45
    tokens, targets, numbers = rows(n)
    targets[:, n - 1] = tokens[:, n]
    system = make_method(name, models, W)
    before = system.judge(tokens, targets, n, numbers).outcome
    other = tokens.clone()
    other[:, n:] = (other[:, n:] + 7) % VOCAB
    after = system.judge(other, targets, n, numbers).outcome
    assert torch.equal(before.entries_B, after.entries_B)
    torch.testing.assert_close(before.nll_BP[:, 0], after.nll_BP[:, 0], rtol=0, atol=1e-12)
    assert not torch.allclose(before.nll_BP[:, 1:], after.nll_BP[:, 1:]), "the rest does read it"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "gists_oracle"])
def test_a_batch_gives_what_its_rows_give_alone(models, name):
    n = 51
    tokens, targets, numbers = rows(n, 4)
    system = make_method(name, models, W)
    together = system.judge(tokens, targets, n, numbers).outcome
    for i in range(4):
        alone = system.judge(tokens[i:i + 1], targets[i:i + 1], n, numbers[i:i + 1]).outcome
        torch.testing.assert_close(alone.nll_BP[0], together.nll_BP[i], rtol=0, atol=1e-11)
        assert alone.entries_B[0] == together.entries_B[i]


@pytest.mark.parametrize("n", [31, 45])
@pytest.mark.parametrize("name", [name for name in METHODS if "_again" in name])
def test_a_stretch_is_predicted_as_the_first_one_behind_its_look_would_be(models, name, n):
    tokens, targets, numbers = rows(n)
    once, again = make_method(METHODS[name].arm, models, W), make_method(name, models, W)
    judged, interval = again.judge(tokens, targets, n, numbers), again.interval
    looks = {m: once.judge(tokens[:, :m + interval], targets[:, :m + interval], m, numbers)
             for m in range(n, n + H, interval)}
    for m, look in looks.items():
        torch.testing.assert_close(judged.outcome.nll_BP[:, m - n:m - n + interval], look.outcome.nll_BP, rtol=0,
                                   atol=1e-12)
    at_once = once.judge(tokens, targets, n, numbers).outcome
    assert torch.allclose(judged.outcome.nll_BP, at_once.nll_BP) == (interval >= H), "a second look changes something"
    assert judged.outcome.entries_B.tolist() == torch.stack([look.outcome.entries_B
                                                             for look in looks.values()]).amax(0).tolist()
    assert judged.cost.flops == sum(look.cost.flops
                                    for look in looks.values()) and judged.cost.bytes == looks[max(looks)].cost.bytes
    assert METHODS[name].looks == once.looks and name == once.name + "_again" + (f"_{interval}" if interval > 1 else "")


@pytest.mark.parametrize("name", METHODS)
def test_where_all_fits_every_system_is_full_context(models, name):
    n = 29  # not a multiple of the block
    tokens, targets, numbers = rows(n)
    full = plain_outcomes(models.gpt, tokens, targets, n, 8)["full"]
    judged = make_method(name, models, W + K).judge(tokens, targets, n, numbers).outcome
    torch.testing.assert_close(judged.nll_BP, full.nll_BP, rtol=0, atol=1e-11)


def test_window_is_what_the_comparison_judges(models):
    n = 50
    tokens, targets, numbers = rows(n)
    plain = plain_outcomes(models.gpt, tokens, targets, n, W)
    for name in ("window", "full"):
        torch.testing.assert_close(make_method(name, models, W).judge(tokens, targets, n, numbers).outcome.nll_BP,
                                   plain[name].nll_BP)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(R + K, 60), st.sampled_from(CHEAP))
def test_any_length_and_budget(models, n, budget, name):
    tokens, targets, numbers = rows(n, 2)
    try:
        system = make_method(name, models, budget)
        judged = system.judge(tokens, targets, n, numbers)
    except UserError as error:
        assert "too small" in str(error) or "does not hold" in str(error)
        return
    assert int(judged.outcome.entries_B.max()) <= budget and judged.outcome.nll_B.isfinite().all()


def test_blocks_are_whole_and_the_best(models):
    n = 61
    system = make_method("dense_mean", models, W)
    tokens, _, numbers = rows(n)
    scores = system.scores(tokens[:, :n], numbers)
    count = (W - system.recent) // K
    tail = W - count * K
    for raw, score in zip(shown_tokens(system.show(tokens[:, :n], numbers), n), scores[:, :(n - tail) // K]):
        wanted = score.argsort(descending=True)[:count].tolist()
        assert raw == {t for block in wanted for t in range(block * K, (block + 1) * K)} | set(range(n - tail, n))


def test_bm25_finds_the_block_that_shares_rare_words_with_the_tail(models):
    n = 64
    tokens = torch.randint(10, (2, n + H), generator=torch.Generator().manual_seed(3))
    tokens[:, n - R:] += 20
    tokens[0, 5 * K + 1] = tokens[0, n - 2] = 40
    tokens[1, 2 * K] = tokens[1, n - 3] = 41
    scores = make_method("bm25", models, W).scores(tokens[:, :n], torch.arange(2))[:, :(n - R) // K]
    assert scores.argmax(1).tolist() == [5, 2]


@pytest.mark.parametrize("name", ["snapkv", "quest"])
@pytest.mark.parametrize("n", [33, 47, 60])
def test_kv_systems_keep_no_more_than_the_budget_and_the_tail(models, name, n):
    """Per layer, head and query, in the very masks that attention used."""
    system = make_method(name, models, W)
    tokens, _, numbers = rows(n)
    captured: list[Captured] = []
    with torch.no_grad():
        models.gpt.hidden(tokens, capture=captured, lift_windows=True)
        prefill = [Captured(layer.q[:, :, :n], layer.k[:, :, :n], layer.v, layer.y) for layer in captured]
        seen = system.show(tokens[:, :n], numbers).choose(prefill)
        for number, layer in enumerate(captured):
            mask = seen(number, layer.q[:, :, n - 1:], layer.k[:, :, :n - 1])
            mask = mask.expand(len(tokens), layer.q.shape[1], H + 1, n - 1)
            kept = mask.sum(-1) + 1  # the last token of the history sees itself
            assert int(kept.max()) <= W and int(kept.min()) > W - PAGE
            assert mask[..., n - R:].all()
            if name == "snapkv":
                assert mask.eq(mask[:, :, :1]).all(), "chosen once, for all that follows"


def test_snapkv_keeps_what_recent_tokens_attend_to(models):
    """One key that every recent query looks at hardest stays, with its neighbours."""
    n, system = 48, make_method("snapkv", models, W)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, n, 8, generator=generator) * 0.01, torch.randn(1, 2, n, 8, generator=generator) * 0.01
    q[:, :2, n - R:, 0] = k[:, 0, 13, 0] = 20  # for the heads of the first kv head only
    q[:, 2:, n - R:, 0] = k[:, 1, 30, 0] = 20
    kept = system._kept(Captured(q, k, k, q))
    assert kept[0, 0, 11:16].all() and kept[0, 1, 28:33].all()
    assert kept.sum(-1).eq(W).all()


def test_quest_bounds_hold_and_pages_are_the_best():
    from scripts.eval.methods.kv import Quest
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 4, 3, 8, generator=generator), torch.randn(2, 2, 50, 8, generator=generator)
    missing = -50 % PAGE
    bounds = Quest._bounds(q, k, missing)
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    for page in range(bounds.shape[-1]):
        span = slice(max(page * PAGE - missing, 0), (page + 1) * PAGE - missing)
        assert (bounds[..., page] >= logits[..., span].amax(-1) - 1e-5).all()
        low, high = k[:, :, span].amin(2), k[:, :, span].amax(2)
        slow = torch.maximum(q * low.repeat_interleave(2, 1)[:, :, None],
                             q * high.repeat_interleave(2, 1)[:, :, None]).sum(-1)
        torch.testing.assert_close(bounds[..., page], slow)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_best_and_pack(n, count, data):
    scores = torch.tensor([data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, -math.inf]), min_size=n, max_size=n))])
    chosen = best(scores, count)
    slow = sorted(range(n), key=lambda i: (-scores[0, i], -i))[:count]
    assert sorted(chosen[0].nonzero().flatten().tolist()) == sorted(slow)
    view = pack(chosen, count, prompt=True)
    assert view.index_BW[view.valid_BW].tolist() == sorted(slow)


def test_cost_counts_every_product(models):
    """Against the products of a pass as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode
    gpt, n, read = models.gpt, 13, 4
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gpt.logits(gpt.hidden(torch.zeros(1, n, dtype=torch.long))[:, :read])
    # torch does not count the attention kernel of a CPU
    attention = 4 * gpt.config.n_embd * gpt.config.n_layer * n * (n + 1) / 2
    assert counter.get_total_flops() + attention == pass_flops(gpt, n, read)
    c = gpt.config
    assert kv_bytes(gpt, 10) == 10 * 2 * c.n_layer * c.n_kv_head * c.head_dim * 8  # float64


def test_refusals(models):
    with pytest.raises(UserError, match="no system 'rag'"):
        make_method("rag", models, W)
    with pytest.raises(UserError, match="needs a checkpoint with MegaContext"):
        make_method("gists_lens", Models(models.gpt), W)
    with pytest.raises(UserError, match="does not hold"):
        make_method("bm25", models, 2 * K - 1)


@torch.no_grad()
def test_decoding_sees_of_the_history_what_is_chosen_and_no_more():
    """Nothing chosen: other tokens before the last one change nothing. All chosen: they do,
    and decoding is full context."""
    # neither mixes a token's key or embedding with the one before it
    gpt, n, H = tiny_base(key_shift=False, smear=False), 77, 9
    tokens = torch.randint(VOCAB, (2, n + H), generator=torch.Generator().manual_seed(0))
    other = torch.cat([tokens[:, :n - 1].roll(5, 1), tokens[:, n - 1:]], 1)

    def read(chosen: bool, of: torch.Tensor) -> torch.Tensor:
        return read_chosen(gpt, of, n,
                           KVChoice(lambda captured: lambda layer, q, k: torch.full((2, 1, q.shape[2], k.shape[2]),
                                                                                    chosen)))

    torch.testing.assert_close(read(False, tokens), read(False, other), rtol=0, atol=1e-12)
    assert (read(True, tokens) - read(True, other)).abs().max() > 1e-3
    torch.testing.assert_close(read(True, tokens), gpt.hidden(tokens[:, :-1])[:, n - 1:], rtol=0, atol=1e-11)
