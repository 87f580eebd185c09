"""What studies judge a lens by."""

import copy

import pytest
import torch
from tiny_mc import VOCAB, H, K, R, T, W, randomize, tiny_base, tiny_batch, tiny_mc

from mc.teachers import gate_utility, keep_gradients
from nanochat.gpt import token_losses
from scripts.eval import measures
from scripts.eval.comparison import FocusComparison
from scripts.eval.measures import taught
from scripts.eval.methods.interface import Models
from scripts.eval.methods.registry import make_method
from scripts.eval.probe import replay

torch.set_num_threads(1)
CURSORS, HORIZON = torch.tensor([41, 48, 55]), 3


@torch.enable_grad()
def utility_at(gpt, batch, cursor: int) -> torch.Tensor:
    """[B, N] one cursor, one pass of its own."""
    captured, queries = [], slice(cursor - 1, cursor - 1 + HORIZON)
    embeds = gpt.embed(batch.inputs).detach().requires_grad_()
    hidden = gpt.hidden(batch.inputs, inputs_embeds=embeds, capture=captured)
    keep_gradients(captured)
    losses = token_losses(gpt.logits(hidden), batch.targets)
    torch.autograd.grad(losses.sum(), embeds)
    count = (cursor - R) // K
    return (gate_utility(captured, slice(None), queries, count, K) * (batch.targets[:, queries] >= 0)[..., None]).sum(1)


def test_a_lens_is_measured_against_what_each_block_wins():
    """Against one pass per cursor and row; a lens that knows the utilities wins what can be won."""
    gpt, batch = tiny_base(), tiny_batch()
    mc = tiny_mc(gpt).model
    found = taught(gpt, mc, batch.inputs, batch.targets, CURSORS, HORIZON)
    most = (W - R) // K
    nats, weights, hits, won = [], [], [], {name: [] for name in ("lens", "best", "recency", "even")}
    for cursor in CURSORS.tolist():
        utility = utility_at(gpt, batch, cursor)
        logits = mc.lens_logits(gpt.embed(batch.inputs), torch.full((4,), cursor))[:, :utility.shape[1]]
        useful = utility.clamp_min(0)
        target = useful / useful.sum(1, keepdim=True)
        nats.append(-(target
                      * logits.log_softmax(1)).sum(1)), weights.append(useful.sum(1)), hits.append((logits.argmax(1) == utility.argmax(1)).double())  # noqa: E501
        won["lens"].append(utility.gather(1, logits.topk(most, 1).indices).sum(1))
        won["best"].append(useful.topk(most, 1).values.sum(1))
        won["recency"].append(utility[:, -most:].sum(1))
        won["even"].append(utility.mean(1) * most)
    weight = torch.stack(weights)
    for name, values in (("nats_lens", nats), ("hit_lens", hits)):
        torch.testing.assert_close(found[name], (torch.stack(values) * weight).sum(0) / weight.sum(0),
                                   check_dtype=False)
    for name, values in won.items():
        torch.testing.assert_close(found[f"won_{name}"], torch.stack(values).mean(0), check_dtype=False)
    assert (found["nats_lens"] > found["nats_least"]).all() and (found["nats_even"] >= found["nats_least"]).all()


