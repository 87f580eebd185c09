"""The session against forward passes from scratch: whatever was appended, refocused, generated or
restored, in whatever pieces."""

from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import VOCAB, randomize, tiny_base

from mc import working_context as wc
from mc.config import MCConfig, from_dict
from mc.focus_allocator import FocusConfig, fits
from mc.gaussian_rope import entry_rotary
from mc.model import MegaContext
from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from mc.session.state import SessionState
from mc.store.disk.store import DiskStore
from mc.store.history import store_format
from mc.store.ram import DROPPED, KEPT, VOID, RamStore
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.telemetry.metrics import METRICS
from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import read_metrics
from scripts.bench.decode import held_bytes

torch.set_num_threads(1)
EXACT = {"atol": 1e-9, "rtol": 0}
K = 4


def tiny_pool(max_sessions: int = 1, budget: int = 40, gpt: GPT | None = None, mc_config: dict | None = None,
              trained=(1, 2, 3),
              recorder: Recorder | None = None, **config) -> SessionPool:
    gpt = gpt or tiny_base()
    mc = MegaContext(from_dict({**dict(block_size=K, max_lod=3, gist_width=16, budget=32, horizon=8, lens_key_dim=16,
                                       lens_keys=2,
                                        lens_queries=24, lens_horizon=4), **(mc_config or {})}),
                     gpt.config.n_embd).double()
    randomize(mc)
    return SessionPool(gpt, mc, SessionConfig(budget=budget, **config), trained_lods=trained,
                       max_sessions=max_sessions, recorder=recorder)


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def history_tokens(session) -> list[int]:
    return [*session.history.store.tokens(torch.arange(session.history.n_tokens)).tolist(), *session.pending]


def from_scratch(session) -> torch.Tensor:
    """[V] logits after the cut that the session shows: every node made anew from the tokens,
    every entry placed one by one."""
    pool, all_tokens = session.pool, history_tokens(session)
    gpt, mc, c = pool.gpt, pool.mc, pool.mc.config

    def node(lod: int, index: int) -> torch.Tensor:
        if lod == 0:
            return (gpt.embed(torch.tensor(all_tokens[index])) if all_tokens[index] != VOID
                    else torch.zeros(gpt.config.n_embd).double())
        children = torch.stack([node(lod - 1, index * K + i) for i in range(K)])
        valid = torch.tensor([lod > 1 or all_tokens[index * K + i] != VOID for i in range(K)])
        return mc.gistnet(children[None], valid[None], lod)[0, 0]

    entries = [(lod, i) for lod, i in zip(*(x.tolist() for x in session._shown())) if lod or all_tokens[i] != VOID]
    lod, index = (torch.tensor(x)[None] for x in zip(*entries))
    ids = torch.tensor([[VOID if at else all_tokens[i] for at, i in entries]])
    linked = torch.tensor([[at == 0 and p >= 0 and entries[p] == (0, i - 1) for p, (at, i) in enumerate(entries, -1)]])
    start, length = index * K ** lod, K ** lod
    rotary = entry_rotary(gpt, start, length, scheme=c.positions, floor=c.damping_floor)
    with torch.no_grad():
        vectors = torch.stack([node(at, i) for at, i in entries])[None]
        hidden = gpt.hidden(ids, inputs_embeds=vectors, rotary=rotary, linked=linked, key_bias=mc.key_bias(lod),
                            lift_windows=True)
        return gpt.logits(hidden[0, -1])


def check_shown(session) -> None:
    """A valid cut within the budget; every token in exactly one entry or one span that is
    named; every slot in use once."""
    focus, c = session.focus, session.pool.focus_config
    lod, index = (torch.from_numpy(x)[None] for x in (session.cut_lod, session.cut_index))
    if focus.n_tokens:
        wc.check(wc.Cut(lod, index, torch.ones_like(lod, dtype=torch.bool), K), torch.tensor([focus.n_tokens]),
                 c.budget, c.max_lod, gaps=focus.omits)
        tail = range(max(focus.n_tokens - c.recent, 0), focus.n_tokens)
        assert {token for token in tail if token // K not in focus.pruned} <= set(index[lod == 0].tolist())
    lines = session.explain()
    assert [line.start
            for line in lines] == [0, *np.cumsum([line.tokens
                                                  for line in lines])[:-1]] if lines else not session.n_tokens
    assert sum(line.tokens for line in lines) == session.n_tokens and sum(line.entries
                                                                          for line in lines) == len(session._shown()[0])
    out = [line for line in lines if not line.entries]
    assert all(line.lod is None and "left out" in line.why for line in out) and all(line.lod is not None
                                                                                    for line in lines if line.entries)
    assert sum(line.tokens for line in out) == session.status().omitted_tokens and (focus.omits or not out)
    used = session.cached.slot.tolist()
    assert sorted(used + session.free_slots) == list(range(session.pool.cache.spare))


Action = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40)),
    st.tuples(st.just("append"), st.sampled_from([1, 3, 4, 5, 31, 32, 33])),
    st.tuples(st.just("generate"), st.integers(1, 14)), st.tuples(st.just("refocus"), st.just(0)),
    st.tuples(st.just("score"), st.integers(1, 9)), st.tuples(st.just("restore"), st.just(0)),
    st.tuples(st.just("end_source"), st.just(0)))


def act(session, action: str, n: int, seed: int):
    """Do one thing; the session to go on with."""
    if action == "append":
        session.append(tokens(n, seed))
    elif action == "generate":
        assert len(list(session.generate(n))) == n
    elif action == "refocus":
        session.refocus()
    elif action == "score":
        session.score(tokens(n, seed))
    elif action == "end_source":
        session.end_source()
    else:
        state = session.state()
        session.close()
        session = session.pool.restore(state)
    return session


