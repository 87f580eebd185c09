"""Terms of the lens's loss against loops over their definitions: which blocks each query sees, and how the two are compared."""

import torch

VISIBLE = torch.ones(3, 7, 12, dtype=torch.bool).tril(4)  # the first queries see few
VISIBLE[1, 2] = False
VISIBLE[2, 3] = torch.arange(12) == 4


def randoms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop(function) -> torch.Tensor:
    """[3, 7] of a function of (row, query, visible blocks)."""
    return torch.tensor([[function(b, q, VISIBLE[b, q].nonzero()[:, 0].tolist()) for q in range(7)] for b in range(3)], dtype=torch.float64)


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().sum() > 0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
