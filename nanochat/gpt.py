"""The GPT of nanochat (mid-2026), every feature switchable, with what MegaContext needs from a base model.

Untied embeddings, parameter-free RMS norm, RoPE, QK-norm, ReLU², value embeddings, smear, residual and x0 scalars,
backout, logit softcap, sliding-window pattern. Parameter names and arithmetic are nanochat's, so its checkpoints load
(`GPT.from_nanochat`). q and k are normed *before* they are rotated: rotation keeps norms, so this equals
rotate-then-norm to rounding, and a table that also damps (mc.gaussian_rope) is not undone by the norm.

Additions: `inputs_embeds` (enter after the embedding norm, before smear), explicit per-row positions or ready rotary
tables, `linked` (which entries continue the one before them: smear and key shift act only there), a logit bias per key,
a KV cache with per-row lengths, key shift, tied query/key start, partial RoPE.

Shapes: B rows, S entries, D width, H heads, G kv heads, E head width, V vocabulary (padded: P).
"""

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError, from_plain, one_line
from nanochat.kv_cache import KVCache

SMEAR_DIMS, VALUE_GATE_DIMS = 24, 12  # leading dims that the gates read
QK_SCALE = 1.2  # sharpens attention after QK-norm
GATE_RANGE = 3.0  # value gate: 3·sigmoid


