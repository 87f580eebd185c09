"""Questions about long histories are put to the session itself; the oracle changes what is shown and nothing else."""

import pytest
import torch
from test_session import from_scratch, tiny_pool
from tiny_mc import VOCAB, tiny_base

from nanochat.gpt import token_losses
from scripts.eval.stream import ask, ask_window, judged, store_of

torch.set_num_threads(1)
K, N = 4, 400
ALL = torch.ones(6, dtype=torch.bool)


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


HISTORY, SAID, SCORED = tokens(N), tokens(9, 1), tokens(6, 2)


def test_an_answer_is_what_a_session_says_token_by_token():
    pool = tiny_pool(budget=60)
    answer = ask(pool, store_of(pool, HISTORY), SAID, SCORED, ALL)
    session = pool.open(store_of(pool, HISTORY))
    session.append(SAID)
    nll, right = [], []
    for token in SCORED.tolist():
        logits = session.logits()
        assert torch.allclose(logits, from_scratch(session), atol=1e-9)
        nll.append(token_losses(logits[None, None], torch.tensor([[token]])).item())
        right.append(float(logits.argmax() == token))
        session.ingest([token])
    assert answer.nll == pytest.approx(sum(nll) / 6, abs=1e-9) and answer.acc == sum(right) / 6
    assert sum(answer.lods.values()) == len(session.focus.cut()[0]) <= 60


def test_only_what_is_counted_is_judged():
    pool, counted = tiny_pool(budget=60), torch.tensor([False, True, False, True, False, False])
    logits = torch.randn(6, VOCAB)
    logits[1, SCORED[1]] = 50
    found = judged(logits, SCORED, counted, {})
    assert found.acc == (0.5 + 0.5
                         * float(logits[3].argmax() == SCORED[3])) and found.nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits[3], SCORED[3])) / 2, abs=1e-5)  # noqa: E501
    store = store_of(pool, HISTORY)
    assert ask(pool, store, SAID, SCORED, counted).nll != ask(pool, store, SAID, SCORED, ALL).nll


@pytest.mark.parametrize("blocks", [[3, 70], [0], [50, 51]])
def test_the_oracle_shows_the_blocks_it_knows(blocks, monkeypatch):
    pool, shown = tiny_pool(budget=60), []
    close = type(pool.open()).close
    for session in list(pool.sessions.values()):
        session.close()
    monkeypatch.setattr(
        "mc.session.session.Session.close", lambda self: (shown.append(self.focus.cut()),
                                                  close(self))[1])
    store = store_of(pool, HISTORY)
    known, plain = ask(pool, store, SAID, SCORED, ALL, blocks), ask(pool, store, SAID, SCORED, ALL)
    raw = [set((index[lod == 0] // K).tolist()) for lod, index in shown]
    assert set(blocks) <= raw[0] and not set(blocks) <= raw[1] and known.nll != plain.nll


def test_questions_leave_no_trace():
    pool = tiny_pool(budget=60)
    store = store_of(pool, HISTORY)
    first = ask(pool, store, SAID, SCORED, ALL)
    ask(pool, store, tokens(30, 5), tokens(6, 6), ALL)
    assert store.n_tokens == N and not pool.sessions and ask(pool, store, SAID, SCORED, ALL) == first


def test_the_window_is_the_base_on_the_last_tokens():
    gpt = tiny_base()
    pool = tiny_pool(budget=60, gpt=gpt)
    found = ask_window(pool, HISTORY, SAID, SCORED, ALL)
    context = torch.cat([HISTORY, SAID])[-60:]
    with torch.no_grad():
        hidden = gpt.hidden(torch.cat([context, SCORED])[None], positions=torch.arange(N + 9 - 60, N + 9 + 6),
                            lift_windows=True)[0, 59:-1]
        losses = token_losses(gpt.logits(hidden)[None], SCORED[None])
    assert found.nll == pytest.approx(float(losses.mean()), abs=1e-9) and found.lods == {}
    other = torch.cat([tokens(N - 51, 9), HISTORY[-51:]])
    assert ask_window(pool, other, SAID, SCORED, ALL) == found, "what is outside the window does not matter"
    assert ask_window(pool, torch.cat([HISTORY[:-51], (HISTORY[-51:] + 1) % VOCAB]), SAID, SCORED, ALL).nll != found.nll


def test_an_answer_says_what_had_no_entry():
    small, large = tiny_pool(budget=20, trained=(1,)), tiny_pool(budget=60)  # 20 entries of at most 4 tokens for 400
    left_out = [ask(pool, store_of(pool, HISTORY), SAID, SCORED, ALL).omitted for pool in (small, large)]
    assert left_out[0] > 100 and left_out[1] == 0
