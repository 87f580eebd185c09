"""Training speed of the harness's GPT against the same model written as one plain PyTorch module:
`python -m scripts.mc_bench vanilla`.

Both start from the same weights, see the same batches, use the same optimizer and take turns in blocks of a few steps
inside one process, so that a noisy machine slows both. The ratio is that of tokens per second (above 1: the harness is
faster), the median over pairs of blocks, with a 95 % bootstrap interval. Fails if the two do not give the same losses.
"""

import math
import time
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import FlagParser, UserError, init_distributed, seed_everything
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, gpt_param_groups
from scripts.bench.base import print_json, ratio_of

SAME_LOSS, COMPARED_STEPS = 1e-4, 3  # nats; later on rounding has grown


class PlainBlock(nn.Module):
    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self.attn, name, nn.Linear(D, D, bias=False))
        self.attn.key_shift = nn.Parameter(torch.empty(heads))
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        n = F.rms_norm(x, (D,))
        q, k, v = (w(n).view(B, T, self.heads, -1) for w in (self.attn.c_q, self.attn.c_k, self.attn.c_v))
        k = torch.lerp(k, torch.cat([k[:, :1], k[:, :-1]], 1), self.attn.key_shift[:, None])
        q, k = (self.rotate(F.rms_norm(z, z.shape[-1:]) * 1.2, cos, sin).transpose(1, 2) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp.c_proj(F.relu(self.mlp.c_fc(F.rms_norm(x, (D,)))).square())

    @staticmethod
    def rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = z.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class PlainGPT(nn.Module):
    """The small model's architecture with nothing to switch: full causal attention, key shift, smear, scalars, backout,
    no value embeddings. Parameter names are GPT's."""

    def __init__(self, vocab: int, layers: int, heads: int, D: int, T: int):
        super().__init__()
        self.vocab, padded = vocab, -(-vocab // 64) * 64
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(padded, D),
                                          "h": nn.ModuleList(PlainBlock(D, heads) for _ in range(layers))})
        self.lm_head = nn.Linear(D, padded, bias=False)
        self.resid_lambdas, self.x0_lambdas = (nn.Parameter(torch.empty(layers)) for _ in range(2))
        self.smear_gate = nn.Linear(24, 1, bias=False)
        self.smear_lambda, self.backout_lambda = (nn.Parameter(torch.empty(1)) for _ in range(2))
        half = D // heads // 2
        angle = torch.outer(torch.arange(T).double(), 100_000.0 ** -(torch.arange(half).double() / half))
        self.register_buffer("cos", angle.cos().float()[None, :, None], persistent=False)
        self.register_buffer("sin", angle.sin().float()[None, :, None], persistent=False)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.transformer.wte(idx)
        x = F.rms_norm(x, x.shape[-1:])
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :24]))
        x = x0 = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
        for i, block in enumerate(self.transformer.h):
            x = block(self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0, self.cos, self.sin)
            if i == len(self.transformer.h) // 2:
                middle = x
        x = x - self.backout_lambda * middle
        logits = self.lm_head(F.rms_norm(x, x.shape[-1:]))[..., :self.vocab].float()
        return F.cross_entropy((15 * torch.tanh(logits / 15)).flatten(0, 1), targets.flatten())


class Trainee:
    """A model with its optimizer. `losses` keeps the first steps'."""

    def __init__(self, model: nn.Module, D: int, autocast: bool):
        groups = gpt_param_groups(model.named_parameters(), D, matrix_lr=0.02, embedding_lr=0.2, unembedding_lr=0.004,
                                  scalar_lr=0.1,
                                  weight_decay=0.0)
        self.model, self.optimizer, self.autocast, self.losses = model, MuonAdamW(groups), autocast, []

    def train(self, batches: list[Tensor]) -> float:
        """Seconds that a block of steps on `batches` [B, T + 1] takes."""
        start = time.perf_counter()
        for tokens in batches:
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if len(self.losses) < COMPARED_STEPS:
                self.losses.append(loss.item())
        if batches[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--n_layer", type=int, default=4, help="layers")
    parser.add_argument("--n_head", type=int, default=4, help="heads")
    parser.add_argument("--n_embd", type=int, default=128, help="width")
    parser.add_argument("--vocab_size", type=int, default=3105, help="token ids (uniformly random ones are trained on)")
    parser.add_argument("--row_tokens", type=int, default=512, help="tokens a row")
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--pairs", type=int, default=24,
                        help="pairs of blocks that are timed, after one for warming up")
    parser.add_argument("--block_steps", type=int, default=3, help="steps a block")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_seed("weights and batches")
    parser.add_device("auto (CUDA when there is one), cpu or cuda; CUDA runs under bfloat16 autocast")


def run(args: Namespace) -> None:
    if min(args.row_tokens, args.rows, args.pairs - 1, args.block_steps) < 1:
        raise UserError("--row_tokens, --rows and --block_steps are at least 1, --pairs at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = init_distributed(args.device).device
    seed_everything(args.seed)
    T = args.row_tokens
    ours = GPT(GPTConfig(T, args.vocab_size, args.n_layer, args.n_head, args.n_head, args.n_embd, value_embeds=False,
                         key_shift=True))
    with torch.no_grad():  # what starts at zero would hide a difference
        for p in ours.parameters():
            p += 0.02 * torch.randn_like(p)
    plain = PlainGPT(args.vocab_size, args.n_layer, args.n_head, args.n_embd, T)
    plain.load_state_dict(ours.state_dict())
    trainees = [Trainee(model.to(device), args.n_embd, device.type == "cuda") for model in (ours, plain)]

    seconds = np.zeros((args.pairs + 1, 2))
    for pair in range(args.pairs + 1):
        batches = list(torch.randint(args.vocab_size, (args.block_steps, args.rows, T + 1), device=device))
        for which in (0, 1) if pair % 2 else (1, 0):
            seconds[pair, which] = trainees[which].train(batches)
    difference = max(abs(a - b) for a, b in zip(*(t.losses for t in trainees)))
    if not difference < (SAME_LOSS if device.type == "cpu" else 0.02):  # bfloat16 rounds at other places
        raise UserError(f"losses of the same weights differ by {difference:.2g} nats: {trainees[0].losses} and "
                        f"{trainees[1].losses}")
    ratio = ratio_of(seconds[1:])
    rates = args.block_steps * args.rows * T / np.median(seconds[1:], axis=0)
    print(f"{rates[0]:,.0f} tokens/s against {rates[1]:,.0f} in plain PyTorch: ratio {ratio}, "
          f"losses within {difference:.1e} nats (ln V = {math.log(args.vocab_size):.3f})")
    print_json({**ratio._asdict(), "tokens_per_second": float(rates[0]),
                "plain_tokens_per_second": float(rates[1]), "loss_difference": difference, "device": device.type})
