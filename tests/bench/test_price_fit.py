"""The learned price: its fit finds a rule that is there, and its examples are what the teachers and the lens say."""

import torch
from tiny_mc import VOCAB, randomize, tiny_base

from mc.config import MCConfig
from mc.focus_allocator import FocusConfig
from mc.model import MegaContext
from mc.session.price import MARKET, room
from scripts.bench.price import Examples, refocus_examples, fit_price, gained

torch.set_num_threads(1)


def rule(count: int, seed: int) -> Examples:
    """Blocks are worth showing above 0.6 · best + 0.5, whatever the budget holds; one in four is no rival."""
    gen = torch.Generator().manual_seed(seed)
    logits_XN = 2 * torch.randn(count, 12, generator=gen).double() + 3 * torch.rand(count, 1, generator=gen)
    logits_XN[:, 8:11] = -torch.inf
    worth_XN = (logits_XN - 0.6 * logits_XN.amax(1, keepdim=True) - 0.5).sign() * 0.3
    return Examples(logits_XN, worth_XN, torch.full((count,), 3))


def test_the_fit_finds_the_rule():
    fitted, judged = rule(300, 0), rule(300, 1)
    weights = fit_price(fitted, 0.0)
    market, learned = (gained(judged, w, 0.0).mean() for w in (MARKET, weights))
    most = judged.utility_XN.clamp_min(0).masked_fill(judged.logits_XN.isinf(), 0).sum(1).mean()
    assert learned > 0.7 * most and market < 0.5 * most, (weights, learned, most, market)


def test_a_place_is_worth_the_last_block_that_the_lens_would_put_there():
    utility_XN = torch.tensor([[5.0, 3.0, 9.0, 1.0], [-1.0, -2.0, -3.0, 4.0]]).double()
    logits_XN = torch.tensor([[0.0, 2.0, -torch.inf, 1.0], [1.0, 2.0, 3.0, 4.0]]).double()
    assert Examples(logits_XN, utility_XN, torch.tensor([2, 1])).place() == (1 + 4) / 2
    assert Examples(logits_XN, -utility_XN, torch.tensor([2, 1])).place() == 0, "nobody pays for what harms"


def test_examples_are_of_one_query_per_refocus_and_of_rivals_only():
    gpt, K, T, interval = tiny_base(), 4, 64, 8
    mc = MegaContext(MCConfig(block_size=K, max_lod=2, gist_width=16, budget=32, horizon=8, lens_key_dim=16,
                              lens_keys=2, lens_queries=24, lens_horizon=4),
                     gpt.config.n_embd).double()
    randomize(mc)
    cfg: FocusConfig = mc.focus_config()
    tokens = torch.randint(VOCAB, (3, T + 1), generator=torch.Generator().manual_seed(0))
    found = refocus_examples(gpt, mc, cfg, tokens[:, :-1], tokens[:, 1:], interval)
    cursors = torch.arange(T // 2 + 1, T - interval + 2, interval)
    assert found.logits_XN.shape == found.utility_XN.shape == (3 * len(cursors), (T - cfg.recent) // K)
    assert torch.equal(found.room_X, room(cursors, cfg).repeat(3))
    embeds = gpt.embed(tokens[:, :-1])
    for i, cursor in enumerate(cursors.tolist()):  # the first row, one query after the other
        rivals = (cursor - cfg.recent) // K
        assert found.logits_XN[i, rivals:].isinf().all()
        want = mc.lens_logits(embeds[:1, :cursor], torch.tensor([cursor]))[0, :rivals]
        torch.testing.assert_close(found.logits_XN[i, :rivals], want, atol=1e-9, rtol=0)
    later = tokens.clone()
    later[:, T // 2 + 1:] = 0  # what comes after the first query: its lens does not see it
    again = refocus_examples(gpt, mc, cfg, later[:, :-1], later[:, 1:], interval)
    first = torch.arange(3) * len(cursors)
    torch.testing.assert_close(again.logits_XN[first], found.logits_XN[first])
