"""The trainable part of MegaContext and the working-context pass: [cut ‖ continuation] through the base in one forward,
in training perhaps with a far history around them.

An entry covering tokens [s, s+k) predicts token s+k; its target and its teacher are row s+k−1 of the full-context pass.
That one rule serves raw tokens and gists alike. Rows are packed to the left and padded at the end only, so
causal attention needs no mask.

Shapes: B rows, W capacity of the cut, M = W + H − 1 entries of the pass, D width, T tokens of the row, P rows read.
"""

import hashlib
import math
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Arm, load
from mc.config import MCConfig, complete, from_dict
from mc.focus_allocator import FocusConfig, GreedyAllocator
from mc.far_history import FarHistory, place_far
from mc.gaussian_rope import entry_rotary
from mc.gistnet import GistNet, GistNetConfig
from mc.lensnet import LOCAL_MEAN, LensNet, LensNetConfig
from mc.mega_context import Tree, build_tree
from mc.working_context import Cut, by_entry, entries_used, width
from nanochat.checkpoint import load_mc_state
from nanochat.common import UserError, one_line
from nanochat.gpt import GPT
from nanochat.loading import build


class MegaContext(nn.Module):
    """GistNet, LensNet and the logit bias of gists: everything that MegaContext adds to a base of width d_model."""

    def __init__(self, config: MCConfig, d_model: int):
        super().__init__()
        self.config = config
        self.gistnet = GistNet(GistNetConfig(
            d_model, config.block_size, config.max_lod, config.gist, config.gist_width, n_gists=config.gists_per_block))
        self.lensnet = LensNet(LensNetConfig(d_model, config.block_size, config.lens_keys, config.lens_key_dim,
                                             tail=config.protected, network=config.lens, max_lod=config.max_lod))
        self.arms: dict[str, Arm] = {module: load(module)(config) for module in config.named_arms()}
        for arm in self.arms.values():
            arm.build(self, d_model)
        self.gist_bias = nn.Parameter(torch.zeros(config.max_lod))
        self.allocator = GreedyAllocator(self.focus_config())

    def focus_config(self) -> FocusConfig:
        c = self.config
        return FocusConfig(c.budget, c.block_size, c.max_lod, recent=c.protected, n_gists=c.gists_per_block)

    def build_tree(self, embeds_BTD: Tensor, middle_BTD: Tensor | None = None) -> Tree:
        """middle: the base's hidden states behind its middle layer (`GPT.hidden`), which the arm `hidden` reads and
        nothing else needs; no gradient goes into them. UserError where they are missing."""
        c = self.config
        if c.gist_source == "hidden" and middle_BTD is None:
            raise UserError("--mc_arms=hidden: gists are made from hidden states of the base, which are not computed "
                            "here; use embeddings")
        read = middle_BTD.detach() if c.gist_source == "hidden" else None
        return build_tree(embeds_BTD, self.gistnet, c.block_size, c.max_lod, n_gists=c.gists_per_block, read_BTD=read)

    def key_bias(self, lod: Tensor) -> Tensor:
        """Logit bias of entries by LOD: 0 for raw tokens, learned in (0, log width) for gists, starting half way.

        One gist competes with the K^lod tokens it stands for (with G gists per block, K^lod / G) in one softmax.
        """
        levels = torch.arange(1, self.config.max_lod + 1, device=lod.device)
        bias = torch.sigmoid(self.gist_bias) * (levels
                                                * math.log(self.config.block_size) - math.log(self.config.gists_per_block))  # noqa: E501
        return F.pad(bias, (1, 0))[lod]

    def lens_logits(self, embeds_BTD: Tensor, n_B: Tensor, keys_BNPC: Tensor | None = None,
                    tree: Tree | None = None) -> Tensor:
        """[B, N] what the lens wants to see of T // K blocks, having read the last tokens before n.
        keys, tree: theirs, if at hand."""
        logits_BN = self.bilinear_logits(embeds_BTD, n_B, keys_BNPC)
        if self.lensnet.reader is None:
            return logits_BN
        tree = self.build_tree(embeds_BTD) if tree is None else tree
        return self.reread(self.lensnet, logits_BN[:, None], embeds_BTD, n_B[:, None], tree)[:, 0]

    def bilinear_logits(self, embeds_BTD: Tensor, n_B: Tensor, keys_BNPC: Tensor | None = None) -> Tensor:
        """[B, N] as `lens_logits`, before the lens's reader if it has one."""
        keys_BNPC = self.lensnet.keys(embeds_BTD) if keys_BNPC is None else keys_BNPC
        return self.lensnet.focus_logits(self._tail(embeds_BTD, n_B), keys_BNPC, n_B)

    def tail_votes(self, embeds_BTD: Tensor, n_B: Tensor) -> Tensor:
        """[B, tail, N] what each of the last tokens before n votes for by itself."""
        lens = self.lensnet
        queries, _ = lens.queries(self._tail(embeds_BTD, n_B))
        return lens.votes(queries, lens.keys(embeds_BTD))[:, -lens.config.tail:]

    def _tail(self, embeds_BTD: Tensor, n_B: Tensor) -> Tensor:
        """[B, tail + LOCAL_MEAN, D] the last tokens before n."""
        length = self.lensnet.config.tail + LOCAL_MEAN
        index = n_B[:, None] - length + torch.arange(length, device=n_B.device)
        return take(embeds_BTD, index.clamp_min(0))

    @staticmethod
    def reread(lens: LensNet, logits_BQN: Tensor, embeds_BTD: Tensor, cursor_BQ: Tensor, tree: Tree) -> Tensor:
        """[B, Q, N] the logits of the first N blocks at some cursors, after the lens's
        reader has seen them together."""
        N, tail = logits_BQN.shape[-1], lens.config.tail
        levels = [tree.levels[1][:, :N], *tree.levels[2:]]
        lod_E = torch.cat([torch.full((x.shape[1],), lod, device=x.device) for lod, x in enumerate(levels, 1)])
        index_E = torch.cat([torch.arange(x.shape[1], device=x.device) for x in levels])
        at_BQT = cursor_BQ[..., None] - tail + torch.arange(tail, device=cursor_BQ.device)
        tail_BQTD = take(embeds_BTD,
                         at_BQT.clamp_min(0).flatten(1)).unflatten(1, at_BQT.shape[1:]) * (at_BQT >= 0)[..., None]
        return lens.reader(logits_BQN, tail_BQTD, cursor_BQ, torch.cat(levels, 1), lod_E, index_E)

    def param_groups(self, lr_scale: float = 1.0) -> list[dict]:
        """Optimizer groups, as nanochat.optim takes them: "gistnet" (with the gist bias and what arms add), and
        "lensnet", its matrices by Muon.

        Muon teaches the lens about three times as fast as AdamW (hit@1 after 100 steps on recall: 0.54 against 0.24).
        """
        adamw = dict(kind="adamw", betas=(0.9, 0.95))
        gist_lr, lens_lr = self.config.gist_lr * lr_scale, self.config.lens_lr * lr_scale
        lens = list(self.lensnet.parameters())
        others = [p for name, p in self.named_parameters() if p.requires_grad
                  and not name.startswith(("gistnet.", "lensnet.", "gist_bias"))]
        matrices = [p for p in lens if p.ndim == 2 and len(p) > 1]
        return [dict(name="gistnet", params=[*self.gistnet.parameters(), *others, self.gist_bias], lr=gist_lr, **adamw),
                dict(name="lensnet", params=matrices, lr=lens_lr, kind="muon"),
                dict(name="lensnet_scalars", params=[p for p in lens if p.ndim < 2 or len(p) == 1], lr=0.5 * lens_lr,
                     **adamw)]