@settings(max_examples=40, deadline=None)
@given(st.lists(Action, min_size=1, max_size=7), st.integers(1, 77), st.sampled_from([1, 3, K, 9]),
       st.integers(0, 1000))
def test_logits_are_those_of_a_forward_pass_from_scratch(actions, n, interval, seed):
    pool = tiny_pool(interval=interval)
    session = pool.open(seed=seed)
    session.begin(tokens(n, seed))
    for i, (action, count) in enumerate(actions):
        session = act(session, action, count, seed + i)
        check_shown(session)
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        check_shown(session)
        assert len(session._shown()[0]) <= pool.focus_config.budget + pool.interval


VARIANTS = [dict(positions="contiguous"), dict(positions="centre"), dict(max_lod=1), dict(gist="mean", gist_width=64)]


@pytest.mark.parametrize("mc_config", VARIANTS, ids=lambda c: "-".join(map(str, c)))
def test_every_kind_of_position_is_exact(mc_config):
    gpt = tiny_base(n_kv_head=4, rope_fraction=0.5)
    pool = tiny_pool(gpt=gpt, mc_config=mc_config, trained=(1,) if mc_config.get("max_lod") == 1 else (1, 2, 3),
                     budget=64, interval=5)
    session = pool.open()
    session.begin(tokens(77))
    edited = 0
    for i in range(6):
        list(session.generate(7))
        if i % 2:
            session.end_source()
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        list(session.generate(2))
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        session.append(tokens(9, i))
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        edited += session.last_edits.paths + session.last_edits.forced
    assert edited, "nothing was ever edited"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(0, 100))
def test_any_pieces_of_an_append_are_one(pieces, seed):
    whole, pieced = (tiny_pool().open(seed=1) for _ in range(2))
    text = tokens(sum(pieces), seed)
    whole.begin(text)
    at = 0
    for piece in pieces:
        pieced.append(text[at:at + piece])
        at += piece
    torch.testing.assert_close(whole.logits(), pieced.logits(), **EXACT)
    assert whole.explain() == [s._replace(score=t.score)
                               for s, t in zip(pieced.explain(), whole.explain(), strict=True)]
    for lod, count in enumerate(whole.history.shape.counts[1:], 1):
        assert all(s.history.store.n_nodes(lod) == count for s in (whole, pieced))
        if count:
            torch.testing.assert_close(*(s.history.store.gists(lod, torch.arange(count)) for s in (whole, pieced)),
                                       atol=1e-12, rtol=0)
    assert list(whole.generate(9)) == list(pieced.generate(9))


def test_score_is_decoding_with_the_tokens_given():
    scored, stepped = (tiny_pool(interval=3).open() for _ in range(2))
    text, more = tokens(50), tokens(17, 5)
    for session in (scored, stepped):
        session.begin(text)
    want = []
    for token in more:
        want.append(stepped.logits())
        stepped.ingest([token])
    torch.testing.assert_close(scored.score(more), torch.stack(want), **EXACT)
    torch.testing.assert_close(scored.logits(), stepped.logits(), **EXACT)


@pytest.mark.parametrize("positions", ["gaussian", "contiguous"])
def test_score_after_the_end_of_a_source_has_a_row_per_token(positions):
    """Also where void slots move what comes after them, so that everything shown is run again."""
    scored, stepped = (tiny_pool(mc_config=dict(positions=positions), interval=9).open() for _ in range(2))
    for session in (scored, stepped):
        session.begin(tokens(50))
        session.logits()
        session.end_source()
    want, more = [], tokens(5, 5)
    for token in more:
        want.append(stepped.logits())
        stepped.ingest([token])
    torch.testing.assert_close(scored.score(more), torch.stack(want), **EXACT)


def test_sessions_together_are_sessions_alone():
    together = tiny_pool(max_sessions=4)
    crowd = [together.open(seed=i) for i in range(4)]
    lengths = [1, 33, 77, 120]
    alone = []
    for i, n in enumerate(lengths):
        crowd[i].begin(tokens(n, i))
        pool = tiny_pool()
        alone.append(pool.open(seed=i))
        alone[i].begin(tokens(n, i))
    want = [list(session.generate(20)) for session in alone]
    got = list(together.generate([crowd[2], crowd[0], crowd[3]], 8))
    got = [list(row) for row in zip(*got)]
    assert got == [want[2][:8], want[0][:8], want[3][:8]]
    rest = [list(row) for row in zip(*together.generate(crowd, 12))]
    assert [rest[0], rest[2], rest[3]] == [want[0][8:], want[2][8:], want[3][8:]] and rest[1] == want[1][:12]
    for session in crowd:
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)


def test_a_stopped_session_stays_out_of_the_batch():
    pool = tiny_pool(max_sessions=2)
    sessions = [pool.open(seed=i) for i in range(2)]
    for i, session in enumerate(sessions):
        session.begin(tokens(40, i))
    first = next(_begun(tokens(40, 0)).generate(1, temperature=0))
    rows = list(pool.generate(sessions, 6, temperature=0, stop_ids=[first]))
    assert rows[0][0] == first and all(row[0] is None for row in rows[1:])
    assert sessions[0].n_tokens == 41 and sessions[1].n_tokens > 41


def _begun(text):
    session = tiny_pool().open(seed=0)
    session.begin(text)
    return session


