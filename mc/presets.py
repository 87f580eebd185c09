"""Settings by what a model is for: `--mc_preset=NAME` sets the defaults of other flags, which still win when given.

What justifies each is measured in obsidian/log/2026-12-01 Presets.md.

    recall  facts asked for at once, in tokens of their own
    chat    facts that stand in text, announced some tokens before they are needed
    code    what the very next token needs, from all of a long file: a look at every token
    prose   the same of running text
"""

from argparse import _ArgumentGroup
from collections.abc import Sequence
from typing import Any

from nanochat.common import FlagParser

# the next token alone is foreseen on text: small blocks, a key for every token, a horizon of one
NEXT_TOKEN = dict(block_size=16, recent=32, horizon=64, lens_keys=16, lens_horizon=1, lens_lr=0.02, wc_weight=0.3,
                  kl_weight=0.3)
TRAINING: dict[str, dict[str, Any]] = {
    "recall": dict(start=0.25, wc_weight=0.5, lens_horizon=1, lens_lr=0.04),
    # and the default horizon of 8: what was announced a while ago must still have a vote when it is needed
    "chat": dict(wc_weight=0.5, lens_keys=16, lens_lr=0.02),
    "code": NEXT_TOKEN,
    "prose": NEXT_TOKEN,
}
EVERY_TOKEN = dict(interval=1, cooldown=0, margin=0.0, tau_expand=0.0, tau_collapse=0.0)
SESSION: dict[str, dict[str, Any]] = {"recall": {}, "chat": {}, "code": EVERY_TOKEN, "prose": EVERY_TOKEN}


def add_preset_flag(group: _ArgumentGroup, presets: dict[str, dict[str, Any]],
                    argv: Sequence[str] | None) -> dict[str, Any]:
    """The flag; and the defaults that it sets where a command line has it. argv: None for this process's."""
    group.add_argument("--mc_preset", default="", choices=("", *presets),
                       help="what it is for; sets the defaults of other settings here")
    named = FlagParser(add_help=False)
    named.add_argument("--mc_preset", default="")
    return presets.get(named.parse_known_args(argv)[0].mc_preset, {})