@dataclass(frozen=True)
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "L"  # tiled over the layers, last layer always L; S = a quarter of sequence_len
    value_embeds: bool = True
    smear: bool = True
    resid_scalars: bool = True
    backout: bool = True
    key_shift: bool = False  # k_t ← (1−a)·k_t + a·k_{t−1}, a learned per kv head, starting at 0.9
    tie_qk: bool = False  # start with W_k = W_q
    rope_fraction: float = 1.0  # share of each head's dims that is rotated; the rest carries no position
    rope_base: float = 100_000.0
    softcap: float = 15.0

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "rope_base", "softcap"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} {getattr(self, name)} must be positive")
        if self.n_embd < (needed := max(SMEAR_DIMS * self.smear, VALUE_GATE_DIMS * self.value_embeds)):
            raise UserError(f"width {self.n_embd}: smear and value embeddings read {needed} dimensions; widen the "
                            "model or switch them off")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"width {self.n_embd} does not divide into {self.n_head} heads of even width")
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} heads do not share {self.n_kv_head} kv heads evenly")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern {self.window_pattern!r}: use the letters S and L")
        if not 0.0 <= self.rope_fraction <= 1.0:
            raise UserError(f"rope_fraction {self.rope_fraction} is not between 0 and 1")
        if self.tie_qk and self.n_head != self.n_kv_head:
            raise UserError(f"tie_qk needs as many kv heads as heads, not {self.n_kv_head} and {self.n_head}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // 64) * 64

    def windows(self) -> list[int]:
        """Keys before the token itself that each layer sees."""
        short = -(-(self.sequence_len // 4) // 128) * 128
        size = {"L": self.sequence_len, "S": short}
        pattern = [size[self.window_pattern[i % len(self.window_pattern)]] for i in range(self.n_layer)]
        return pattern[:-1] + [self.sequence_len]

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


class Captured(NamedTuple):
    """One layer's attention as it ran, for teachers: q, y [B,H,S,E], k, v [B,G,S,E], after rotation and scaling."""

    q: Tensor
    k: Tensor
    v: Tensor
    y: Tensor


# (layer, q [B,H,S,E], k [B,G,M,E]) -> bool [B, 1 or H, S, M]: keys that each query may see
Select = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class ForwardContext:
    """What every layer of one pass shares."""

    cos: Tensor  # [1 or B, S, 1, E/2]
    sin: Tensor
    linked: Tensor | None  # [B, S] bool, None: every entry but a row's first
    key_bias: Tensor | None  # [B, S] or [B, G, S], added to the logits of these keys
    masks: dict[int, Tensor | None]  # window -> bool mask, None: plain causal
    cache: KVCache | None
    slots: Tensor | None  # [B, S] cache slots of this pass
    capture: list[Captured] | None
    before: Tensor | None = None  # [B, S] cache slots of the entries before these
    select: Select | None = None


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation by −θ of half-split pairs; cos and sin may carry a damping factor."""
    a, b = x_BSHE.chunk(2, -1)
    cos, sin = cos.to(x_BSHE.dtype), sin.to(x_BSHE.dtype)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def predecessors(x_BSx: Tensor, kept: Tensor, ctx: ForwardContext) -> Tensor:
    """The x of the entry before each, from the cache's buffer `kept`, into which x goes first."""
    ctx.cache.put(kept, ctx.slots, x_BSx)
    return ctx.cache.at(kept, ctx.before).to(x_BSx.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, config.n_head, config.n_kv_head, config.head_dim
        kv_width = self.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.ve_gate = nn.Linear(VALUE_GATE_DIMS, self.n_kv_head, bias=False) if config.has_value_embed(layer) else None
        self.key_shift = nn.Parameter(torch.full((self.n_kv_head,), 0.9)) if config.key_shift else None

    def _shift_keys(self, k_BSGE: Tensor, ctx: ForwardContext) -> Tensor:
        if ctx.cache is None:
            before = torch.cat([k_BSGE[:, :1], k_BSGE[:, :-1]], 1)
        else:
            before = predecessors(k_BSGE, ctx.cache.k_unshifted[self.layer], ctx)
        amount = self.key_shift.to(k_BSGE.dtype)[:, None]
        if ctx.linked is not None:
            amount = amount * ctx.linked[:, :, None, None]
        return torch.lerp(k_BSGE, before, amount.expand_as(k_BSGE))

    def forward(self, x_BSD: Tensor, ve_BSG: Tensor | None, window: int, ctx: ForwardContext) -> Tensor:
        B, S, D = x_BSD.shape
        q = self.c_q(x_BSD).view(B, S, self.n_head, self.head_dim)
        k = self.c_k(x_BSD).view(B, S, self.n_kv_head, self.head_dim)
        v = self.c_v(x_BSD).view(B, S, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None and ve_BSG is not None:
            gate = GATE_RANGE * torch.sigmoid(self.ve_gate(x_BSD[..., :VALUE_GATE_DIMS]))
            v = v + gate.unsqueeze(-1) * ve_BSG.view(v.shape).to(v.dtype)
        if self.key_shift is not None:
            k = self._shift_keys(k, ctx)
        q, k = rotate(norm(q) * QK_SCALE, ctx.cos, ctx.sin), rotate(norm(k) * QK_SCALE, ctx.cos, ctx.sin)
        return self.c_proj(attention(self.layer, q, k, v, window, ctx))


def attention(layer: int, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, window: int, ctx: ForwardContext) -> Tensor:
    """[B, S, H·E] what the heads of a layer read, through the pass's cache, mask, selection and capture."""
    if ctx.cache is not None:
        k_BSGE, v_BSGE = through_cache(layer, k_BSGE, v_BSGE, ctx)
    q, k, v = q_BSHE.transpose(1, 2), k_BSGE.transpose(1, 2), v_BSGE.to(q_BSHE.dtype).transpose(1, 2)
    mask = ctx.masks[window]
    if ctx.select is not None:
        chosen = ctx.select(layer, q, k)
        mask = chosen if mask is None else mask & chosen
    y = attend(q, k, v, mask, ctx.key_bias)
    if ctx.capture is not None:
        ctx.capture.append(Captured(q, k, v, y))
    return y.transpose(1, 2).flatten(2)


def through_cache(layer: int, k_BSGE: Tensor, v_BSGE: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """Keys and values of this pass go into the cache; what is visible there comes back."""
    cache, buffers = ctx.cache, (ctx.cache.k[layer], ctx.cache.v[layer])
    for buffer, new in zip(buffers, (k_BSGE, v_BSGE)):
        cache.put(buffer, ctx.slots, new)
    return tuple(cache.visible(buffer, ctx.slots.shape[1]).to(k_BSGE.dtype) for buffer in buffers)


def attend(q_BHSE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, mask: Tensor | None, key_bias: Tensor | None) -> Tensor:
    """Scaled dot-product attention; mask (bool, or float to add to the logits) None means causal;
    a single query sees every key.

    A bias per key enters as one more dimension of q (1) and k (bias·√E), so the fast causal kernels still apply and the
    bias gets its gradient. Widths stay multiples of 8.
    """
    E = q_BHSE.shape[-1]
    if key_bias is not None:
        bias = key_bias if key_bias.ndim == 3 else key_bias[:, None]
        bias = (bias * math.sqrt(E)).to(q_BHSE.dtype)[..., None].expand(*k_BGSE.shape[:-1], 1)
        q_BHSE = F.pad(torch.cat([q_BHSE, torch.ones_like(q_BHSE[..., :1])], -1), (0, 7))
        k_BGSE, v_BGSE = F.pad(torch.cat([k_BGSE, bias], -1), (0, 7)), F.pad(v_BGSE, (0, 8))
    y = F.scaled_dot_product_attention(q_BHSE, k_BGSE, v_BGSE, attn_mask=mask,
                                       is_causal=mask is None and q_BHSE.shape[2] > 1, scale=1 / math.sqrt(E),
                                       enable_gqa=k_BGSE.shape[1] != q_BHSE.shape[1])
    return y if key_bias is None else y[..., :E]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x: Tensor, ve: Tensor | None, window: int, ctx: ForwardContext) -> Tensor:
        x = x + self.attn(norm(x), ve, window, ctx)
        return x + self.mlp(norm(x))


class Decoder(nn.Module):
    """What decoders share that pass as a base (`nanochat.base.Base`); each brings `embed`, `hidden`, `logits` and
    `inverse_frequencies`, and has `transformer` (`wte`, `h`) and `lm_head`."""

    config: "GPTConfig"

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [S] or [B, S], any real dtype -> cos, sin [1 or B, S, 1, E/2]; the angle is taken in float64."""
        angle = positions.double()[..., None] * self.inverse_frequencies(positions.device)
        dtype = torch.float64 if self.lm_head.weight.dtype == torch.float64 else torch.float32
        cos, sin = angle.cos().to(dtype).unsqueeze(-2), angle.sin().to(dtype).unsqueeze(-2)
        return (cos[None], sin[None]) if positions.ndim == 1 else (cos, sin)

    def _masks(self, S: int, cache: KVCache | None, slots: Tensor | None, lift_windows: bool,
               device) -> dict[int, Tensor | None]:
        """A mask per window size, [S, S] or with a cache what `KVCache.mask` says; None where plain causal serves."""
        masks: dict[int, Tensor | None] = {}
        for window in set(self.config.windows()):
            reach = math.inf if lift_windows and window == self.config.sequence_len else window
            if cache is not None:
                masks[window] = cache.mask(slots, reach)
            elif S - 1 <= reach:
                masks[window] = None
            else:
                distance = torch.arange(S, device=device)[:, None] - torch.arange(S, device=device)
                masks[window] = (distance >= 0) & (distance <= reach)
        return masks

    def _begin(self, idx: Tensor | None, inputs_embeds: Tensor | None, positions: Tensor | None,
               rotary: tuple[Tensor, Tensor] | None, linked: Tensor | None, key_bias: Tensor | None,
               cache: KVCache | None, capture: list[Captured] | None, lift_windows: bool, select: Select | None,
               layers: range | None) -> tuple[Tensor, ForwardContext, range]:
        """The entries [B, S, D] of a pass, what its layers share, and which they are. ValueError as `Base.hidden`."""
        layers = range(self.config.n_layer) if layers is None else layers
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= self.config.n_layer:
            raise ValueError(f"{layers} is no range of the {self.config.n_layer} layers")
        if layers.start and inputs_embeds is None:
            raise ValueError(f"a pass from layer {layers.start} needs the stream before it as inputs_embeds")
        x = self.embed(idx) if inputs_embeds is None else inputs_embeds
        S = x.shape[1]
        if rotary is None:
            if positions is None:
                positions = torch.arange(S, device=x.device)
                positions = positions if cache is None else cache.lengths[:, None] + positions
            rotary = self.rotary(positions)
        slots = before = None
        if cache is not None:
            if key_bias is not None:
                raise ValueError("a cache keeps the bias of its own entries, for later passes need it too")
            slots, before = cache.slots_for(S)
            follows = before >= 0
            linked, before = follows if linked is None else linked & follows, before.clamp_min(0)
        return x, ForwardContext(*rotary, linked, key_bias, self._masks(S, cache, slots, lift_windows, x.device), cache,
                                 slots, capture, before, select), layers

    def forward(self, idx: Tensor | None, targets: Tensor | None = None, **entries) -> Tensor:
        """Logits [B, S, V]; with `targets` [B, S] (−1 = ignored) the mean loss instead. Keywords as `hidden`."""
        hidden = self.hidden(idx, **entries)
        return self.logits(hidden) if targets is None else self.loss(hidden, targets)

    def loss(self, hidden_BSD: Tensor, targets_BS: Tensor, num_targets: int | None = None) -> Tensor:
        """Mean next-token loss. num_targets: the most targets (≥ 0) any row has, known on the host: the head runs on
        that many positions of each row instead of all, to the same result."""
        if num_targets is not None and num_targets < targets_BS.shape[1]:
            first = (targets_BS >= 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :num_targets]
            hidden_BSD = hidden_BSD.gather(1, first[..., None].expand(-1, -1, hidden_BSD.shape[-1]))
            targets_BS = targets_BS.gather(1, first)
        return mean_loss(token_losses(self.logits(hidden_BSD), targets_BS), targets_BS)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, S: int, num_targets: int | None = None) -> float:
        """Training FLOPs per token of a row of S, from shapes: 6 per weight of every matrix
        product, 12·H·E per visible key.

        num_targets: positions of a row that the head runs on (default: all).
        """
        head = self.lm_head.weight.numel()
        inner = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear)) - head
        visible = sum(short * (short + 1) / 2 + (S - short) * (w + 1) for w in self.config.windows()
                      for short in [min(S, w + 1)]) / S
        read = head * (S if num_targets is None else num_targets) / S
        return 6.0 * (inner + read) + 12.0 * self.config.n_head * self.config.head_dim * visible


class GPT(Decoder):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.padded_vocab, config.n_embd),
            "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
        })
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab, bias=False)
        kv_width = config.n_kv_head * config.head_dim
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(config.padded_vocab, kv_width) for i in range(config.n_layer)
            if config.has_value_embed(i)})
        if config.resid_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), 0.1))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_DIMS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Projections back into the stream start at zero, the head near zero, the rest at the usual 1/√fan-in."""
        bound = math.sqrt(3 / self.config.n_embd)  # uniform with standard deviation 1/√D
        nn.init.normal_(self.transformer.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            if self.config.tie_qk:
                block.attn.c_k.weight.copy_(block.attn.c_q.weight)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)
        if self.config.smear:
            nn.init.zeros_(self.smear_gate.weight)

    @classmethod
    def from_nanochat(cls, config: dict, state_dict: dict[str, Tensor]) -> "GPT":
        """A karpathy/nanochat checkpoint (its `model_config` and model state) as a GPT in float32, in evaluation mode.

        Features that the checkpoint has no weights for are switched off; without `window_pattern` every layer is L;
        without the residual scalars they are 1 and 0. UserError when keys are missing, unknown or of the wrong shape.
        """
        if wrong := [name for name, t in state_dict.items() if not (isinstance(name, str) and isinstance(t, Tensor))]:
            raise UserError(f"not a checkpoint of nanochat: {one_line(wrong[0])} is no tensor")
        state = {name.removeprefix("_orig_mod."): t.float() for name, t in state_dict.items()}
        names = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        if missing := [name for name in (*names, ) if name not in config]:
            raise UserError(f"not a nanochat model config: {', '.join(missing)} missing")
        known = config_from_dict({**{name: config[name] for name in names},
                                  "window_pattern": config.get("window_pattern") or "L",
                                  "value_embeds": any(name.startswith("value_embeds.") for name in state),
                                  "smear": "smear_lambda" in state, "backout": "backout_lambda" in state})
        if (embedding := state.get("transformer.wte.weight")) is None or embedding.shape != (known.padded_vocab,
                                                                                             known.n_embd) or known.n_layer > len(state):  # noqa: E501
            # before memory is taken
            raise UserError("not a checkpoint of this model config: other width, vocabulary or number of layers")
        model = cls(known)
        state.setdefault("resid_lambdas", torch.ones(known.n_layer))
        state.setdefault("x0_lambdas", torch.zeros(known.n_layer))
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise UserError("not a checkpoint of this model config: " + " ".join(str(e).split())) from None
        return model.eval()

    def embed(self, idx_BS: Tensor) -> Tensor:
        """[B, S, D] normed token embeddings: what gists are made of and what `inputs_embeds` stands for."""
        return norm(self.transformer.wte(idx_BS))

    def inverse_frequencies(self, device=None) -> Tensor:
        """[E/2] float64 radians per token, zero in the pairs that partial RoPE leaves unrotated."""
        half = self.config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=device) / half
        rotated = torch.arange(half, device=device) < round(self.config.rope_fraction * half)
        return self.config.rope_base ** -exponents * rotated

    def hidden(self, idx: Tensor | None, *, inputs_embeds: Tensor | None = None, positions: Tensor | None = None,
               rotary: tuple[Tensor, Tensor] | None = None, linked: Tensor | None = None,
               key_bias: Tensor | None = None,
               cache: KVCache | None = None, counts: Tensor | None = None, capture: list[Captured] | None = None,
               lift_windows: bool = False, select: Select | None = None, middle: list[Tensor] | None = None,
               layers: range | None = None) -> Tensor:
        """Final normed hidden states [B, S, D].

        idx [B, S] int64, −1 on entries that are not tokens; may be None when `inputs_embeds` [B, S, D] is given and the
        model has no value embeddings. positions [S] or [B, S] in global tokens (default: 0… or what the cache holds
        onward), or `rotary` = (cos, sin) [B, S, 1, E/2] ready made. linked [B, S] bool: the entry continues the one
        before it (default: all but a row's first). key_bias [B, S] or [B, G, S] logits. cache: read and extended, by
        `counts` [B] entries a row (default S).
        capture: gets one `Captured` a layer. lift_windows: L layers see everything however long. select: which keys
        each query may see, per layer and head, itself causal where the pass is (with a cache or a window its own mask
        holds too). middle: gets the normed hidden states [B, S, D] behind the middle layer. layers: run these alone
        (`nanochat.base.Base.hidden`); a model with residual scalars or backout begins at layer 0.
        """
        cfg = self.config
        if idx is None and (inputs_embeds is None or cfg.value_embeds):
            raise ValueError("idx is needed: without inputs_embeds, and by a model with value embeddings")
        x, ctx, layers = self._begin(idx, inputs_embeds, positions, rotary, linked, key_bias, cache, capture,
                                     lift_windows, select, layers)
        if layers.start and (cfg.resid_scalars or cfg.backout):
            raise ValueError(f"a pass from layer {layers.start}: residual scalars and backout need the layers before")
        S = x.shape[1]
        if cfg.smear and layers.start == 0:
            x = self._smear(x, ctx)
        tokens = None if idx is None else idx.clamp_min(0)
        x0, x_mid = x, None
        windows = cfg.windows()
        for i in layers:
            if cfg.resid_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = None
            if str(i) in self.value_embeds:
                ve = self.value_embeds[str(i)](tokens)
                if inputs_embeds is not None:
                    ve = ve * (idx >= 0).unsqueeze(-1)
            x = self.transformer.h[i](x, ve, windows[i], ctx)
            if i == cfg.n_layer // 2:
                x_mid = x
                if middle is not None:
                    middle.append(norm(x))
        if cache is not None:
            cache.advance(S, counts)
        if layers.stop < cfg.n_layer:
            return x
        return norm(x - self.backout_lambda * x_mid if cfg.backout else x)

    def _smear(self, x_BSD: Tensor, ctx: ForwardContext) -> Tensor:
        if ctx.cache is None:
            before = F.pad(x_BSD, (0, 0, 1, 0))[:, :-1]
        else:
            before = predecessors(x_BSD, ctx.cache.x_unsmeared, ctx)
        gate = self.smear_lambda.to(x_BSD.dtype) * torch.sigmoid(self.smear_gate(x_BSD[..., :SMEAR_DIMS]))
        if ctx.linked is not None:
            gate = gate * ctx.linked.unsqueeze(-1)
        return x_BSD + gate * before

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32 (float64 for a float64 model), softly capped."""
        raw = self.lm_head(hidden / self.config.softcap)[..., :self.config.vocab_size]  # divided while it is small
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return self.config.softcap * torch.tanh(raw)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, S] nats, zero where the target is −1."""
    flat = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none")
    return flat.view(targets.shape)


def mean_loss(losses_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean over rows of each row's mean over its targets: the same however rows are spread
    over ranks and micro-steps."""
    counts = (targets_BS >= 0).sum(1)
    return (losses_BS.sum(1) / counts.clamp_min(1)).mean()


def config_from_dict(values: dict) -> GPTConfig:
    """A GPTConfig from what `dataclasses.asdict` stored; UserError for anything else."""
    return from_plain(GPTConfig, values, "model config")