def recency_scores(n_B: Tensor, count: int) -> Tensor:
    """[B, N] the later the better."""
    return torch.arange(count, device=n_B.device, dtype=torch.float32).expand(len(n_B), count)


STORED = ("block_size", "max_lod", "gist", "gists_per_block", "gist_source", "gist_width", "gist_pool", "gist_head",
          "gist_shared",
          # settings that gists and lens keys depend on, those that are gone included: histories name their hash
          "lens_keys", "lens_key_dim")


def fingerprint(gpt: GPT, mc: MegaContext) -> str:
    """Of everything that gists and lens keys are made with: token embeddings, GistNet, the lens's
    key projection, their settings.

    Networks that differ elsewhere (a fine-tuned head, another budget, a setting that a later version
    adds) read each other's histories.
    """
    settings = complete(mc.config)
    digest = hashlib.sha256(repr([(name, settings[name]) for name in STORED]).encode())
    for tensor in (gpt.transformer.wte.weight, *mc.gistnet.state_dict().values(), mc.lensnet.key.weight):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Entries(NamedTuple):
    """What a working-context pass shows, as `by_entry` numbers it. Padding at the end: lod 0, index 0, valid False."""

    lod_BM: Tensor
    index_BM: Tensor
    valid_BM: Tensor
    used_B: Tensor  # entries before the continuation

    def to_tensor(self, tree: Tree) -> tuple[Tensor, Tensor]:
        """What the base reads: the entries' vectors [B, M, D] in time order, with gradients to the tree they are
        gathered from, zeros at the padding behind the last; and the mask [B, M] bool, False there. The dtype is the
        tree's; NaN where an entry names a node that the tree does not have (`Tree.gather`)."""
        return tree.gather(self.lod_BM, self.index_BM, self.valid_BM), self.valid_BM