@pytest.mark.parametrize("lens", ["bilinear", "slots"])
def test_a_lens_that_knows_wins_all_and_one_that_is_blank_is_even(lens, monkeypatch):
    gpt, batch = tiny_base(), tiny_batch()
    mc = tiny_mc(gpt, lens=lens).model
    knows = lambda embeds, n_B, *_: torch.nn.functional.pad(utility_at(gpt, batch, int(n_B[0])), (0, T // K),
                                                            value=-torch.inf)[:, :T // K]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(mc, "lens_logits", knows)
        found = taught(gpt, mc, batch.inputs, batch.targets, CURSORS, HORIZON)
    assert (found["hit_lens"] == 1).all()
    ceiling = found["won_best"] - found["won_lens"]  # where fewer than it may show would help, it shows some that hurt
    assert (ceiling >= -1e-12).all()
    with monkeypatch.context() as patch:
        patch.setattr(mc, "lens_logits", lambda embeds, n_B, *_: torch.full((4, T // K), 0.7, dtype=torch.float64))
        blank = taught(gpt, mc, batch.inputs, batch.targets, CURSORS, HORIZON)
    torch.testing.assert_close(blank["nats_lens"], blank["nats_even"])
    assert (blank["won_lens"] <= found["won_lens"]).all()


def test_a_lens_that_looks_again_is_judged_as_the_system_that_does(monkeypatch):
    """Batches cut the contexts; `every_N` with as many tokens as are judged is one look."""
    gpt = tiny_base()
    mc, n = tiny_mc(gpt).model, (gpt.config.sequence_len - H) // K * K
    tokens = torch.randint(VOCAB, (4, n + H + 1), generator=torch.Generator().manual_seed(0))
    rows, tokens, targets = torch.arange(4), tokens[:, :-1], tokens[:, 1:]
    asked = []

    def held_out(meta, length, contexts, size, data):
        asked.append((length, contexts, data))
        for first in range(0, contexts, size):
            part = slice(first, first + size)
            yield rows[part], tokens[part], targets[part]

    monkeypatch.setattr(measures, "load_with_mc", lambda _: (gpt, mc, {}))
    monkeypatch.setattr(measures, "held_out", held_out)
    monkeypatch.setenv("CORPUS", "somewhere")
    found = measures.intervals(None, {"code": "$CORPUS/code", "prose": "p"}, [1, 3, H], contexts=4, horizon=H, batch=3)
    assert asked == [(n + H, 4, "somewhere/code"), (n + H, 4, "p")]
    assert set(found) == {f"nll_{text}_{name}" for text in ("code", "prose")
                          for name in ("full", "window", "recency", "every_1", "every_3", f"every_{H}")}
    for name, system in {"full": "full", "window": "window", "recency": "gists_recency", "every_1": "gists_lens_again",
                         f"every_{H}": "gists_lens"}.items():
        whole = make_method(system, Models(gpt, mc), W).judge(tokens, targets, n, rows).outcome.nll_B
        torch.testing.assert_close(torch.tensor(found[f"nll_code_{name}"], dtype=torch.double), whole.double(), rtol=0,
                                   atol=1e-6)
    assert found["nll_code_every_1"] != found["nll_code_every_3"]


def test_what_is_more_compressed(monkeypatch):
    gpt = tiny_base()
    mc = tiny_mc(gpt).model
    n, horizon = (gpt.config.sequence_len - mc.config.horizon) // K * K, mc.config.horizon
    tokens = torch.randint(VOCAB, (4, n + horizon + 1), generator=torch.Generator().manual_seed(0))
    rows, tokens, targets = torch.arange(4), tokens[:, :-1], tokens[:, 1:]
    monkeypatch.setattr(measures, "load_with_mc", lambda _: (gpt, mc, {"flags": {"seed": 0}}))
    monkeypatch.setattr(measures,
                        "held_out", lambda meta, length, contexts, size, data: [(rows[i:i + 2],
                                                                                 tokens[i:i + 2, :length],
                                                                                 targets[i:i + 2, :length])
                                                                                for i in (0, 2)])
    found = measures.compression(None, contexts=4, batch=2, ratios=(2, 3))
    assert set(found) == {f"nll_{name}"
                          for name in ("full", "window", "recent",
                                       *(f"lod{lod}" for lod in range(1, mc.config.max_lod + 1)), "ratio_2", "ratio_3")}
    for ratio in (2, 3):
        by_recency = make_method("gists_recency", Models(gpt, mc), n // ratio).judge(tokens, targets, n,
                                                                                     rows).outcome.nll_B
        torch.testing.assert_close(torch.tensor(found[f"nll_ratio_{ratio}"], dtype=torch.double), by_recency.double(),
                                   rtol=0, atol=1e-6)
    assert len({tuple(values) for values in found.values()}) == len(found)


def test_lenses_in_use(monkeypatch):
    """Two lenses on the same rows: each as if it were alone, edited as the probe's replay edits; none beats the
    oracle; one that knows what each block gains names the best."""
    gpt, batch = tiny_base(sequence_len=T), tiny_batch()
    n, one = T - H, tiny_mc(tiny_base()).model
    other = copy.deepcopy(one)
    randomize(other.lensnet, seed=5)
    monkeypatch.setattr(measures, "held_out", lambda *_: [(batch.rows, batch.inputs, batch.targets)])
    judge = lambda lenses, **options: measures.lenses_in_use(gpt, lenses, {"flags": {"seed": 0}}, 4, **options)
    judged = lambda lenses, **options: {name: torch.tensor(x, dtype=torch.float64)
                                        for name, x in judge(lenses, **options).items()}
    found = judged({"one": one, "other": other})
    assert not torch.equal(found["nll_one"], found["nll_other"])
    comparison = FocusComparison(gpt, one, batch.inputs, batch.targets, n, 0, batch.rows)
    for name, mc in (("one", one), ("other", other)):
        alone = judged({name: mc})
        for measure in (f"nll_{name}", f"acc_{name}", f"nll_{name}_edited", f"swap_{name}", f"hit_{name}"):
            torch.testing.assert_close(found[measure], alone[measure])
        at_n = torch.full((4,), n)
        with torch.no_grad():
            shown = comparison.outcome(mc.lens_logits(gpt.embed(batch.inputs[:, :n]), at_n)).nll_B
        torch.testing.assert_close(found[f"nll_{name}"], shown.double())
        for span in (1, 3):
            grown = replay(mc, comparison.embeds, n, span=span)
            spanned = judged({name: mc}, span=span)
            edited = comparison.outcome_of(grown.state).nll_B
            torch.testing.assert_close(spanned[f"nll_{name}_edited"], edited.double())
            assert spanned[f"swap_{name}"].mean() == pytest.approx(grown.metrics()["mc.focus.swap_rate"].item())
        assert (found["nll_oracle"] <= found[f"nll_{name}"]).all() and found[f"swap_{name}"].mean() > 0
    gains_BN = comparison.nothing().nll_B[:, None] - torch.stack([x.nll_B for x in comparison.alone()], 1)
    logits_BN = torch.nn.functional.pad(gains_BN, (0, n // K - gains_BN.shape[1]), value=-1e3)
    monkeypatch.setattr(one, "lens_logits", lambda embeds, n_B, *_, **__: logits_BN)
    monkeypatch.setattr(measures, "replay", lambda of, embeds, n, span: grown)
    assert (judged({"one": one})["hit_one"] == 1).all() and (found["hit_one"] < 1).any()
