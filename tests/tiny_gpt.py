"""A GPT small enough for float64 tests, with random values wherever the real one starts at zero."""

import torch

from nanochat.gpt import GPT, GPTConfig

TINY = {"sequence_len": 5, "vocab_size": 50, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "key_shift": True}


def tiny_gpt(seed: int = 0, dtype: torch.dtype = torch.float64, **config) -> GPT:
    """Windows of 5 entries in every layer by default, so that they act on short rows."""
    model = GPT(GPTConfig(**{**TINY, **config})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.ndim > 1 else 0.7))
    return model.eval()


def random_tokens(*shape: int, seed: int = 1, vocab: int = 50) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
