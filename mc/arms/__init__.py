"""Arms: what a run may add to the core or put in its place, found by name, imported only when a run names it.

New ideas begin here: one file with its settings, its check and what it does (`mc.arm` says how it is registered), and
its test in tests/arms. What is measured to help everybody moves into the core: a kind of gist into mc/gistnet.py, a
teacher into mc/teachers.py. What does not help anybody leaves a page in the log and goes.

    gists       gist_slots, several (per block), hidden (of hidden states), bands, contrast and horizon (with naming)
    the lens    lens_transformer, lens_perceiver, lens_slots (with reader, what they share)
    teachers    gate, counterfactual (with utility_labels), preference
    terms       rank, zero_sum, illegal, kl
    allocators  bundle, stochastic
"""
