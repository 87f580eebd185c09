"""Every MegaContext setting, with its help: the flags `--mc_…` of base_train are these fields, and the
settings of the arms it names."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mc.arm import ADDED, KINDS, SETTINGS, load, named
from mc.gaussian_rope import SCHEMES
from mc.gistnet import VARIANTS as GIST_VARIANTS
from mc.presets import TRAINING, add_preset_flag
from nanochat.common import FlagParser, UserError, flag_type, from_plain, one_line

POLICIES = ("random", "recency", "lens", "teacher")
TEACHERS = ("attention", *KINDS["teacher"])


def setting(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class MCConfig:
    # the tree and its gists
    block_size: int = setting(32, "tokens per LOD1 gist, and gists per gist of the next level")
    max_lod: int = setting(4, "highest level of the tree that is built and shown")
    gist: str = setting("transformer", "GistNet variant", GIST_VARIANTS)
    gist_width: int = setting(64, "internal width of GistNet")
    # the working context
    budget: int = setting(128, "W: entries of the working context before the continuation, everything included")
    recent: int = setting(0, "R: last tokens protected as LOD0; 0: min(128, W/4) in whole blocks, at least one")
    horizon: int = setting(32, "H: tokens of the continuation on which a working context is judged")
    positions: str = setting("gaussian",
                             "positions of entries: damped at global centres, undamped, or numbered in order", SCHEMES)
    damping_floor: float = setting(0.1, "share of every frequency that a gist keeps under --mc_positions=gaussian")
    far_tokens: int = setting(
        -1, "tokens of the longest stored history (log-uniform per row) shown in and around a row's own, as gists of "
            "other rows: far distances, "
        "levels that rows do not reach; 0: none; -1: eight nodes of the highest level, at most 8,388,608, where the "
        "other settings allow it")
    far_entries: int = setting(128, "entries that the stored history may take")
    # what is trained on it
    start: float = setting(0.3, "share of the training after which working contexts and lens begin: recall must have formed")  # noqa: E501
    ramp: int = setting(20, "steps over which their losses ramp in")
    row_stride: int = setting(1, "every how many rows get a working context: the dial of its compute")
    variants: int = setting(1, "working contexts per such row")
    cuts: str = setting("random:0.2,recency:0.1,lens:0.5,teacher:0.2",
                        "how training chooses what to show: policy:share, …; teacher means attention mass, known "
                        "before the backward pass")
    wc_weight: float = setting(0.1, "weight of the working context's next-token loss; far fewer tokens than the LM's, "
                                    "so a noisier gradient")
    kl_weight: float = setting(0.1, "weight of the KL from the full-context distribution")
    # the lens
    lens: str = setting("bilinear", "LensNet variant: each block by itself, or with a network on top that reads the "
                                    "blocks together", ("bilinear", *KINDS["lens"]))
    teacher: str = setting("attention", "what the lens is taught, a kind or kind:weight, …: attention (mass in the "
                                        "full pass), or an arm: gate (gradients of it), counterfactual (measured "
                                        "utilities of edits), preference (the best of --mc_variants)")
    lens_horizon: int = setting(8, "tokens ahead whose need for a block the lens predicts")
    lens_queries: int = setting(128, "last positions of a row that teach the lens")
    lens_row_stride: int = setting(1, "every how many rows teach the lens")
    lens_key_dim: int = setting(128, "width of a lens key")
    lens_keys: int = setting(4, "lens keys per block")
    # what is added
    arms: str = setting("", f"arms to add to the core, with commas between them: {', '.join(ADDED)}; their settings "
                            "are flags once they are named")
    # optimization
    gist_lr: float = setting(4e-3, "learning rate of GistNet and the gists' logit bias (AdamW), scaled with the batch "
                                   "like the base's")
    lens_lr: float = setting(0.06, "learning rate of LensNet (Muon; half for its scalars), scaled with the batch like "
                                   "the base's")

    # the settings of the arms that are named: no flags of the core
    of_arms: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for f in core_settings():
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise UserError(f"--mc_{f.name}={getattr(self, f.name)}: use one of {', '.join(map(str, choices))}")
        self.cut_shares()
        self.teacher_weights()
        low = dict(block_size=2, max_lod=1, horizon=1, row_stride=1, variants=1, lens_horizon=1, lens_row_stride=1,
                   budget=1,
                   recent=0, far_tokens=-1, far_entries=1, ramp=0)
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UserError(f"--mc_{name}={getattr(self, name)} must be at least {least}")
        for name, least in dict(wc_weight=0, kl_weight=0, gist_lr=1e-12, lens_lr=1e-12).items():
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(f"--mc_{name}={getattr(self, name)} must be a finite number, "
                                f"{'at least 0' if not least else 'above 0'}")
        if not self.wc_weight and not self.kl_weight:
            raise UserError("--mc_wc_weight=0 with --mc_kl_weight=0 trains nothing on the working context; raise one")
        if not 0 <= self.start < 1:
            raise UserError(f"--mc_start={self.start} must be in [0, 1)")
        if not 0 <= self.damping_floor <= 1:
            raise UserError(f"--mc_damping_floor={self.damping_floor} must be in [0, 1]")
        if self.recent % self.block_size:
            raise UserError(f"--mc_recent={self.recent} is not a multiple of the block size {self.block_size}")
        if self.lens_queries <= self.lens_horizon:
            raise UserError(f"--mc_lens_queries={self.lens_queries} must exceed --mc_lens_horizon={self.lens_horizon}")
        if 0 < self.far_tokens < self.block_size:
            raise UserError(f"--mc_far_tokens={self.far_tokens} is less than a block of {self.block_size}")
        if not self.far_tokens and self.far_entries != MCConfig.far_entries:
            raise UserError(f"--mc_far_entries={self.far_entries} has no effect with --mc_far_tokens=0")
        if self.damping_floor != MCConfig.damping_floor and self.positions != "gaussian":
            raise UserError(f"--mc_damping_floor has no effect with --mc_positions={self.positions}")
        if self.gist == "mean" and self.gist_width != MCConfig.gist_width:
            raise UserError("--mc_gist_width has no effect with --mc_gist=mean, which has no weights")
        self._settle_arms()

    def _settle_arms(self) -> None:
        """Settings of the arms that are named, as given or at their defaults, and nobody else's."""
        arms = {module: load(module) for module in self.named_arms()}
        settled = {}
        for arm in arms.values():
            for name, known in arm.SETTINGS.items():
                settled[name] = value = self.of_arms.get(name, known.default)
                if type(value) is not type(known.default) and not (type(value) is int and type(known.default) is float):
                    raise UserError(f"--mc_{name}={one_line(value)} is not of type {type(known.default).__name__}")
                if known.choices and value not in known.choices:
                    raise UserError(f"--mc_{name}={value}: use one of {', '.join(map(str, known.choices))}")
                if isinstance(value, int | float) and not known.low <= value < float("inf"):
                    raise UserError(f"--mc_{name}={value} must be a finite number, at least {known.low:g}")
        object.__setattr__(self, "of_arms", settled)
        for arm in arms.values():
            arm.check(self)

    def named_arms(self) -> list[str]:
        """Modules of mc.arms that this run uses."""
        return named({name: getattr(self, name) for name in ("arms", *KINDS)})

    def of(self, setting: str) -> Any:
        """A setting of an arm; where the arm is not named, the value at which it does nothing."""
        return self.of_arms.get(setting, SETTINGS[setting][1])

    @property
    def gists_per_block(self) -> int:
        return self.of("gists_per_block")

    @property
    def gist_source(self) -> str:
        """What GistNet reads of a block."""
        return "hidden" if "hidden" in self.named_arms() else "embeddings"

    @property
    def protected(self) -> int:
        """R in tokens, a multiple of the block size, at least one block."""
        return self.recent or max(min(128, self.budget // 4) // self.block_size, 1) * self.block_size

    def cut_shares(self) -> dict[str, float]:
        """Probability of each policy, in the order of POLICIES."""
        shares = _mixture("cuts", self.cuts, POLICIES, "policy:share")
        if set(shares) != set(POLICIES) or min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"--mc_cuts={self.cuts}: shares of {', '.join(POLICIES)} must be ≥ 0 and sum to 1")
        return shares

    def teacher_weights(self) -> dict[str, float]:
        """Weight of each kind of target in the lens's loss, in the order of TEACHERS. A kind
        that is named alone weighs 1."""
        alone = self.teacher.strip() in TEACHERS
        weights = _mixture("teacher", f"{self.teacher}:1" if alone else self.teacher, TEACHERS, "a kind or kind:weight")
        if set(weights) != set(TEACHERS) or not all(0 <= w < float("inf")
                                                    for w in weights.values()) or not any(weights.values()):
            raise UserError(f"--mc_teacher={self.teacher}: name at least one of {', '.join(TEACHERS)}, with weights "
                            "above 0")
        return weights


def _mixture(flag: str, text: str, names: tuple[str, ...], form: str) -> dict[str, float]:
    """"name:number, …" as numbers by name, 0 for names left out; UserError for what is no
    number. Names are not checked."""
    numbers = dict.fromkeys(names, 0.0)
    for part in text.split(","):
        name, _, number = part.partition(":")
        try:
            numbers[name.strip()] = numbers.get(name.strip(), 0) + float(number)
        except ValueError:
            raise UserError(f"--mc_{flag}={text}: {part!r} is not {form}") from None
    return numbers


def core_settings() -> list:
    """The fields that are flags."""
    return [f for f in fields(MCConfig) if f.metadata]


def add_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> None:
    """The core's flags, and those of the arms that a command line names; argv: by default this process's."""
    group = parser.add_argument_group("MegaContext (with --mc_enabled=1)")
    preset = add_preset_flag(group, TRAINING, argv)
    for f in core_settings():
        group.add_argument(f"--mc_{f.name}", type=flag_type(f.default), default=preset.get(f.name, f.default),
                           choices=f.metadata["choices"],
                           help=f.metadata["help"])
    chosen = FlagParser(add_help=False)
    for name in ("arms", *KINDS):
        chosen.add_argument(f"--mc_{name}", default="")
    words, rest = chosen.parse_known_args(argv)
    arms = named({name: getattr(words, f"mc_{name}") for name in ("arms", *KINDS)})
    for module in arms:
        if settings := load(module).SETTINGS:
            group = parser.add_argument_group(f"MegaContext's arm {module}")
            for name, known in settings.items():
                group.add_argument(f"--mc_{name}", type=flag_type(known.default), default=known.default,
                                   choices=known.choices, help=known.help)
    for name, (module, _) in SETTINGS.items():
        if module not in arms and any(word.replace("-", "_").startswith(f"__mc_{name}") for word in rest):
            raise UserError(f"--mc_{name} is a setting of the arm {module}; name it too: {_how(module)}")


def _how(module: str) -> str:
    return f"--mc_arms={module}" if module in ADDED else next(f"--mc_{kind}={value}" for kind, values in KINDS.items()
                                                              for value in values if values[value] == module)


def from_flags(args: argparse.Namespace) -> MCConfig:
    return from_dict({name.removeprefix("mc_"): value for name, value in vars(args).items() if name.startswith("mc_")
                      and name not in ("mc_enabled", "mc_preset")})


RETIRED = dict(max_gap=0, far_nodes=0, lens_normalize=0, gist_pool="mean", gist_head="linear", gist_shared=1,
               targets="tail",
               # settings of earlier versions, and the value at which they did nothing
               split="end", lod_axis=0, alibi=0)


def from_dict(values: dict) -> MCConfig:
    """The config that a checkpoint's meta holds, of this version or of an earlier one that
    made no use of what is gone."""
    if not isinstance(values, dict):
        return from_plain(MCConfig, values, "MC config")
    if gone := [f"{name}={one_line(values[name])}"
                for name in RETIRED if values.get(name, RETIRED[name]) != RETIRED[name]]:
        raise UserError(f"it was made with {', '.join(gone)}, which this version does not have; an earlier commit "
                        "reads it (see the log)")
    own = {"far_tokens": 0} | {name: value for name, value in values.items() if name not in RETIRED
                               and name not in SETTINGS}
    for name in ("arms", *KINDS):
        if not isinstance(own.get(name, ""), str):
            raise UserError(f"MC config: {name} is {one_line(own[name])}, not a name; it was written by another "
                            "version, or damaged")
    given = {name: value for name, value in values.items() if name in SETTINGS}
    # before there were arms
    named_by_value = {SETTINGS[name][0] for name, value in given.items() if value != SETTINGS[name][1]}
    arms = named({name: own.get(name, "") for name in ("arms", *KINDS)})
    for module in named_by_value - set(arms) - set(ADDED):
        raise UserError(f"--mc_{' --mc_'.join(f'{k}={v}' for k, v in given.items() if SETTINGS[k][0] == module)} has "
                        f"no effect without {_how(module)}")
    by_value = [name for name in ADDED if name in named_by_value and name not in arms]
    own["arms"] = ",".join(filter(None, [own.get("arms", ""), *by_value]))
    return from_plain(MCConfig, own | {"of_arms": given}, "MC config")


def to_dict(config: MCConfig) -> dict:
    """As a checkpoint's meta holds it."""
    return {f.name: getattr(config, f.name) for f in core_settings()} | config.of_arms


def complete(config: MCConfig) -> dict:
    """With every setting that any version had, at the value that stands for its absence:
    what fingerprints are made of."""
    absent = {name: value for name, (_, value) in SETTINGS.items()}
    return RETIRED | absent | {"gist_source": config.gist_source} | to_dict(config)
