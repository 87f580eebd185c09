"""Session states: damaged files, and whole ones whose numbers no session can have. The pool
goes on as if nothing had been."""

import json

import pytest
import torch
from fuzzing import Intact, changes, fuzzed, json_changes, tried
from hypothesis import strategies as st
from tiny_mc import randomize, tiny_base

from mc.config import MCConfig
from mc.model import MegaContext
from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from mc.session.state import SessionState

K = 4


@pytest.fixture(scope="module")
def pool() -> SessionPool:
    gpt = tiny_base(n_layer=1)
    config = MCConfig(block_size=K, max_lod=3, gist_width=16, budget=32, horizon=8, lens_key_dim=16, lens_keys=2,
                      lens_queries=24, lens_horizon=4)
    mc = MegaContext(config, gpt.config.n_embd).double()
    randomize(mc)
    return SessionPool(gpt, mc, SessionConfig(budget=40), trained_lods=(1, 2, 3))


@pytest.fixture(scope="module")
def state(pool) -> SessionState:
    """Of a session that has refocused, generated, and holds tokens that complete no block."""
    session = pool.open(seed=3)
    session.begin(torch.arange(77) % 50)
    list(session.generate(6))
    state = session.state()
    session.close()
    return state


@pytest.fixture(scope="module")
def expected(pool, state) -> list[int]:
    return going_on(pool, state)


@pytest.fixture(scope="module")
def written(state, tmp_path_factory) -> Intact:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    state.save(path)
    return Intact(path.read_bytes())


def going_on(pool: SessionPool, state: SessionState) -> list[int]:
    """The next tokens of a session that is restored: through a refocus, an append, and past a whole block."""
    session = pool.restore(state)
    try:
        first = list(session.generate(3, temperature=0))
        session.append([1, 2, 3])
        return first + list(session.generate(6)) + [len(session.explain())]
    finally:
        session.close()


def restored(pool: SessionPool, state: SessionState, expected: list[int], changed: SessionState, kind: str) -> None:
    tried(kind, lambda: going_on(pool, changed))
    assert not pool.sessions
    assert going_on(pool, state) == expected, "another session of the pool is not what it was"


def test_a_state_as_it_was_written_is_read(pool, state, expected, written, work):
    """The refusals below are of what was changed."""
    (work / "s").write_bytes(written)
    assert tried("session state, unchanged", lambda: going_on(pool, SessionState.load(work / "s"))) == expected
    assert tried("session state, unchanged", lambda: going_on(pool, SessionState(json.loads(json.dumps(state.meta)),
                                                                                dict(state.tensors)))) == expected


@fuzzed(changes())
def test_bytes_of_a_state(pool, state, expected, written, work, change):
    (work / "s").write_bytes(change(written))
    if (found := tried("session state, bytes", lambda: SessionState.load(work / "s"))) is not None:
        restored(pool, state, expected, found, "session state, bytes, restored")


@fuzzed(json_changes(3), cost=2)
def test_values_of_a_state(pool, state, expected, change):
    meta = change(json.loads(json.dumps(state.meta)))
    restored(pool, state, expected, SessionState(meta, dict(state.tensors)), "session state, values")


@fuzzed(st.data(), cost=2)
def test_tensors_of_a_state(pool, state, expected, data):
    tensors = dict(state.tensors)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        old = tensors.pop(name)
        what = data.draw(st.sampled_from(["gone", "renamed", "longer", "shorter", "empty", "other type", "number",
                                          "number", "number", "shuffled"]))
        match what:
            case "renamed":
                tensors[name + "_"] = old
            case "longer":
                tensors[name] = torch.cat([old, old[..., :1] if old.ndim else old[None]], -1) if old.ndim else old[None]
            case "shorter":
                tensors[name] = old[..., :-1] if old.ndim else old[None]
            case "empty":
                tensors[name] = old[:0] if old.ndim else old[None][:0]
            case "other type":
                tensors[name] = old.to(data.draw(st.sampled_from([torch.int32, torch.float32, torch.bool, torch.uint8,
                                                                  torch.float16])))
            case "number":
                tensors[name] = old.clone()
                if old.numel():
                    value = data.draw(st.sampled_from([-1, -2, 0, 1, 3, 50, 51, 1000, 2**40, -(2**62), 2**63 - 1]))
                    value = value % 256 if old.dtype == torch.uint8 else value
                    tensors[name].view(-1)[data.draw(st.integers(0, min(old.numel(),
                                                                        60) - 1))] = value if not old.is_floating_point() else data.draw(st.sampled_from([torch.nan, torch.inf]))  # noqa: E501
            case "shuffled":
                tensors[name] = old.flip(0) if old.ndim else old
    restored(pool, state, expected, SessionState(state.meta, tensors), "session state, tensors")
