"""Systems at equal entries: what a model is shown of a history it cannot hold, judged by one
code on the same continuation.

A system has one method, `show(history, rows)`: the history's tokens in, out what the model sees
before the continuation, in one of
three forms:

    View        raw tokens, chosen by number
    Cut         entries of the gist tree (`mc.working_context`)
    KVChoice    a hook that chooses, per layer and head, among the keys and values of the whole history

Whatever the form, no more than `budget` entries stand before the continuation, the last `recent`
tokens are among them, and the
continuation is not an argument: what a system shows cannot depend on it. The oracle alone overrides `judge`.

Shapes: B rows, n tokens of history, H of continuation, T = n + H, W entries of a view, M = W + H −
1 entries of its pass, D width.
"""

from dataclasses import dataclass, replace
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.config import MCConfig
from mc.lensnet import LOCAL_MEAN
from mc.model import MegaContext, read_rows, take, with_continuation
from mc.working_context import Cut
from nanochat.common import UserError
from nanochat.gpt import GPT, Captured, Select
from nanochat.kv_cache import KVCache
from scripts.eval.comparison import Outcome, judge


class View(NamedTuple):
    """Raw tokens in the order of time, packed to the left."""

    index_BW: Tensor  # int64, ascending
    valid_BW: Tensor
    # True: read as one text, positions 0, 1, 2 …; False: at their global positions, linked where they are neighbours
    prompt: bool


class KVChoice(NamedTuple):
    """What decoding may look at of the keys and values of the whole history."""

    # of the prefill -> (layer, queries, keys of the history) -> bool [B, 1 or H, S, n]
    choose: Callable[[list[Captured]], Select]


Shown = View | Cut | KVChoice


@dataclass(frozen=True)
class Cost:
    """Of one row, from shapes: forward FLOPs of choosing, reading and the continuation; bytes of keys and
    values held while decoding."""

    flops: float
    bytes: float


class Judged(NamedTuple):
    outcome: Outcome
    cost: Cost


@dataclass(frozen=True)
class Models:
    """The base, and what was trained to go with it."""

    gpt: GPT
    mc: MegaContext | None = None
    classifier: torch.nn.Module | None = None  # scripts.eval.methods.token_classifier.TokenClassifier


