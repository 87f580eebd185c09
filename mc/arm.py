"""Arms: what a run can add to the core, by name, imported only when it does.

A kind of gist, lens or teacher that is not the core's is named by its flag (`--mc_gist=slots`), anything else by
`--mc_arms=NAME,…`. Each is a module of `mc.arms` with a class `ARM`; it has settings, which are flags once it is named,
and does its work in the hooks below.

Shapes: B rows, T tokens, D width, N blocks, R rows with a working context.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanochat.common import UserError

if TYPE_CHECKING:
    from nanochat.gpt import Captured

Part = tuple[str, float, Tensor]  # of a loss: name, weight, value []

KINDS = {  # setting -> its values that are arms -> module of mc.arms
    "gist": {"slots": "gist_slots"},
    "lens": {"transformer": "lens_transformer", "perceiver": "lens_perceiver", "slots": "lens_slots"},
    "teacher": {"gate": "gate", "counterfactual": "counterfactual", "preference": "preference"},
}
# Values of a session's --mc_allocator, before the colon -> module of mc.arms
ALLOCATORS = {"bundle": "bundle", "stochastic": "stochastic"}
# Values of --mc_arms, and their modules
ADDED = ("several", "hidden", "contrast", "horizon", "bands", "rank", "zero_sum", "illegal", "kl", "placed")
SETTINGS = {  # setting of an arm -> the arm, and the value at which it did nothing when every run had it
    "gists_per_block": ("several", 1),
    "gist_source": ("hidden", "embeddings"),
    "contrast_weight": ("contrast", 0.0),
    "horizon_gist_weight": ("horizon", 0.0),
    "bands": ("bands", 0),
    "lens_rank": ("rank", 0.0),
    "lens_zero_sum": ("zero_sum", 0.0),
    "lens_illegal": ("illegal", 0.0),
    "lens_kl": ("kl", 0.0),
    "lens_edits": ("counterfactual", 8),
    "placed_stride": ("placed", 0),
}


@dataclass(frozen=True)
class Setting:
    """A flag of an arm. low: the least value."""

    default: Any
    help: str
    low: float = 0.0
    choices: tuple | None = None


class Arm:
    """The hooks; each does nothing here."""

    SETTINGS: dict[str, Setting] = {}
    dense = False  # a teacher that has a `signal`
    waits = False  # for the gradients that the backward pass leaves: the lens is taught behind it
    every_query = False  # its parts of the lens's loss are about the lens's logits at every query
    protected_too = False  # … those of protected blocks included

    def __init__(self, config: Any):
        self.config = config

    @classmethod
    def check(cls, config: Any) -> None:
        """UserError for settings it cannot work with."""

    def begin(self, controller: Any) -> None:
        """UserError, or a note, for what a run cannot do with it."""

    def build(self, model: Any, d_model: int) -> None:
        """Add networks of its own to a MegaContext."""

    def before_step(self, model: Any) -> None:
        """Once per optimizer step, before it."""

    def before_pass(self, embeds_BTD: Tensor) -> None:
        """Before the LM pass over these embeddings."""

    def after_pass(self, captured: "Sequence[Captured]") -> None:
        """Behind the LM pass."""

    def signal(
        self, captured: "Sequence[Captured]", rows: slice, queries: slice, n_blocks: int, block_size: int
    ) -> Tensor:
        """[B, Q, N] of a dense teacher: what each block is worth to each query."""
        raise NotImplementedError

    def gist_part(self, model: Any, tree: Any, hidden_RTD: Tensor) -> Part | None:
        """A loss on gists. hidden: of the LM pass."""

    def lm_part(self, seen: Any, embeds_RTD: Tensor, primary: Any, far: Any) -> Part | None:
        """A loss of the LM on rows that have a working context. seen: `mc.runtime.Seen`; embeds: of the LM pass, with
        gradients; primary: the entries of each row's best variant; far: the far history around them, or None."""

    def shown(self, draw_R: Tensor, done: float, n_R: Tensor, rank_RN: Tensor, focus: Any) -> Tensor | None:
        """[R] how many blocks, best first, a training cut shows. draw: uniform in [0, 1); done: share of the training
        that is over."""

    def watch(self, controller: Any, seen: Any) -> Any:
        """What it has to teach of the working contexts that were run (`mc.runtime.Seen`), for `lens_parts`."""

    def lens_parts(self, model: Any, lesson: Any, asked: Any) -> list[Part]:
        """Its parts of the lens's loss. lesson, asked: `mc.lens_loss.Lesson` and `Asked`, the latter None unless the
        lens was asked."""
        return []

    def more_passes(self) -> float:
        """Working-context passes, forward and backward, that it adds to each row with a working context."""
        return 0.0


def load(module: str) -> type[Arm]:
    return importlib.import_module(f"mc.arms.{module}").ARM


def named(chosen: dict[str, str]) -> list[str]:
    """Modules of the arms that these values of `arms`, gist, lens and teacher name, in the order of ADDED and KINDS.
    UserError for what is no arm."""
    added = [name.strip() for name in chosen.get("arms", "").split(",") if name.strip()]
    if unknown := [name for name in added if name not in ADDED]:
        raise UserError(
            f"--mc_arms={chosen['arms']}: there is no arm {', '.join(unknown)}; there are {', '.join(ADDED)}"
        )
    words = {kind: {part.partition(":")[0].strip() for part in chosen.get(kind, "").split(",")} for kind in KINDS}
    return [name for name in ADDED if name in added] + [
        module for kind, values in KINDS.items() for value, module in values.items() if value in words[kind]
    ]
