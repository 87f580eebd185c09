"""What MegaContext needs of a base model, as one protocol: the calls, their shapes and their errors.

`nanochat.gpt.GPT` and `nanochat.llama.Llama` meet it, and one test-suite holds both to it
(tests/nanochat/test_base_protocol.py). Whoever adds a base passes that suite and nothing else changes.

A base reads *entries*: tokens, or vectors of the width of its embeddings (gists). Where an entry stands is said by
`positions` or by ready tables of its rotation, not by its place in the row; which entries it sees, by causality along
the row (without a cache), by slots (with one), by windows and by `select`.

Shapes: B rows, S entries of a pass, M entries visible in it, D width, H heads, G kv heads, E head width, F = E/2
frequencies, V vocabulary, L layers.
"""

from typing import Protocol, Sequence

import torch
from torch import Tensor, nn

from nanochat.gpt import Captured, Select
from nanochat.kv_cache import KVCache


class BaseConfig(Protocol):
    """A frozen dataclass of plain values (`dataclasses.asdict` of it is hashed into fingerprints)."""

    sequence_len: int  # entries that an unwindowed layer sees, and positions that were trained
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    key_shift: bool  # keys, embeddings take from the entry before: `KVCache` then keeps what the next entry needs
    smear: bool
    value_embeds: bool  # `hidden` needs `idx` beside `inputs_embeds`

    @property
    def head_dim(self) -> int: ...

    @property
    def window_pattern(self) -> str:
        """A letter a layer, repeated: L unwindowed, S windowed; for messages."""

    def windows(self) -> Sequence[int]:
        """[L] keys before the entry itself that each layer sees; `sequence_len` means unwindowed."""


class Base(Protocol):
    """A decoder. `transformer["wte"]` is the `nn.Embedding` of its tokens, `transformer["h"]` its layers,
    `lm_head.weight` [≥ V, D] its head, whose device and dtype are the model's; tied weights are one parameter."""

    config: BaseConfig
    transformer: nn.ModuleDict
    lm_head: nn.Linear

    def embed(self, idx_BS: Tensor) -> Tensor:
        """int64, each in [0, V) -> [B, S, D] what `inputs_embeds` stands for: `hidden(idx)` and
        `hidden(idx, inputs_embeds=embed(idx))` agree to the bit."""

    def inverse_frequencies(self, device: torch.device | None = None) -> Tensor:
        """[F] float64 radians per position, rope scaling included; zero where a pair of dimensions is not rotated."""

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [S] or [B, S] of any real dtype -> cos, sin [1 or B, S, 1, F], float32 (float64 of a float64
        model) of the angle position · frequency, taken in float64."""

    def hidden(
        self,
        idx: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        linked: Tensor | None = None,
        key_bias: Tensor | None = None,
        cache: KVCache | None = None,
        counts: Tensor | None = None,
        capture: list[Captured] | None = None,
        lift_windows: bool = False,
        select: Select | None = None,
        middle: list[Tensor] | None = None,
        layers: range | None = None,
    ) -> Tensor:
        """[B, S, D] hidden states behind the final norm, in the model's dtype.

        idx [B, S] int64, −1 on entries that are not tokens; None where `inputs_embeds` [B, S, D] is given and the model
        has no value embeddings.
        positions [S] or [B, S], any real dtype, need be neither contiguous nor ascending; default: 0… or what the cache
        holds onward. rotary: instead (cos, sin), each [1 or B, S, 1, F], which may damp as well (`mc.gaussian_rope`).
        Only differences of positions act.
        linked [B, S] bool: the entry continues the one before it; default: all but a row's first. It acts in models
        whose entries take something from the one before (smear, key shift) and in no other.
        key_bias [B, S] or [B, G, S]: added to the logits of these keys in every layer; it gets its gradient.
        cache: read, and extended by `counts` [B] of the S entries of each row (default: all); its slots decide
        causality. A row's result depends neither on the other rows nor on how its entries were cut into passes.
        capture: gets one `Captured` a layer that ran, after rotation (`nanochat.gpt.Captured`); y is the pass's own, so
        that a backward pass leaves its gradient there.
        lift_windows: layers whose window is `sequence_len` see everything, however long.
        select(layer, q, k) -> bool [B, 1 or H, S, M]: keys that each query may see; causal itself where no cache and no
        window masks.
        middle: gets the hidden states [B, S, D] behind the middle layer (L // 2), RMS-normed.
        layers: run these layers alone. A pass that ends before the last layer gives the stream as it stands there,
        un-normed; one that begins after the first takes that stream as `inputs_embeds`. So
        `hidden(idx, inputs_embeds=hidden(idx, layers=range(k)), layers=range(k, L))` is `hidden(idx)`. One cache serves
        passes of one range.

        ValueError: neither idx nor inputs_embeds, or no idx for value embeddings; key_bias beside a cache (which keeps
        the bias of its own entries); more entries than the cache holds; a range that is not of the model's layers, or
        that begins where the model cannot (residual scalars and backout of nanochat's GPT need the layers before).
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, D] -> [..., V] float32 (float64 of a float64 model)."""

    def loss(self, hidden_BSD: Tensor, targets_BS: Tensor, num_targets: int | None = None) -> Tensor:
        """Mean over rows of each row's mean next-token loss in nats; targets int64, −1 ignored; num_targets: the most
        targets of any row, known on the host."""

    def num_parameters(self) -> int: ...

    def flops_per_token(self, S: int, num_targets: int | None = None) -> float:
        """Training FLOPs per token of a row of S, from shapes."""
