"""The tree of one history, growing at its end: tokens go in, and every node that they complete is made and stored.

Nodes are made bottom-up from what the store holds, the new blocks of a level together, so the result depends neither on
the pieces in which the tokens came nor on the store. A level begins when the one below it has a whole block.

A source starts at a block boundary (`end_source`): the void slots of its last block are
masked out of the gist and the keys.

Shapes: N tokens or blocks, K block size, D width, P lens keys per block, C their width.
"""

import torch
from torch import Tensor

from mc.mega_context import TreeShape
from mc.model import MegaContext, fingerprint
from mc.store.ram import VOID, Store, StoreFormat
from nanochat.common import UserError
from nanochat.gpt import GPT

# blocks that are handed to GistNet at a time: 350 MB at the quickstart's sizes where 4,096 take 800, and faster
MAX_BLOCKS = 512
BATCH_BLOCKS = 4096  # blocks of a commit, where a long history is filled


def check_sessions(mc: MegaContext) -> None:
    """UserError for a model that only training and evaluation can show: a stored node is one vector."""
    if mc.config.gist_source == "hidden":
        raise UserError("the model was trained with --mc_arms=hidden, and a history is stored without a pass through "
                        "the base; use one trained with embeddings")
    if mc.config.gists_per_block > 1:
        raise UserError(f"the model was trained with --mc_gists_per_block={mc.config.gists_per_block}, and a stored "
                        "history has one gist per node; "
                        "use one trained with 1, or evaluate it with full rows")


def store_format(gpt: GPT, mc: MegaContext, dtype: torch.dtype | None = None) -> StoreFormat:
    """What a store must be to hold the nodes of these networks; dtype: of gists and keys, default the
    model's. UserError where none can."""
    check_sessions(mc)
    c = mc.config
    return StoreFormat(c.block_size, gpt.config.n_embd, c.lens_keys, c.lens_key_dim, dtype or gpt.lm_head.weight.dtype,
                       fingerprint(gpt, mc))


class History:
    """A store and the networks that fill it. UserError when the store was made by others.

    reads: records (token ids, gists, keys of a block) that were read through it, those for making nodes included.
    """

    def __init__(self, gpt: GPT, mc: MegaContext, store: Store):
        # in whatever dtype it keeps them: that is the store's choice, and not the networks'
        if store.format != (expected := store_format(gpt, mc, store.format.dtype)):
            different = [name for name in ("block_size", "d_model", "n_keys", "key_dim", "model")
                         if getattr(store.format, name) != getattr(expected, name)]
            raise UserError(f"the history was made by another model: {', '.join(different)} differ; open it with that "
                            "model, or regist it")
        self.gpt, self.mc, self.store, self.reads = gpt, mc, store, 0
        self.block_size, self.max_lod = mc.config.block_size, mc.config.max_lod
        self.device = gpt.lm_head.weight.device

    @property
    def n_tokens(self) -> int:
        return self.store.n_tokens

    @property
    def shape(self) -> TreeShape:
        return TreeShape(self.n_tokens, self.block_size, self.max_lod)

    @torch.no_grad()
    def append(self, ids_N: Tensor) -> None:
        """Add tokens (int64 [N], on any device) and all that they complete, then commit once.

        UserError, before anything is changed, for an id outside the vocabulary.
        """
        ids_N = ids_N.cpu()
        self.check_ids(ids_N)
        self.fill(ids_N)

    def check_ids(self, ids_N: Tensor) -> None:
        """UserError for an id outside the vocabulary."""
        vocab = self.gpt.config.vocab_size
        if len(ids_N) and not (0 <= int(ids_N.min()) and int(ids_N.max()) < vocab):
            bad = int(ids_N[(ids_N < 0) | (ids_N >= vocab)][0])
            raise UserError(f"token id {bad} is outside the vocabulary of {vocab}: tokenize with the model's own "
                            "tokenizer")

    @torch.no_grad()
    def end_source(self) -> None:
        """The next token starts a new source, at the next block boundary."""
        if void := -self.n_tokens % self.block_size:
            self.fill(torch.full((void,), VOID))

    @torch.no_grad()
    def fill(self, ids_N: Tensor) -> None:
        """As `append`, of slots that may be VOID. What fails half-way is undone, with all that was
        appended since the last commit."""
        try:
            self.store.append_tokens(ids_N)
            self.grow()
        except BaseException:
            self.store.roll_back()
            raise
        self.store.commit()

    def grow(self) -> None:
        """Make every node that is complete and not there yet."""
        K = self.block_size
        for lod in range(1, self.max_lod + 1):
            complete = self.n_tokens // K ** lod
            for start in range(self.store.n_nodes(lod), complete, MAX_BLOCKS):
                self.store.append_nodes(lod, *self.nodes(lod, torch.arange(start, min(start + MAX_BLOCKS, complete))))

    @torch.no_grad()
    def nodes(self, lod: int, index_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gists [N, D] of nodes of a level, computed from their children in the store, and the
        lens keys [N, P, C] of blocks."""
        child_NK = index_N[:, None] * self.block_size + torch.arange(self.block_size)
        self.reads += child_NK.numel()
        if lod > 1:
            children = self.store.gists(lod - 1, child_NK.flatten()).to(self.device, self.gpt.lm_head.weight.dtype)
            return self.mc.gistnet(children.unflatten(0, child_NK.shape), None, lod)[:, 0].cpu(), None
        ids_NK = self.store.tokens(child_NK.flatten()).view_as(child_NK).to(self.device)
        valid_NK = ids_NK != VOID
        # VOID has no embedding: it gets one that is masked, for the keys too, which see no mask
        embeds_NKD = self.gpt.embed(ids_NK.clamp_min(0)) * valid_NK[..., None]
        keys_NPC = self.mc.lensnet.keys(embeds_NKD.flatten(0, 1)[None])[0]
        return self.mc.gistnet(embeds_NKD, valid_NK, lod)[:, 0].cpu(), keys_NPC.cpu()

    def tokens(self, index_N: Tensor) -> Tensor:
        """As `Store.tokens`."""
        self.reads += len(index_N)
        return self.store.tokens(index_N)

    def keys(self, index_N: Tensor) -> Tensor:
        """As `Store.keys`."""
        self.reads += len(index_N)
        return self.store.keys(index_N)

    def gists(self, lod_W: Tensor, index_W: Tensor) -> Tensor:
        """[W, D] vectors of nodes of LOD1 and above, in the model's dtype, from the store."""
        self.reads += len(index_W)
        gists_WD = torch.empty(len(index_W), self.store.format.d_model, dtype=self.gpt.lm_head.weight.dtype)
        for lod in lod_W.unique().tolist():
            gists_WD[lod_W == lod] = self.store.gists(lod, index_W[lod_W == lod]).to(gists_WD.dtype)
        return gists_WD
