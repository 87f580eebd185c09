"""Sessions: inference over a history that never ends. What happens when a refocus is due, file by file:

    session.py      Session.due, after an append and every `interval` tokens; at last SessionPool.catch_up, the pass
    focus.py        FocusedHistory.refocus: the history and its cut, from here on
    key_search.py   which blocks of the whole history the last tokens ask for (mc/lensnet.py scores them)
    price.py        from the lens's logits to scores above and below what an entry costs now
    refocus.py      which nodes of the cut are opened and closed for that: the rule of mc/focus_allocator.py
    entries.py      which entries are run again, and which are kept; Session.refocus, which calls all this
    slot_cache.py   their keys and values, each entry in its slot

Beside them: config.py (the flags), meter.py (what is recorded), state.py (a session saved and opened again).
"""
