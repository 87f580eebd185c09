"""Settings of inference, and the flags `--mc_…` of the commands that hold a session."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mc.config import setting
from mc.presets import SESSION, add_preset_flag
from mc.session.price import Allocator
from nanochat.common import UserError


@dataclass(frozen=True)
class SessionConfig:
    """Settings of inference; the commands that hold a session have them as flags `--mc_…`."""

    budget: int = setting(0, "W: entries of the working context, tokens since the last refocus apart; 0: as trained")
    interval: int = setting(0, "tokens between two refocuses; 0: the block size")
    kv_policy: str = setting("exact",
                             "after an edit: run everything behind it again, or (approximate) the new entries only",
                             ("exact", "approximate"))
    untrained: str = setting("refuse", "levels of gists that were not trained: refuse to show them, leaving out what "
                                       "only they could show, or show and report them", ("refuse", "report"))
    candidates: int = setting(32, "blocks that the search of the history proposes at a refocus")
    allocator: str = setting("greedy", "how detail is chosen: greedy; bundle:BLOCKS, one edit shows up to so many "
                                       "adjacent blocks; stochastic:TEMPERATURE, with noise")
    max_edits: int = setting(4, "path edits per refocus")
    cooldown: int = setting(2, "refocuses during which an edit is not reversed")
    tau_expand: float = setting(0.2, "a block is shown above this score")
    tau_collapse: float = setting(0.2, "a node is hidden below minus this score")
    margin: float = setting(0.2, "what pays for a block scores lower than it by more than this")

    def __post_init__(self):
        for f in fields(self):
            if (choices := f.metadata["choices"]) and getattr(self, f.name) not in choices:
                raise UserError(f"--mc_{f.name}={getattr(self, f.name)}: use one of {', '.join(choices)}")
        for name, least in dict(budget=0, interval=0, candidates=1).items():
            if getattr(self, name) < least:
                raise UserError(f"--mc_{name}={getattr(self, name)} must be at least {least}")
        # for its errors alone
        Allocator.parse(self.allocator)


def add_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, **defaults) -> None:
    """Flags `--mc_…` of all settings; `defaults` where a command has others. argv: by default this process's."""
    group = parser.add_argument_group("the session")
    defaults |= add_preset_flag(group, SESSION, argv)
    for f in fields(SessionConfig):
        group.add_argument(f"--mc_{f.name}", type=type(f.default), default=defaults.get(f.name, f.default),
                           choices=f.metadata["choices"], help=f.metadata["help"])


def from_flags(args: argparse.Namespace, **changes) -> SessionConfig:
    return SessionConfig(**{f.name: getattr(args, f"mc_{f.name}") for f in fields(SessionConfig)} | changes)