class Method:
    """One way to show a history. Subclasses implement `show`, and `choosing_flops` where choosing costs any."""

    name = ""
    needs: tuple[str, ...] = ()  # fields of Models
    arm = ""  # the system whose fine-tuned weights it reads with; "": its own
    looks = False  # with the lens, which its fine-tuning goes on teaching

    def __init__(self, models: Models, budget: int, seed: int = 0):
        """budget: W, entries before the continuation. UserError when a model it needs is
        missing, or the budget too small."""
        models = self.prepare(models)
        for need in self.needs:
            if getattr(models, need) is None:
                raise UserError(f"the system {self.name} needs {NEEDED[need]}")
        self.models, self.gpt, self.budget, self.seed = models, models.gpt, budget, seed
        self.config = replace(models.mc.config if models.mc else MCConfig(), budget=budget)
        self.block_size, self.recent = self.config.block_size, self.config.protected
        if budget < self.recent + self.block_size:
            raise UserError(f"a budget of {budget} entries does not hold {self.recent} recent tokens and one block of "
                            f"{self.block_size}; "
                            f"raise it")

    @classmethod
    def prepare(cls, models: Models) -> Models:
        """The models as this system uses them; of what is already prepared, the same."""
        return models

    def show(self, history_BN: Tensor, rows_B: Tensor) -> Shown:
        """history int64 [B, n]; rows int64 [B]: numbers that random draws are keyed by."""
        raise NotImplementedError

    def choosing_flops(self, n: int) -> float:
        """Forward FLOPs a row of what `show` computes with networks, beyond the pass that reads what is shown."""
        return 0.0

    def hidden(self, tokens_BT: Tensor, n: int, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, H, D] that predict the continuation, with gradients where the form allows,
        and entries shown, int64 [B]."""
        with torch.no_grad():
            shown = self.show(tokens_BT[:, :n], rows_B)
        if isinstance(shown, View):
            return read_view(self.gpt, tokens_BT, n, shown)
        return self.read(tokens_BT, n, shown)

    def read(self, tokens_BT: Tensor, n: int, shown: Shown) -> tuple[Tensor, Tensor]:
        """As `hidden`, for what is no View."""
        raise NotImplementedError

    @torch.no_grad()
    def judge(self, tokens_BT: Tensor, targets_BT: Tensor, n: int, rows_B: Tensor) -> Judged:
        """tokens, targets int64 [B, T]: targets at n − 1 … T − 2 are judged where they are not −1."""
        hidden, entries_B = self.hidden(tokens_BT, n, rows_B)
        return Judged(judge(self.gpt, hidden, targets_BT[:, n - 1:-1], entries_B), self.cost(n, tokens_BT.shape[1] - n))

    def cost(self, n: int, H: int) -> Cost:
        entries = min(self.budget, n)
        return Cost(self.choosing_flops(n) + pass_flops(self.gpt, entries + H - 1, H), kv_bytes(self.gpt, entries))


class Again(Method):
    """Mixin, named before a system: it chooses anew before every `interval` tokens of the continuation, what was said
    by then being history, as a session does that refocuses so often. Each look shows no more than `budget` entries,
    what was said before it among them; what is said until the next look stands besides, as the whole continuation does
    where a system chooses once."""

    interval = 1

    def hidden(self, tokens_BT: Tensor, n: int, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        T = tokens_BT.shape[1]
        looks = [super(Again, self).hidden(tokens_BT[:, :m + self.interval], m, rows_B)
                 for m in range(n, T, self.interval)]
        return torch.cat([hidden for hidden, _ in looks], 1), torch.stack([entries for _, entries in looks]).amax(0)

    def cost(self, n: int, H: int) -> Cost:
        """Every look in full; a session keeps keys and gists, and the entries before its first edit."""
        looks = [super(Again, self).cost(m, min(self.interval, n + H - m)) for m in range(n, n + H, self.interval)]
        return Cost(sum(look.flops for look in looks), looks[-1].bytes)


def again(kind: type[Method], interval: int = 1) -> type[Method]:
    """The system that looks every `interval` tokens, and reads with the weights of the one that looks once."""
    name = f"{kind.name}_again" + (f"_{interval}" if interval > 1 else "")
    return type(f"{kind.__name__}Again{interval}", (Again, kind),
                {"name": name, "arm": kind.arm or kind.name, "interval": interval})


NEEDED = {"mc": "a checkpoint with MegaContext (trained with --mc_enabled=1)",
          "classifier": "a keep/drop classifier (python -m scripts.mc_study classifier)"}


def read_view(gpt: GPT, tokens_BT: Tensor, n: int, view: View) -> tuple[Tensor, Tensor]:
    """Hidden states [B, H, D] after a view, and entries used [B]."""
    n_B = torch.full((len(tokens_BT),), n, device=tokens_BT.device)
    H = tokens_BT.shape[1] - n
    entries = with_continuation(Cut(torch.zeros_like(view.index_BW), view.index_BW, view.valid_BW, 1), n_B, H - 1)
    index, positions, linked = entries.index_BM, None, None
    if not view.prompt:
        positions, linked = index, F.pad(index[:, 1:] == index[:, :-1] + 1, (1, 0))
    hidden = gpt.hidden(tokens_BT.gather(1, index), positions=positions, linked=linked, lift_windows=True)
    return take(hidden, read_rows(entries, 1, H, 1).slot_BP), entries.used_B


def read_chosen(gpt: GPT, tokens_BT: Tensor, n: int, choice: KVChoice) -> Tensor:
    """Hidden states [B, H, D] after a prefill with full attention, of which decoding sees what is chosen.

    The last token of the history is read once more, so that no prediction that is judged saw all.
    Without gradients: a cache has none.
    """
    B, T = tokens_BT.shape
    cache = KVCache(gpt.config, B, T, tokens_BT.device, gpt.lm_head.weight.dtype)
    captured: list[Captured] = []
    gpt.hidden(tokens_BT[:, :n], cache=cache, capture=captured, lift_windows=True)
    cache.truncate(n - 1)
    choose = choice.choose(captured)

    def select(layer: int, q: Tensor, k: Tensor) -> Tensor:
        seen = choose(layer, q, k[:, :, :n - 1])
        return F.pad(seen, (0, T - n), value=True)  # the continuation sees itself, as far as the cache's mask lets it

    return gpt.hidden(tokens_BT[:, n - 1:T - 1], cache=cache, select=select, lift_windows=True)


def pack(keep_BN: Tensor, capacity: int, prompt: bool) -> View:
    """The View of the tokens marked, at most `capacity` of them in any row."""
    index = (~keep_BN).to(torch.int8).argsort(dim=1, stable=True)[:, :capacity]
    valid = keep_BN.gather(1, index)
    return View(index.masked_fill(~valid, 0), valid, prompt)


def best(scores_BN: Tensor, count: int) -> Tensor:
    """bool [B, N]: the `count` highest of each row, of equal ones the later."""
    order = scores_BN.flip(1).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores_BN, dtype=torch.bool).scatter(1, order, True).flip(1)


def pass_flops(gpt: GPT, entries: int, read: int, before: int = 0) -> float:
    """Forward FLOPs of a row of entries that see each other and `before` others, the head on `read` of them."""
    head = gpt.lm_head.weight.numel()
    inner = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, torch.nn.Linear)) - head
    pairs = entries * (entries + 1) / 2 + entries * before
    return 2.0 * (inner * entries + head * read) + 4.0 * gpt.config.n_embd * gpt.config.n_layer * pairs


def kv_bytes(gpt: GPT, entries: int) -> float:
    """Bytes of keys and values of all layers."""
    c = gpt.config
    return 2.0 * c.n_layer * c.n_kv_head * c.head_dim * gpt.lm_head.weight.element_size() * entries


def lens_flops(mc: MegaContext, n: int) -> float:
    """Forward FLOPs of one look of the lens at a row: keys of all blocks, queries of the last tokens, their votes."""
    lens = mc.lensnet.config
    keys, tail = n // lens.block_size * lens.n_keys, lens.tail + LOCAL_MEAN
    per_query = lens.d_model * (3 * lens.query_width
                                + lens.key_dim) + lens.query_width * lens.key_dim + keys * lens.key_dim
    return 2.0 * (keys * 2 * lens.d_model * lens.key_dim + tail * per_query)