@pytest.mark.parametrize("after", [0, 1, 5, 11])
@pytest.mark.parametrize("policy", ["exact", "approximate"])
def test_restored_is_uninterrupted(tmp_path, after, policy):
    pool = tiny_pool(kv_policy=policy)
    session = pool.open(seed=3)
    session.begin(tokens(70))
    want = list(session.generate(24))
    again = tiny_pool(kv_policy=policy).open(seed=3)
    again.begin(tokens(70))
    got = list(again.generate(after)) if after else []
    again.state().save(tmp_path / "state")
    restored = tiny_pool(kv_policy=policy).restore(SessionState.load(tmp_path / "state"))
    assert got + list(restored.generate(24 - after)) == want
    torch.testing.assert_close(restored.logits(), session.logits(), atol=1e-12, rtol=0)
    assert [line._replace(score=None) for line in restored.explain()] == [line._replace(score=None)
                                                                          for line in session.explain()]


def test_the_approximate_policy_runs_new_entries_only():
    exact, approximate = (tiny_pool(kv_policy=policy, budget=50, interval=3) for policy in ("exact", "approximate"))
    sessions = [pool.open(seed=2) for pool in (exact, approximate)]
    ran, differed = [[], []], 0.0
    for session in sessions:
        session.begin(tokens(90))
    for i in range(8):
        for session, runs in zip(sessions, ran):
            session.append(tokens(5, i))
            before = {(lod, index): slot
                      for lod, index, slot in zip(*(x.tolist()
                                                    for x in (session.cached.lod, session.cached.index,
                                                              session.cached.slot)))}
            kept_kv = session.pool.cache.k.clone()
            logits = session.logits()
            runs.append(session.computed)
            if session is sessions[1]:
                new = 0
                for lod, index, slot in zip(*(x.tolist()
                                              for x in (session.cached.lod, session.cached.index,
                                                        session.cached.slot))):
                    if before.get((lod, index)) == slot:
                        assert torch.equal(session.pool.cache.k[:, 0, slot], kept_kv[:, 0, slot])
                    else:
                        new += 1
                assert session.computed == new or not session.recut
                differed += float((logits - from_scratch(session)).abs().max())
    assert sum(ran[1]) < sum(ran[0]) and differed > 1e-6


@settings(max_examples=8, deadline=None)
@given(st.lists(Action, min_size=2, max_size=8), st.integers(0, 1000))
def test_the_approximate_policy_errs_in_depth_only(actions, seed):
    """With one layer, and nothing passed on from the entry before, keys and values do not depend on other
    entries: there it is exact."""
    gpt = tiny_base(n_layer=1, smear=False, key_shift=False)
    session = tiny_pool(gpt=gpt, kv_policy="approximate", budget=50, interval=3).open(seed=seed)
    session.begin(tokens(90, seed))
    for i, (action, count) in enumerate(actions):
        session = act(session, action, count, seed + i)
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        check_shown(session)


def test_the_approximate_policy_shows_an_edit_to_the_next_token():
    """A refocus with no token after it: the last token is run again, for it is what speaks."""
    gpt = tiny_base(n_layer=1, smear=False, key_shift=False)
    session = tiny_pool(gpt=gpt, kv_policy="approximate", budget=50).open()
    session.begin(tokens(90))
    session.logits()
    edited = 0
    for _ in range(4):
        session.end_source()
        session.refocus()
        edited += session.recut and session.last_edits.paths
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        session.append(tokens(3))
        session.logits()
    assert edited


def test_a_refocus_that_changes_nothing_runs_nothing_again():
    session = tiny_pool(budget=64).open()
    session.begin(tokens(60))
    for _ in range(10):
        session.refocus()
    session.logits()
    kv = session.pool.cache.k.clone()
    session.refocus()
    assert session.last_edits == type(session.last_edits)() and not session.recut
    assert len(session.missing().lod) == 0 and torch.equal(kv, session.pool.cache.k)


def test_the_prefix_before_the_first_edit_is_kept():
    session = tiny_pool(budget=64).open()
    session.begin(tokens(200))
    session.logits()
    before = list(zip(session.cached.lod.tolist(), session.cached.index.tolist()))
    session.append(tokens(8, 9))
    session.logits()
    after = list(zip(session.cached.lod.tolist(), session.cached.index.tolist()))
    common = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    assert session.kept == common and session.computed == len(after) - common