def with_continuation(cut: Cut, n_tokens_B: Tensor, count: int) -> Entries:
    """Append `count` raw tokens n, n+1, … right behind each row's cut."""
    used_B, (lod_BW, index_BW, _) = entries_used(cut), by_entry(cut)
    slot = torch.arange(lod_BW.shape[1] + count, device=used_B.device)
    after = slot - used_B[:, None]
    is_cut, valid = after < 0, after < count
    pick = slot.clamp_max(lod_BW.shape[1] - 1).expand_as(after)
    lod = torch.where(is_cut, lod_BW.gather(1, pick), 0)
    index = torch.where(is_cut, index_BW.gather(1, pick), n_tokens_B[:, None] + after)
    return Entries(lod, index.masked_fill(~valid, 0), valid, used_B)


def run_entries(gpt: GPT, mc: MegaContext, tree: Tree, tokens_BT: Tensor, entries: Entries,
                far: FarHistory | None = None, run: Callable[..., Tensor] | None = None) -> Tensor:
    """Hidden states [B, M, D] of a working context with its continuation. tokens [B, T] int64: what the tree was built
    on. run: what runs them in place of `gpt.hidden`."""
    lod, index, valid, _ = entries
    M, config = lod.shape[1], mc.config
    vectors, _ = entries.to_tensor(tree)
    each = width(lod, config.block_size, config.gists_per_block)
    length, start = each * valid, index * each
    ids = torch.where((lod == 0) & valid, tokens_BT.gather(1, torch.where(lod == 0, index, 0)), -1)
    # in the order of their places: the row's own entries first, as stored, for those who stand at the same token
    if far is not None:
        start, far_start, far_length = place_far(start, far)
        far_valid = far.cut.valid_BW
        start, length, lod = (torch.cat(x, 1)
                              for x in ((start, far_start), (length, far_length), (lod, far.cut.lod_BW)))
        valid, ids = torch.cat([valid, far_valid], 1), F.pad(ids, (0, far_valid.shape[1]), value=-1)
        order = start.masked_fill(~valid, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        start, length, lod, valid, ids = (x.gather(1, order) for x in (start, length, lod, valid, ids))
        vectors = take(torch.cat([vectors, far.vectors_BFD], 1), order)
    raw = valid & (lod == 0)
    linked = raw & F.pad(raw, (1, 0))[:, :-1] & (start == F.pad(start, (1, 0))[:, :-1] + 1)
    rotary = entry_rotary(gpt, start, length, scheme=config.positions, floor=config.damping_floor)
    hidden = (run or gpt.hidden)(ids, inputs_embeds=vectors, rotary=rotary, linked=linked, key_bias=mc.key_bias(lod))
    return hidden if far is None else take(hidden, order.argsort(1)[:, :M])


class Rows(NamedTuple):
    """Entries whose predictions are read, and the full-context row each corresponds to."""

    slot_BP: Tensor
    token_BP: Tensor  # the last token the entry covers: row of the full pass, of targets
    valid_BP: Tensor


def read_rows(entries: Entries, block_size: int, count: int, before: int, n_gists: int = 1) -> Rows:
    """`before` entries up to the cut's last one, then what follows, `count` in all; valid where they are raw tokens."""
    wanted = entries.used_B[:, None] - before + torch.arange(count, device=entries.used_B.device)
    slot = wanted.clamp(0, entries.lod_BM.shape[1] - 1)
    lod, index, valid = (x.gather(1, slot) for x in (entries.lod_BM, entries.index_BM, entries.valid_BM))
    return Rows(slot, (index + 1) * width(lod, block_size, n_gists) - 1, valid & (lod == 0) & (slot == wanted))


def take(x_BMD: Tensor, slot_BP: Tensor) -> Tensor:
    """[B, P, D] rows of x."""
    return x_BMD.gather(1, slot_BP[..., None].expand(-1, -1, x_BMD.shape[-1]))


def load_mega_context(checkpoint_dir: Path | str, step: int, meta: dict, d_model: int,
                      device: torch.device | str = "cpu") -> MegaContext:
    """The MegaContext that was saved with a step of training; UserError when that run had none."""
    state = load_mc_state(checkpoint_dir, step, device)
    if state is None or not meta.get("mc"):
        raise UserError(f"the checkpoint in {checkpoint_dir} has no MegaContext: it was trained with --mc_enabled=0")
    config, lods = from_dict(meta["mc"].get("config")), meta["mc"].get("trained_lods", [])
    if not (isinstance(lods, list) and all(type(lod) is int for lod in lods)):
        raise UserError(f"the checkpoint in {checkpoint_dir} names no levels that were trained but {one_line(lods)}")
    sizes = (config.block_size, config.max_lod, config.lens_key_dim, 1 if config.gist == "mean" else config.gist_width)
    return build(lambda: MegaContext(config, d_model), state, f"{checkpoint_dir} do not fit its MC config", device,
                 sizes)
