import pytest

from mc.focus_allocator import FocusConfig
from mc.session.price import Allocator
from mc.session.refocus import PathEdits


@pytest.mark.parametrize("text, shown", [("greedy", 1), ("bundle:2", 2), ("bundle:3", 3)])
def test_one_edit_shows_adjacent_blocks(text, shown):
    """Of three neighbours worth showing as many as the bundle holds are opened by a single edit."""
    cfg = FocusConfig(budget=200, block_size=8, max_lod=1, recent=8, max_edits=1, span=Allocator.parse(text).span)
    focus = PathEdits(cfg)
    focus.advance(8 * 40, set())
    focus.expanded = {node for node in focus.expanded if focus.protected(node)}
    edits = focus.refocus({4: 0.9, 5: 0.8, 6: 0.7})
    assert edits.paths == 1 and sorted(edits.opened) == [(1, block) for block in range(4, 4 + shown)]