def big_lens_pool(budget: int = 64) -> SessionPool:
    """Untrained networks in float32: the lens still looks for blocks that are like the question."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=128, vocab_size=512, n_layer=1, n_head=2, n_kv_head=2, n_embd=32,
                        value_embeds=False))
    mc = MegaContext(MCConfig(block_size=8, max_lod=3, gist="mean", budget=budget, recent=8, lens_key_dim=32), 32)
    return SessionPool(gpt, mc, SessionConfig(budget=budget), trained_lods=[1, 2, 3])


def store_format_of(pool: SessionPool):
    return store_format(pool.gpt, pool.mc)


def test_sixty_four_windows_of_history_and_the_start_is_found():
    """Every token is covered, the lens ran, and the question brings back the block at the start
    (a sliding window would not)."""
    pool = big_lens_pool()
    session, rng = pool.open(), np.random.default_rng(0)
    n, fact = 64 * 64, list(range(500, 508))
    text = rng.integers(0, 400, n)
    text[:8] = fact
    session.begin(text.tolist())
    session.logits()
    assert not any(line.lod == 0 and line.start == 0 for line in session.explain()), "shown before anybody asked"
    session.append(fact)
    session.logits()
    lod, index = (torch.from_numpy(x)[None] for x in session._shown())
    wc.check(wc.Cut(lod, index, torch.ones_like(lod, dtype=torch.bool), 8), torch.tensor([n + 8]), 64, 3)
    (line,) = [line for line in session.explain() if line.start == 0]
    assert line.lod == 0 and line.entries == 8 and line.score > 0 and "lens" in line.why


@pytest.mark.parametrize("read",
                         [lambda session: next(session.generate(1)), lambda session: session.score([1]), lambda session: session.logits()])  # noqa: E501
def test_a_refocus_follows_every_append_however_short(read):
    """E1a: the question is seen before it is answered, and generated tokens alone bring a
    refocus only when it is due."""
    session = tiny_pool(interval=9).open()
    session.begin(tokens(60))
    read(session)
    for i in range(3):
        before = session.focus.refocuses
        session.append(tokens(1, i))
        read(session)
        assert session.focus.refocuses == before + 1
        read(session)
        assert session.focus.refocuses == before + 1


def test_device_memory_does_not_know_the_history():
    """All that a pool holds besides weights, store and search index: counted, not computed from shapes."""
    session, sizes = big_lens_pool().open(), []
    for n in (500, 1000, 2000, 4000):
        session.append(np.random.default_rng(n).integers(0, 400, n).tolist())
        list(session.generate(40))
        sizes.append(held_bytes(session.pool, session.pool.gpt, session.history.store, session.search))
    assert len(set(sizes)) == 1 and sizes[0] > session.pool.cache.nbytes()
    session.kept_by_mistake = torch.zeros(session.n_tokens)
    assert held_bytes(session.pool, session.pool.gpt, session.history.store,
                      session.search) == sizes[-1] + 4 * session.n_tokens


def test_pruned_blocks_stay_gists_and_say_so():
    session = big_lens_pool().open()
    text = np.random.default_rng(0).integers(0, 400, 2000)
    text[:8] = range(500, 508)
    session.begin(text.tolist())
    session.history.store.set_detail(torch.tensor([0]), 1)
    session.append(list(range(500, 508)))
    session.logits()
    session.refocus()
    pruned = [line for line in session.explain() if line.start == 0]
    assert pruned[0].lod > 0
    if pruned[0].lod == 1:
        assert "pruned" in pruned[0].why


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "generate", "end_source", "restart"]), st.integers(1, 60)),
                min_size=1, max_size=6), st.integers(0, 99))
def test_on_disk_as_in_memory(actions, seed):
    """The same logits, bit for bit, and the same after a restart with the state and the store."""
    with TemporaryDirectory() as folder:
        in_memory, on_disk = (big_lens_pool().open(store, seed=1)
                              for store in (None,
                                            DiskStore.create(f"{folder}/store", store_format_of(big_lens_pool()))))
        for session in (in_memory, on_disk):
            session.begin(tokens(77, seed))
        for i, (action, n) in enumerate(actions):
            if action == "restart":
                on_disk.state().save(f"{folder}/state")
                on_disk.history.store.close()
                on_disk = big_lens_pool().restore(SessionState.load(f"{folder}/state"),
                                                  DiskStore.open(f"{folder}/store"))
            for session in (in_memory, on_disk) if action != "restart" else ():
                if action == "append":
                    session.append(tokens(n, seed + i))
                elif action == "generate":
                    list(session.generate(n))
                else:
                    session.end_source()
            assert torch.equal(in_memory.logits(), on_disk.logits())
            assert in_memory.explain() == on_disk.explain()
        on_disk.history.store.close()


def test_a_state_and_a_store_of_different_moments_are_refused(tmp_path):
    session = big_lens_pool().open(DiskStore.create(tmp_path / "store", store_format_of(big_lens_pool())))
    session.begin(tokens(40))
    state = session.state()
    session.append(tokens(3))
    session.history.store.close()
    with DiskStore.open(tmp_path / "store") as store, pytest.raises(UserError,
                                                                    match="ends at 40 stored tokens, the store at 43"):
        big_lens_pool().restore(state, store)
    with pytest.raises(UserError, match="give its store"):
        big_lens_pool().restore(state)


def unchanged(session, call) -> str:
    """The message of a refused call, which must change nothing."""
    before = session.state()
    with pytest.raises(UserError) as error:
        call()
    after = session.state()
    assert before.meta == after.meta and all(torch.equal(t, after.tensors[name]) for name, t in before.tensors.items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refusals():
    pool = tiny_pool()
    session = pool.open()
    assert "empty history" in unchanged(session, lambda: session.begin([]))
    assert "is empty" in unchanged(session, lambda: session.generate(3))
    assert "empty" in unchanged(session, session.refocus)
    session.begin(tokens(30))
    list(session.generate(3))
    assert "has begun" in unchanged(session, lambda: session.begin([1]))
    assert "token id 50 is outside the vocabulary of 50" in unchanged(session, lambda: session.append([3, 50]))
    assert "token id -1" in unchanged(session, lambda: session.append([-1]))
    assert "token id 99" in unchanged(session, lambda: session.score([1, 99]))
    assert "temperature" in unchanged(session, lambda: session.generate(1, temperature=-1))
    assert "all 1 sessions" in unchanged(session, pool.open)
    assert "own pool" in unchanged(session, lambda: pool.generate([session, session], 1))
    assert "no session" in unchanged(session, lambda: pool.generate([], 1))
    two = tiny_pool(max_sessions=2)
    begun, empty = _begun_in(two, tokens(9)), two.open()
    assert "is empty" in unchanged(begun, lambda: two.generate([begun, empty], 1, seed=9))
    assert begun.score([]).shape == (0, VOCAB) and begun.n_tokens == 9
    assert "own pool" in unchanged(session, lambda: tiny_pool().generate([session], 1))


def test_a_model_of_several_gists_per_node_has_no_sessions():
    with pytest.raises(UserError, match="one gist per node"):
        tiny_pool(mc_config=dict(gists_per_block=2))


Growth = st.one_of(Action, st.tuples(st.just("append"), st.sampled_from([255, 1023, 1025, 3000])))
TIGHT = [15, 16, 19, 24, 33]  # entries; the tail takes up to 11 of them, a block 4


@settings(max_examples=20, deadline=None)
@given(st.lists(Growth, min_size=1, max_size=6), st.sampled_from([1, 31, 32, 33, 77, 1023]), st.sampled_from(TIGHT),
       st.integers(1, 3),
       st.sampled_from([1, 3, K, 9]), st.integers(0, 1000))
def test_no_session_ends_because_of_its_length(actions, n, budget, trained, interval, seed):
    """C6, K4: at budgets that cannot tile the history, with levels that were not trained, whatever happens: nothing is
    refused, every token is in one entry or one named span, and the logits are those of a forward pass from
    scratch over what is shown."""
    session = tiny_pool(budget=budget, interval=interval, trained=range(1, trained + 1)).open(seed=seed)
    session.begin(tokens(n, seed))
    for i, (action, count) in enumerate(actions):
        session = act(session, action, count, seed + i)
        check_shown(session)
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        check_shown(session)


@settings(max_examples=5, deadline=None)
@given(st.lists(Growth, min_size=2, max_size=6), st.sampled_from(TIGHT), st.integers(0, 1000))
def test_the_approximate_policy_goes_on_at_any_length(actions, budget, seed):
    gpt = tiny_base(n_layer=1, smear=False, key_shift=False)  # where it is exact
    session = tiny_pool(gpt=gpt, kv_policy="approximate", budget=budget, interval=3).open(seed=seed)
    session.begin(tokens(900, seed))
    for i, (action, count) in enumerate(actions):
        session = act(session, action, count, seed + i)
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        check_shown(session)


@pytest.mark.parametrize("mc_config", VARIANTS, ids=lambda c: "-".join(map(str, c)))
def test_every_kind_of_position_is_exact_where_spans_are_left_out(mc_config):
    gpt = tiny_base(n_kv_head=4, rope_fraction=0.5)
    session = tiny_pool(gpt=gpt, mc_config=mc_config, trained=(1,) if mc_config.get("max_lod") == 1 else (1, 2, 3),
                        budget=20, interval=5).open()
    session.begin(tokens(2000))
    for i in range(6):
        list(session.generate(7))
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        session.append(tokens(9, i))
        assert session.logits() is not None and session.omitted_tokens > 0
        check_shown(session)


def test_what_fits_is_tiled_and_leaves_nothing_out():
    """Up to the first length that the budget cannot tile with a block raw nothing is left
    out; from there on spans are."""
    pool = tiny_pool(budget=36)
    session = pool.open()
    session.begin(tokens(1))
    left_out = []
    for i in range(40):
        session.append(tokens(31, i))
        session.logits()
        left_out.append((session.n_tokens, session.omitted_tokens, fits(session.n_tokens, pool.focus_config)))
        assert session.omitted_tokens == 0 or not left_out[-1][2]
    assert [fit for *_, fit in left_out] == sorted((fit for *_, fit in left_out),
                                                   reverse=True) and left_out[0][2] and not left_out[-1][2]
    assert left_out[-1][1] > 0


def test_a_block_that_is_left_out_is_shown_when_it_is_asked_for():
    session, rng = big_lens_pool(budget=24).open(), np.random.default_rng(0)
    n, fact = 200 * 24, list(range(500, 508))
    text = rng.integers(0, 400, n)
    text[800:808] = fact
    session.begin(text.tolist())
    session.logits()
    assert next(line for line in session.explain()
                if line.start <= 800 < line.start + line.tokens).entries == 0, "shown before anybody asked"
    session.append(fact)
    session.logits()
    (line,) = [line for line in session.explain() if line.start == 800]
    assert line.lod == 0 and line.entries == 8 and line.score > 0 and "lens" in line.why
    check_shown_of(session, 8)


def check_shown_of(session, block_size: int) -> None:
    lod, index = (torch.from_numpy(x)[None] for x in (session.cut_lod, session.cut_index))
    c = session.pool.focus_config
    wc.check(wc.Cut(lod, index, torch.ones_like(lod, dtype=torch.bool), block_size),
             torch.tensor([session.focus.n_tokens]), c.budget, c.max_lod, gaps=True)


def test_pruned_blocks_of_a_history_that_does_not_fit():
    """A pruned block is never raw, neither when it is asked for nor in the tail, which keeps its gist."""
    session = big_lens_pool(budget=24).open()
    text = np.random.default_rng(0).integers(0, 400, 4800)
    text[800:808] = range(500, 508)
    session.begin(text.tolist())
    session.history.store.set_detail(torch.tensor([100, 599]), 1)
    session.append(list(range(500, 503)))
    session.logits()
    lines = session.explain()
    assert not any(line.lod == 0 and line.start in (800, 4792) for line in lines)
    (tail,) = [line for line in lines if line.start == 4792]
    assert tail.lod == 1 and "pruned" in tail.why
    check_shown_of(session, 8)


@pytest.mark.parametrize("n", [61, 4096])
def test_detail_of_the_tail_that_is_given_back_is_shown_again(n):
    session = tiny_pool(budget=24, interval=1).open()
    session.begin(tokens(n))
    session.logits()
    last = torch.tensor([n // K - 1])
    for state in (DROPPED, KEPT):
        session.history.store.set_detail(last, state)
        list(session.generate(2))
        assert (1, int(last)) in session.focus.expanded or state == DROPPED
        check_shown(session)
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)


def test_sessions_that_leave_spans_out_are_alone_in_a_crowd():
    together, lengths = tiny_pool(max_sessions=3, budget=19), [20, 900, 2500]
    crowd = [together.open(seed=i) for i in range(3)]
    for i, (session, n) in enumerate(zip(crowd, lengths)):
        session.begin(tokens(n, i))
    rows = list(zip(*together.generate(crowd, 20)))
    for i, n in enumerate(lengths):
        alone = tiny_pool(budget=19).open(seed=i)
        alone.begin(tokens(n, i))
        assert list(alone.generate(20)) == list(rows[i])
        torch.testing.assert_close(crowd[i].logits(), from_scratch(crowd[i]), **EXACT)


@pytest.mark.parametrize("n", [77, 4096])
def test_a_state_that_expands_more_than_the_budget_holds_is_refused(n):
    session = tiny_pool().open()
    session.begin(tokens(n))
    session.logits()
    state = session.state()
    state.meta["focus"]["expanded"] = [(1, block) for block in range(19)]
    session.close()
    with pytest.raises(UserError, match="more is expanded than the budget holds"):
        session.pool.restore(state)


def test_a_state_of_before_spans_were_left_out_goes_on():
    """Nodes above LOD1 that it lists as expanded, at a length that is no longer tiled, are no entries."""
    session = tiny_pool(budget=36).open()
    session.begin(tokens(1024 + 9))
    session.logits()
    state = session.state()
    assert session.focus.omits
    state.meta["focus"]["expanded"] = [*state.meta["focus"]["expanded"], (2, 3), (3, 0)]
    session.close()
    again = tiny_pool(budget=36).restore(state)
    check_shown(again)
    again.append(tokens(5))
    torch.testing.assert_close(again.logits(), from_scratch(again), **EXACT)
    check_shown(again)


def test_a_budget_that_holds_no_block_beside_the_tail_is_refused_at_start():
    tiny_pool(budget=15)
    with pytest.raises(UserError, match="a budget of 14 entries is too small for a session: a recent tail of up to 11 "
                                        "tokens . one raw block of 4 = 15"):
        tiny_pool(budget=14)


def test_levels_that_were_not_trained():
    """They are not shown unless that is asked for, and the session goes on without them."""
    refusing = tiny_pool(trained=(1,), budget=40).open()
    refusing.begin(tokens(2001))
    refusing.logits()
    assert max(refusing.status().entries_by_lod) == 1 and refusing.omitted_tokens > 0
    check_shown(refusing)
    reporting = tiny_pool(trained=(1,), budget=40, untrained="report").open()
    reporting.begin(tokens(200))
    reporting.logits()
    assert any("LOD2, which was not trained" in line.why or "LOD3, which was not trained" in line.why
               for line in reporting.explain())
    with pytest.raises(UserError, match="no level of gists"):
        tiny_pool(trained=())


def test_states_of_others_are_refused(tmp_path):
    session = _begun(tokens(40))
    list(session.generate(2))
    state = session.state()
    with pytest.raises(UserError, match="other settings: --mc_interval=0"):
        tiny_pool(interval=7).restore(state)
    with pytest.raises(UserError, match="taken with model"):
        tiny_pool(gpt=tiny_base(seed=5)).restore(state)
    with pytest.raises(UserError, match="version 99"):
        tiny_pool().restore(state._replace(meta={**state.meta, "version": 99}))
    with pytest.raises(UserError, match="give no store"):
        pool = tiny_pool()
        pool.restore(state, RamStore(session.history.store.format))
    with pytest.raises(UserError, match="cannot read"):
        SessionState.load(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match="no session state"):
        SessionState.load(tmp_path / "junk")
    pool = tiny_pool()
    pool.restore(state)
    with pytest.raises(UserError, match="all 1 sessions"):
        pool.restore(state)


def test_settings_that_cannot_work():
    for config, message in ((dict(kv_policy="fast"), "use one of exact, approximate"),
                            (dict(interval=-1), "at least 0"), (dict(candidates=0), "at least 1")):
        with pytest.raises(UserError, match=message):
            SessionConfig(**config)
    with pytest.raises(UserError, match="moves every entry"):
        tiny_pool(mc_config=dict(positions="contiguous"), kv_policy="approximate")
    with pytest.raises(UserError, match="short layers"):
        tiny_pool(gpt=tiny_base(sequence_len=1024, window_pattern="SL"), budget=300)
    with pytest.raises(UserError, match="max_sessions 0"):
        tiny_pool(max_sessions=0)


def test_a_failed_pass_leaves_a_session_that_goes_on(monkeypatch):
    session = _begun(tokens(60))
    list(session.generate(3))
    session.append(tokens(9, 1))
    with monkeypatch.context() as patch:
        patch.setattr(session.pool.gpt, "hidden", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            session.logits()
    torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)


FAILING = [("history.store", "append_nodes"), ("history.mc.gistnet", "forward"), ("search", "grow"), ("search", "top"),
           ("focus", "advance"),
           ("focus", "refocus"), ("focus", "cut"), ("history", "gists"), ("history.store", "tokens"),
           ("pool.gpt", "hidden"), ("pool.gpt", "logits")]


@pytest.mark.parametrize("at, name", FAILING, ids=lambda x: x)
@pytest.mark.parametrize("interval", [1, 3])
def test_whatever_fails_leaves_a_session_that_goes_on(monkeypatch, at, name, interval):
    """Ctrl-C or a full disk anywhere: no token is lost, doubled or stale, and the refocus that failed
    comes before the next token."""
    failed = 0
    for nth in range(4):
        pool = tiny_pool(interval=interval)
        session = pool.open()
        session.begin(tokens(90))
        said = history_tokens(session) + list(session.generate(4))
        assert history_tokens(session) == said
        owner = session
        for part in at.split("."):
            owner = getattr(owner, part)
        calls, call = [], getattr(owner, name)

        def fail(*args, **kwargs):
            calls.append(0)
            if len(calls) == nth + 1:
                raise KeyboardInterrupt
            return call(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            try:
                session.append(tokens(9, 1))
                said += tokens(9, 1)
                list(session.generate(11))
                said = history_tokens(session)
            except KeyboardInterrupt:
                failed += 1
        assert history_tokens(session)[:len(said)] == said
        assert session.n_tokens == len(history_tokens(session)) <= 90 + 4 + 9 + 11
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        check_shown(session)
        list(session.generate(2 * interval + 1))
        torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)
        assert session.n_tokens - session.cut_tokens < interval
    assert failed


def test_a_closed_session_touches_no_other():
    pool = tiny_pool()
    closed = _begun_in(pool, tokens(30))
    steps = closed.generate(9)
    next(steps)
    closed.close()
    session = _begun_in(pool, tokens(40, 1))
    session.logits()
    closed.close()
    for call in (lambda: next(steps), closed.logits, lambda: closed.score([1, 2])):
        with pytest.raises(UserError, match="until it is closed"):
            call()
    with pytest.raises(UserError, match="all 1 sessions"):
        pool.open()
    session.ingest([3])
    torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)


def _begun_in(pool, text):
    session = pool.open()
    session.begin(text)
    return session


def test_a_state_does_not_follow_the_session():
    session = _begun(tokens(30))
    state = session.state()
    want = list(session.generate(9))
    for _ in range(2):
        assert list(tiny_pool().restore(state).generate(9)) == want


def test_an_edited_history_is_not_the_one_of_the_state(tmp_path):
    session = big_lens_pool().open(DiskStore.create(tmp_path / "store", store_format_of(big_lens_pool())))
    session.begin(tokens(40))
    state = session.state()
    store = session.history.store
    store.rewrite_tokens(0, torch.tensor([7]))
    store.rewrite_nodes(1, 0, *session.history.nodes(1, torch.tensor([0])))
    store.commit()
    with pytest.raises(UserError, match="was edited since"):
        big_lens_pool().restore(state, store)
    store.close()


def test_a_restore_that_fails_takes_no_place():
    state = _begun(tokens(30)).state()
    pool = tiny_pool()
    with pytest.raises(UserError, match="pending missing"):
        pool.restore(state._replace(meta={name: value for name, value in state.meta.items() if name != "pending"}))
    pool.restore(state)


def test_models_that_differ_in_a_setting_do_not_share_states():
    state = _begun(tokens(30)).state()
    for mc_config in (dict(damping_floor=0.5), dict(positions="centre"), dict(recent=4)):
        with pytest.raises(UserError, match="taken with model"):
            tiny_pool(mc_config=mc_config).restore(state)
    with pytest.raises(UserError, match="taken with model"):
        tiny_pool(trained=(1, 2), mc_config={}).restore(state)


def test_a_session_that_has_nothing_to_run_beside_one_that_has():
    for positions in ("gaussian", "contiguous"):
        pool = tiny_pool(max_sessions=2, mc_config=dict(positions=positions))
        ready, late = _begun_in(pool, tokens(60)), _begun_in(pool, tokens(90, 1))
        ready.logits()
        ready.asked = late.asked = False
        late.refocus()
        pool.generate([ready, late], 1, temperature=0).__next__()
        for session in (ready, late):
            torch.testing.assert_close(session.logits(), from_scratch(session), **EXACT)


def test_focus_follows_the_config():
    """The pool's allocator has the session's settings, and the protected tail the lens was trained with."""
    pool = tiny_pool(max_edits=2, cooldown=1, margin=0.1, tau_expand=0.3, tau_collapse=0.4)
    assert pool.focus_config == FocusConfig(40, K, 3, recent=pool.mc.config.protected, tau_expand=0.3,
                                            tau_collapse=0.4, margin=0.1, max_edits=2, cooldown=1)


def test_log_probabilities_of_a_generated_text_are_those_it_was_drawn_with():
    """Greedy tokens are the argmax of what `score` says of them."""
    text = tokens(64)
    drawn = list(_begun(text).generate(10, temperature=0))
    again = _begun(text)
    assert F.log_softmax(again.score(drawn), -1).argmax(-1).tolist() == drawn


def test_the_meter_records_every_session_metric_and_nothing_per_token(tmp_path):
    calls = []
    with Recorder(tmp_path) as recorder:
        pool = tiny_pool(budget=50, recorder=recorder)
        session = pool.open()
        session.begin(tokens(90))
        record = recorder.record
        recorder.record = lambda name, *args, **kwargs: (calls.append(name), record(name, *args, **kwargs))
        sums = dict.fromkeys(("expands", "collapses", "forced"), 0)
        for i in range(12):
            session.append(tokens(3, i))
            steps = session.generate(9)
            for _ in range(9):
                before, calls[:] = session.focus.refocuses, []
                next(steps)
                if session.focus.refocuses > before:
                    sums = {name: total + getattr(session.last_edits, name) for name, total in sums.items()}
                else:
                    assert not calls or "gen_ai.server.request.duration" in calls, "recorded for a token"
        shown = session.status().entries_by_lod
    rows = read_metrics(tmp_path / "metrics.jsonl")
    names = {name.partition("{")[0] for row in rows for name in row if not name.startswith("telemetry.")} - {"step",
                                                                                                             "time"}
    assert names == {name for name, m in METRICS.items() if m.where == "mc/session/meter.py"}
    assert {name: sum(row.get(f"mc.session.{name}", 0) for row in rows)
            for name in sums} == sums and sums["expands"] > 0
    assert sum(row.get("mc.session.undone", 0)
               for row in rows) >= 0 and rows[-1]["mc.session.history"] == rows[-1]["step"] - 9
    assert all(0 < row["mc.session.utilization"] <= 1 and row["gen_ai.server.time_to_first_token"] > 0 for row in rows)
    # of every refocus since the row before
    assert set(shown) <= {int(name[-2]) for name in rows[-1] if name.startswith("mc.session.entries")}


def test_a_refocus_that_leaves_nothing_to_run_is_reported_at_once(tmp_path):
    reported = []
    with Recorder(tmp_path) as recorder:
        pool = tiny_pool(recorder=recorder, max_sessions=2)
        sessions = [_begun_in(pool, tokens(24, i)) for i in range(2)]
        pool.catch_up(sessions)
        recorder.record = lambda name, value, **kwargs: reported.append(value) if "refocus_time" in name else None
        for session in sessions:
            session.refocus()
            assert not session.last_edits.paths
        hidden = pool.catch_up(sessions)
        assert [len(x) for x in hidden] == [0, 0] and len(reported) == 2
        pool.catch_up(sessions)
        assert len(reported) == 2, "once"


class CountingStore(RamStore):
    """Counts the records that it gives."""

    given = 0

    def tokens(self, index_N):
        self.given += len(index_N)
        return super().tokens(index_N)

    def gists(self, lod, index_N):
        self.given += len(index_N)
        return super().gists(lod, index_N)

    def keys(self, index_N):
        self.given += len(index_N)
        return super().keys(index_N)


@pytest.mark.parametrize("n", [77, 4500])
def test_store_reads_are_the_records_that_the_store_gave(tmp_path, n):
    """Where all blocks are scored from memory, and where the search reads keys."""
    reported, given = [], []
    with Recorder(tmp_path) as recorder:
        pool = tiny_pool(recorder=recorder, budget=24 if n > 77 else 50)
        session = pool.open(store := CountingStore(store_format_of(pool)))
        recorder.record = lambda name, value, **kwargs: name == "mc.session.store_reads" and (
            reported.append(value), given.append(store.given))
        session.begin(tokens(n))
        session.logits()
        session.refocus()
        session.logits()
        list(session.generate(9))
        session.append(tokens(33, 1))
        session.logits()
    assert len(reported) == 5 and reported == np.diff([0, *given]).tolist()


def test_the_meter_says_how_much_is_left_out(tmp_path):
    with Recorder(tmp_path) as recorder:
        session = tiny_pool(budget=24, recorder=recorder).open()
        session.begin(tokens(30))
        list(session.generate(1))
        session.append(tokens(2000))
        list(session.generate(1))
        omitted = session.status().omitted_tokens
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["mc.session.omitted"] for row in rows] == [0, omitted] and 1000 < omitted < 2031 - 24


@pytest.mark.parametrize("allocator", ["bundle:2", "stochastic:2"])
def test_a_restored_session_goes_on_with_its_price_and_its_noise(allocator):
    config = dict(allocator=allocator, interval=4)
    first = tiny_pool(**config).open(seed=5)
    first.begin(tokens(120))
    list(first.generate(24, temperature=0))
    assert first.price_shift < 0 or first.utilization >= 0.95
    again = tiny_pool(**config).restore(first.state())
    assert (again.seed, again.price_shift, again.focus.expanded) == (5, first.price_shift, first.focus.expanded)
    assert list(first.generate(24, temperature=0)) == list(again.generate(24, temperature=0))
    assert again.focus.expanded == first.focus.expanded and again.price_shift == first.price_shift


def test_a_state_of_settings_that_are_gone_is_refused_and_a_default_one_is_read():
    pool = tiny_pool(max_sessions=2)
    session = pool.open()
    session.begin(tokens(60))
    meta, tensors = session.state()
    for gone in (dict(price="market"), dict(allocator="threshold:0,0,1")):
        with pytest.raises(UserError, match="which this version does not have"):
            pool.restore(SessionState(meta | {"config": meta["config"] | gone}, tensors))
    pool.restore(SessionState(meta | {"config": meta["config"] | {"price": "adaptive"}}, tensors))


def test_noise_is_of_the_sessions_seed_and_not_of_its_place():
    pool, shown = tiny_pool(budget=60, max_sessions=3, allocator="stochastic:2", interval=4), []
    for seed in (5, 5, 6):
        session = pool.open(seed=seed)
        session.begin(tokens(150))
        session.score(tokens(12, seed=1))
        shown.append(session.scores)
    assert [session.row for session in pool.sessions.values()] == [0, 1, 2]
    assert shown[0] == shown[1] != shown[2]


def test_allocator_and_price_change_what_is_shown():
    def shown(**config):
        session = tiny_pool(budget=60, interval=4, max_edits=1, cooldown=0, **config).open()
        session.begin(tokens(150))
        seen = []
        for piece in torch.tensor(tokens(40, seed=1)).split(4):
            session.score(piece)
            seen.append(session.cut_index.tolist())
        return seen

    usual = shown()
    for config in (dict(allocator="bundle:3"), dict(allocator="stochastic:2")):
        assert shown(**config) != usual, config


@pytest.mark.parametrize("waiting", [0, 1, K - 1])
def test_an_append_interrupted_after_it_was_stored_stores_no_token_twice(monkeypatch, waiting):
    session = tiny_pool().open(seed=1)
    session.begin(tokens(2 * K))
    session.ingest(tokens(waiting, seed=1))
    before, more, fill = history_tokens(session), tokens(5, seed=2), session.history.fill

    def stored_and_interrupted(ids_N):
        fill(ids_N)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.history, "fill", stored_and_interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.append(more)
    monkeypatch.undo()
    assert history_tokens(session) == [*before, *more] and session.due
    session.append(tokens(3, seed=3))
    assert history_tokens(session) == [*before, *more, *tokens(3, seed=3)]
