"""The replay's rows are edited as a session's: against the same rule on all nodes of all rows at once."""

import torch
from batched_refocus import BatchedRefocus
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.focus_allocator import FocusConfig
from mc.mega_context import tiling
from scripts.eval.replay import ReplayAllocator

torch.set_num_threads(1)


@st.composite
def cases(draw):
    k = draw(st.sampled_from([3, 4, 8]))
    cfg = dict(block_size=k, max_lod=draw(st.integers(1, 3)), recent=draw(st.integers(0, 2)) * k,
               n_gists=draw(st.integers(1, min(3, k - 1))), span=draw(st.sampled_from([1, 1, 2, 5])),
               max_edits=draw(st.integers(0, 4)), cooldown=draw(st.integers(0, 3)),
               tau_expand=draw(st.sampled_from([0.0, 0.2])), margin=draw(st.sampled_from([0.0, 0.2])))
    lengths = draw(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=2, max_size=7))
    return cfg, lengths, draw(st.integers(0, 60)), draw(st.integers(0, 2**31))


@settings(max_examples=80, deadline=None)
@given(cases())
def test_a_replay_decides_as_the_rule_on_all_nodes_at_once(case):
    """States and reports, refocus after refocus, for rows of different lengths, several gists a node and spans."""
    config, steps, slack, seed = case
    n_B = torch.tensor(steps).cumsum(0)
    k, L, G = config["block_size"], config["max_lod"], config["n_gists"]
    need = max(tiling(m // k * k, k, L, G) for m in range(int(n_B.max()) + 1)) + config["recent"] + 2 * k
    cfg, blocks = FocusConfig(need + k * G * L + slack, **config), int(n_B.max()) // k
    gen = torch.Generator().manual_seed(seed)
    replay, batched = ReplayAllocator(cfg), BatchedRefocus(cfg)
    one = two = replay.allocate(torch.randn(3, blocks, generator=gen, dtype=torch.float64), n_B[0])
    levels = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)  # many are tied
    for n in n_B:
        scores = levels[torch.randint(7, (3, blocks), generator=gen)]
        one, mine = replay.refocus(replay.advance(one, n), scores)
        two, theirs = batched.refocus(batched.advance(two, n), scores)
        found, wanted = ((*state.expanded, *state.changed_at, state.n_tokens_B, state.refocus_B, *report)
                         for state, report in ((one, mine), (two, theirs)))
        assert all(map(torch.equal, found, wanted))
        assert replay.cut(one)[1].all()
