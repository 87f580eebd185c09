"""What `mc_bench focus` compares a session's stream with."""

import pytest
import torch

from scripts.bench.focus import window_nll
from tiny_mc import VOCAB, tiny_base

torch.set_num_threads(1)


@pytest.mark.parametrize("interval", [1, 7, 32])
@pytest.mark.parametrize("length", [77, 78, 101])
def test_a_window_reads_every_piece_behind_the_tokens_before_it(interval, length):
    gpt, budget, begin = tiny_base(), 20, 40
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))
    total = 0.0
    for at in range(begin, length, interval):
        piece = tokens[at - budget:at + interval]
        with torch.no_grad():
            log_p = gpt.logits(gpt.hidden(piece[None, :-1], lift_windows=True))[0].log_softmax(-1)
        total -= float(sum(log_p[budget - 1 + i, token] for i, token in enumerate(piece[budget:].tolist())))
    assert window_nll(gpt, tokens, begin, budget, interval, batch=3) == pytest.approx(total / (length - begin), abs=1e-9)
