"""Chains put to a session: how often it looks, and what counts as right."""

import numpy as np
import pytest
import torch
from tiny_mc import K, tiny_base, tiny_mc

from mc.session.config import SessionConfig
from mc.session.session import Session, SessionPool
from nanochat.tasks.hops import HopTask
from scripts.eval.hop_questions import SYSTEMS, ask_chains, base_writes, write_chain
from scripts.eval.stream import store_of

torch.set_num_threads(1)
TASK = HopTask(range(16), range(16, 32), range(32, 40), block=K, blocks=8, announce=2, ask=2)


@pytest.fixture(scope="module")
def pools() -> dict[str, SessionPool]:
    gpt = tiny_base()
    mc = tiny_mc(gpt).model
    return {name: SessionPool(gpt, mc, SessionConfig(interval=interval), trained_lods=[1, 2])
            for name, interval in (("refocused", 1), ("once", 0))}


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """Tokens of history at every refocus."""
    found, refocus = [], Session.refocus
    monkeypatch.setattr(Session, "refocus", lambda session: (found.append(session.n_tokens), refocus(session))[1])
    return found


def test_one_looks_again_after_the_first_answer(pools, looks):
    tokens = torch.arange(33) % 40
    store = store_of(pools["once"], tokens[:32])
    written = write_chain(pools["once"], store, tokens[32:])
    assert looks == [33] and len(written) == 2
    looks.clear()
    assert write_chain(pools["refocused"], store, tokens[32:])[0] == written[0] and looks == [33, 34]
    assert not pools["once"].sessions and not pools["refocused"].sessions and store.n_tokens == 32


def test_told_blocks_are_shown(pools, monkeypatch):
    shown, close = [], Session.close
    monkeypatch.setattr(Session,
                        "close", lambda session: (shown.append({int(i) // K
                                                                for lod, i in zip(*session.focus.cut())
                                                                if lod == 0}), close(session))[1])
    tokens = torch.arange(33) % 40
    store = store_of(pools["once"], tokens[:32])
    for known in ([0, 3], [1, 2]):
        write_chain(pools["once"], store, tokens[32:], known)
        assert set(known) <= shown[-1]


def test_the_base_is_right_when_it_writes_both(pools):
    gpt, context = pools["once"].gpt, torch.arange(20)
    asked = torch.tensor([3])
    logits = lambda tokens: gpt(tokens[None])[0, -1]
    first = logits(torch.cat([context, asked])).argmax(keepdim=True)
    second = logits(torch.cat([context, asked, first])).argmax(keepdim=True)
    assert base_writes(gpt, context, torch.cat([asked, first, second]), 0)
    assert not base_writes(gpt, context, torch.cat([asked, first, (second + 1) % 40]), 0)
    assert not base_writes(gpt, context, torch.cat([asked, (first + 1) % 40, second]), 0)


def test_every_system_gets_the_same_questions(pools, monkeypatch):
    """A model that always knows is right under all systems, one that never does under none."""
    for answer in (True, False):
        asked: list[tuple] = []

        def written(pool, store, said_N, known=None):
            asked.append((store.n_tokens, said_N.tolist(), known))
            chain = made[(len(asked) - 1) // 3][32 + 3 * announced:][:3]
            return chain[1:].tolist() if answer else [-1, -1]

        for announced in (0, 1):
            asked.clear()
            rows = TASK.rows("val", np.arange(2), 8, 8 * K + TASK.episode)
            made = torch.from_numpy(rows.tokens)
            monkeypatch.setattr("scripts.eval.hop_questions.write_chain", written)
            monkeypatch.setattr("scripts.eval.hop_questions.base_writes", lambda gpt, context, chain, first: answer
                                and torch.equal(chain,
                                                made[:, len(context):len(context) + 3][(made[:, :len(context)] == context).all(1)][0]))  # noqa: E501
            right = ask_chains(pools, TASK, 8, 2, announced)
            assert set(right) == set(SYSTEMS) and all((x == answer).all() for x in right.values())
            assert asked[2][2] == rows.episode_blocks[0].tolist() and asked[0][:2] == (32, made[0, 32:33 + 3
                                                                                                * announced].tolist())
