"""Token dropping by a trained classifier, in the manner of LLMLingua-2 (Pan et al. 2024): a small bidirectional network
says of every token whether it is worth keeping, without knowing what will be asked. Its
labels: `scripts.eval.importance`.

Shapes: B rows, n tokens of history, D width of the base, C width of the classifier, X tokens read together.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc.gistnet import Layer, linear
from nanochat.common import UserError, from_plain, parse_json
from nanochat.gpt import GPT
from nanochat.loading import build
from nanochat.outputs import output_file, replacing
from scripts.eval.importance import keep_labels
from scripts.eval.methods.token_drop import TokenDrop


FILE = "keep_drop.safetensors"  # beside the labels that taught it, and beside the weights that read what it keeps


@dataclass(frozen=True)
class TokenClassifierConfig:
    d_model: int
    width: int = 64
    n_head: int = 4
    n_layer: int = 2
    span: int = 64  # X


class TokenClassifier(nn.Module):
    def __init__(self, config: TokenClassifierConfig):
        super().__init__()
        self.config = config
        self.embed = linear(config.d_model, config.width)
        self.position_XC = nn.Parameter(0.02 * torch.randn(config.span, config.width))
        self.layers = nn.ModuleList(Layer(config.width, config.n_head) for _ in range(config.n_layer))
        self.head = nn.Linear(config.width, 1)

    def forward(self, embeds_BnD: Tensor) -> Tensor:
        """[B, n] logit that a token is to be kept. Tokens see those of their own span, before and behind."""
        B, n, D = embeds_BnD.shape
        span = self.config.span
        x = F.pad(embeds_BnD.detach(), (0, 0, 0, -n % span)).reshape(-1, span, D)
        mask = (torch.arange(x.shape[0] // B * span, device=x.device) < n).view(1, -1, span).expand(B, -1,
                                                                                                    -1).reshape(-1, span)  # noqa: E501
        h = self.embed(x) + self.position_XC
        for layer in self.layers:
            h = layer(h, h, mask)
        return self.head(h).reshape(B, -1)[:, :n]

    def flops(self, n: int) -> float:
        """Forward FLOPs of n tokens."""
        c = self.config
        spans = -(-n // c.span)
        return spans * (2.0 * c.span * c.width * (c.d_model + 1) + sum(layer.flops(c.span, c.span)
                                                                       for layer in self.layers))


class LearnedDrop(TokenDrop):
    """Keeps what the classifier would keep."""

    name = "drop_learned"
    needs = ("classifier",)

    def scores(self, history_BN: Tensor) -> Tensor:
        return self.models.classifier(self.gpt.embed(history_BN))

    def choosing_flops(self, n: int) -> float:
        return self.models.classifier.flops(n)


def train_classifier(model: TokenClassifier, gpt: GPT, shards: list[tuple[Tensor, Tensor]], *, share: float,
                     steps: int, lr: float) -> list[float]:
    """Binary cross-entropy, shard by shard, `steps` of them; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        tokens, worth = shards[step % len(shards)]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        with torch.no_grad():
            embeds = gpt.embed(tokens)
        loss = F.binary_cross_entropy_with_logits(model(embeds), keep_labels(worth, share).float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_token_classifier(path: Path, model: TokenClassifier, meta: dict) -> None:
    """One safetensors file; config and meta as JSON in its header."""
    output_file(path)
    header = {"config": json.dumps(asdict(model.config)), "meta": json.dumps(meta)}
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    with replacing(path, SafetensorError) as part:
        save_file(state, part, metadata=header)


def load_token_classifier(path: Path, device: torch.device | str = "cpu") -> TokenClassifier:
    """UserError unless the file is what `save_token_classifier` writes."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            config = from_plain(TokenClassifierConfig, parse_json(file.metadata()["config"]), "its config")
            state = {name: file.get_tensor(name) for name in file.keys()}
        if not 0 < config.n_layer <= len(state) or min(config.n_head, config.width, config.d_model, config.span) < 1:
            raise ValueError(f"{len(state)} tensors, {config.n_layer} layers")
        model = build(lambda: TokenClassifier(config), state, str(path), device,
                      (config.d_model, config.width, config.n_head, config.span))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, AssertionError, SafetensorError, UserError) as e:
        why = f"{type(e).__name__}: {str(e).splitlines()[0]}"
        raise UserError(
            f"{path} is no keep/drop classifier ({why}); make one: python -m scripts.mc_study classifier") from None
    return model
