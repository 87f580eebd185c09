"""The Llama family behind the calls of `nanochat.base.Base`: Llama, Mistral, Qwen2, Qwen3 and what is built like them.

RMS norm with weights, SwiGLU, grouped queries, RoPE with scaled frequencies, tied or untied head; Qwen2's biases,
Qwen3's norms of q and k, a sliding window per layer. Parameters have the names of Hugging Face's checkpoints inside a
layer (`self_attn.q_proj`, `mlp.gate_proj`, …), so that weights and LoRA adapters need no table; outside they have those
of GPT.

Own code rather than `transformers`: MegaContext needs explicit positions, a bias per key, captured q and k and passes
over some of the layers, each of which its models drop, ignore or turn into another mask, from version to version. Tests
hold the logits to its own.

Shapes: B rows, S entries, D width, H heads, G kv heads, E head width, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import Captured, Decoder, ForwardContext, Select, attention
from nanochat.gpt import norm as unweighted_norm
from nanochat.gpt import rotate
from nanochat.kv_cache import KVCache

LARGEST = 1 << 24  # of any size in a configuration: a foreign one names no more memory than that


@dataclass(frozen=True)
class LlamaConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] = ()  # [E/2] by which frequencies are divided (`rope_divisors`); none: unscaled
    tied: bool = False  # the head is the token embedding
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None  # keys before the token itself that windowed layers see
    windowed: tuple[bool, ...] = ()  # per layer; none: no layer is
    # what nanochat's GPT has and this family has not
    key_shift: ClassVar[bool] = False
    smear: ClassVar[bool] = False
    value_embeds: ClassVar[bool] = False

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "mlp_width"):
            if not 0 < getattr(self, name) <= LARGEST:
                raise UserError(f"{name} {getattr(self, name)}: from 1 to {LARGEST}")
        for name in ("norm_eps", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} must be positive")
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads do not share {self.n_kv_head} kv heads evenly")
        if self.head_dim % 2:
            raise UserError(f"head width {self.head_dim} is odd: its dimensions are rotated in pairs")
        if self.rope_divisors and not (len(self.rope_divisors) == self.head_dim // 2
                                       and all(0 < x < math.inf for x in self.rope_divisors)):
            raise UserError(f"rope scaling: {self.head_dim // 2} positive divisors of frequencies are needed")
        if self.windowed and (len(self.windowed) != self.n_layer or self.window is None or self.window < 0):
            raise UserError(f"{len(self.windowed)} layers with or without a window of {self.window} tokens, of "
                            f"{self.n_layer} layers")

    @property
    def window_pattern(self) -> str:
        return "".join("S" if w else "L" for w in self.windowed) or "L"

    def windows(self) -> list[int]:
        return [self.window if w else self.sequence_len for w in self.windowed or (False,) * self.n_layer]


def frequencies(head_dim: int, base: float) -> Tensor:
    """[E/2] float64 radians per token."""
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rope_divisors(head_dim: int, base: float, scaling: Mapping[str, object]) -> tuple[float, ...]:
    """By how much each frequency is divided, for `rope_type` linear and llama3, whose fields `scaling` has.

    linear: all by `factor`. llama3: waves longer than original/low by `factor`, those shorter than original/high by 1,
    between them the frequency itself goes linearly, in original/wavelength, from one to the other.
    """
    kind, ones = scaling["rope_type"], torch.ones(head_dim // 2, dtype=torch.float64)
    if kind == "linear":
        return tuple((ones * scaling["factor"]).tolist())
    if kind != "llama3":
        raise UserError(f"rope scaling {kind!r} is not supported: default, linear and llama3 are")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies(head_dim, base) / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return tuple((1 / (kept + (1 - kept) / scaling["factor"])).tolist())


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Squares are summed in at least float32; the weight is applied in x's own dtype."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(precise, (x.shape[-1],), eps=self.eps).to(x.dtype)


class GroupedAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        c, self.layer = config, layer
        self.heads, self.kv_heads = (c.n_head, c.head_dim), (c.n_kv_head, c.head_dim)
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, window: int, ctx: ForwardContext) -> Tensor:
        q = self.q_norm(self.q_proj(x_BSD).unflatten(-1, self.heads))
        k = self.k_norm(self.k_proj(x_BSD).unflatten(-1, self.kv_heads))
        v = self.v_proj(x_BSD).unflatten(-1, self.kv_heads)
        q, k = (rotate(x, ctx.cos, ctx.sin) for x in (q, k))
        return self.o_proj(attention(self.layer, q, k, v, window, ctx))


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.n_embd, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = GroupedAttention(config, layer), SwiGLU(config)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: Tensor, window: int, ctx: ForwardContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), window, ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Decoder):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(LlamaBlock(config, i) for i in range(config.n_layer)),
            "norm": RMSNorm(config.n_embd, config.norm_eps),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """One parameter for embedding and head, if the configuration says so; after weights were assigned, too."""
        if self.config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def embed(self, idx_BS: Tensor) -> Tensor:
        return self.transformer.wte(idx_BS)

    def inverse_frequencies(self, device: torch.device | None = None) -> Tensor:
        plain = frequencies(self.config.head_dim, self.config.rope_base)
        divisors = self.config.rope_divisors
        return (plain / torch.tensor(divisors, dtype=torch.float64) if divisors else plain).to(device)

    def hidden(self, idx: Tensor | None, *, inputs_embeds: Tensor | None = None, positions: Tensor | None = None,
               rotary: tuple[Tensor, Tensor] | None = None, linked: Tensor | None = None,
               key_bias: Tensor | None = None, cache: KVCache | None = None, counts: Tensor | None = None,
               capture: list[Captured] | None = None, lift_windows: bool = False, select: Select | None = None,
               middle: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        """As `nanochat.base.Base.hidden`; linked acts nowhere, for no entry takes anything from the one before it."""
        if idx is None and inputs_embeds is None:
            raise ValueError("idx or inputs_embeds is needed")
        x, ctx, layers = self._begin(idx, inputs_embeds, positions, rotary, linked, key_bias, cache, capture,
                                     lift_windows, select, layers)
        ctx.sin = -ctx.sin  # this family turns the other way round than nanochat
        S, windows = x.shape[1], self.config.windows()
        for i in layers:
            x = self.transformer.h[i](x, windows[i], ctx)
            if middle is not None and i == self.config.n_layer // 2:
                middle.append(unweighted_norm(x))
        if cache is not None:
            cache.advance(S, counts)
        return self.transformer.norm(x) if layers.stop == self.config.n_layer else x

    def logits(self, hidden: Tensor) -> Tensor:
        raw = self.lm_head(hidden)
        return raw if raw.dtype == torch.float64 else raw.float()
