import numpy as np
import torch
from test_focus_price import scores

from mc.session.price import Allocator

torch.set_num_threads(1)


def test_noise_depends_on_its_key_alone():
    allocator, logits_BI = Allocator.parse("stochastic:0.7"), torch.randn(4, 9,
                                                                          generator=torch.Generator().manual_seed(0)).double()
    found = scores(allocator, logits_BI)
    assert torch.equal(found, scores(allocator, logits_BI))
    assert torch.equal(found[2:3], scores(allocator, logits_BI[2:3], row=2)), "a row alone"
    few = torch.tensor([[7, 2, 5]])
    # a price of 0
    every = scores(allocator, logits_BI[:1], room_B=torch.tensor([100]), rival_BI=torch.zeros(1, 9, dtype=torch.bool))
    some = scores(allocator, logits_BI[:1, [7, 2, 5]], room_B=torch.tensor([100]),
                  rival_BI=torch.zeros(1, 3, dtype=torch.bool), index_BI=few)
    assert torch.equal(every[:, [7, 2, 5]], some), "a block's noise is that of its number"
    for other in (dict(seed=1), dict(refocus=2), dict(row=1)):
        assert not torch.equal(found, scores(allocator, logits_BI, **other))


def test_stochastic_shows_in_proportion():
    """Gumbel noise and the best one: a draw from softmax(logits / T)."""
    logits = torch.tensor([0.0, 0.5, 1.0, 2.0]).double()
    found = scores(Allocator.parse("stochastic:0.8"), logits.expand(4000, 4),
                   room_B=torch.ones(4000, dtype=torch.int64))
    share = torch.bincount(found.argmax(1), minlength=4) / 4000
    np.testing.assert_allclose(share, (logits / 0.8).softmax(0), atol=0.03)
    assert ((found > 0).sum(1) == 1).all()
