"""Every MegaContext setting, with its help: the flags `--mc_…` of base_train are these fields."""

import argparse
from dataclasses import asdict, dataclass, field, fields

from mc.gaussian_rope import SCHEMES
from mc.gistnet import GISTS
from mc.gistnet import VARIANTS as GIST_VARIANTS
from mc.lens_networks import READERS
from nanochat.common import UserError

POLICIES = ("random", "recency", "lens", "teacher")
DENSE_TEACHERS = ("attention", "gate")  # a distribution over blocks for every query
TEACHERS = (*DENSE_TEACHERS, "counterfactual", "preference")


def setting(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class MCConfig:
    # the tree and its gists
    block_size: int = setting(32, "tokens per LOD1 gist, and gists per gist of the next level")
    max_lod: int = setting(2, "highest level of the tree that is built and shown")
    gist: str = setting("slots", "GistNet variant", GIST_VARIANTS)
    gists_per_block: int = setting(1, "vectors that GistNet makes of a block, an entry each; sessions and far histories need 1", GISTS)
    gist_source: str = setting("embeddings", "what GistNet reads of a block: its embeddings, or the hidden states behind the base's middle layer, detached (no sessions)", ("embeddings", "hidden"))
    gist_width: int = setting(64, "internal width of GistNet")
    # the working context
    budget: int = setting(128, "W: entries of the working context before the continuation, everything included")
    recent: int = setting(0, "R: last tokens protected as LOD0; 0: min(128, W/4) in whole blocks, at least one")
    horizon: int = setting(32, "H: tokens of the continuation on which a working context is judged")
    positions: str = setting("gaussian", "positions of entries: damped at global centres, undamped, or numbered in order", SCHEMES)
    damping_floor: float = setting(0.1, "share of every frequency that a gist keeps under --mc_positions=gaussian")
    far_tokens: int = setting(0, "tokens of the longest stored history (log-uniform per row) shown in and around a row's own, as gists of other rows: far distances, levels that rows do not reach; 0: none")
    far_entries: int = setting(128, "entries that the stored history may take")
    # what is trained on it
    start: float = setting(0.3, "share of the training after which working contexts and lens begin: recall must have formed")
    ramp: int = setting(20, "steps over which their losses ramp in")
    row_stride: int = setting(1, "every how many rows get a working context: the dial of its compute")
    variants: int = setting(1, "working contexts per such row")
    cuts: str = setting("random:0.2,recency:0.1,lens:0.5,teacher:0.2", "how training chooses what to show: policy:share, …; teacher means attention mass, known before the backward pass")
    wc_weight: float = setting(0.1, "weight of the working context's next-token loss; far fewer tokens than the LM's, so a noisier gradient")
    kl_weight: float = setting(0.1, "weight of the KL from the full-context distribution")
    contrast_weight: float = setting(0.0, "weight of the gists' contrast: each names its own block's content among the row's")
    horizon_gist_weight: float = setting(0.0, "weight of the horizon loss: the base's hidden state at a node's end names the next node's gist among the row's, at LOD1 and LOD2 as far as a row has two nodes of them")
    bands: int = setting(0, "1: cuts of up to 5 tokens per entry, then up to 10, then more as well, a third of the training each; 0: as full as the budget allows, one in four coarser", (0, 1))
    # the lens
    lens: str = setting("bilinear", "LensNet variant: each block by itself, or with a network on top that reads the blocks together", ("bilinear", *READERS))
    teacher: str = setting("attention", "what the lens is taught, a kind or kind:weight, …: gate (gradients of the full pass), attention (mass in it), counterfactual (measured utilities of edits) or preference (the best of --mc_variants)")
    lens_horizon: int = setting(8, "tokens ahead whose need for a block the lens predicts")
    lens_queries: int = setting(128, "last positions of a row that teach the lens")
    lens_row_stride: int = setting(1, "every how many rows teach the lens")
    lens_key_dim: int = setting(128, "width of a lens key")
    lens_keys: int = setting(4, "lens keys per block")
    lens_edits: int = setting(8, "edits measured in every row that has a working context, for --mc_teacher=counterfactual")
    lens_rank: float = setting(0.0, "weight of the ranking term: the dense teacher's best block leads the lens's best others by a margin")
    lens_zero_sum: float = setting(0.0, "weight of the zero-sum term: squared mean logit over the visible blocks")
    lens_illegal: float = setting(0.0, "weight of the illegality term: probability on protected blocks, which are raw anyway")
    lens_kl: float = setting(0.0, "weight of the KL from the lens's earlier distribution, that of an exponential mean of its weights")
    # optimization
    gist_lr: float = setting(4e-3, "learning rate of GistNet and the gists' logit bias (AdamW), scaled with the batch like the base's")
    lens_lr: float = setting(0.06, "learning rate of LensNet (Muon; half for its scalars), scaled with the batch like the base's")

    def __post_init__(self):
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise UserError(f"--mc_{f.name}={getattr(self, f.name)}: use one of {', '.join(map(str, choices))}")
        self.cut_shares()
        teachers = self.teacher_weights()
        low = dict(block_size=2, max_lod=1, horizon=1, row_stride=1, variants=1, lens_horizon=1, lens_row_stride=1, budget=1,
                   recent=0, far_tokens=0, far_entries=1, ramp=0, lens_edits=2)
        for name, least in low.items():
            if getattr(self, name) < least:
                raise UserError(f"--mc_{name}={getattr(self, name)} must be at least {least}")
        for name, least in dict(wc_weight=0, kl_weight=0, gist_lr=1e-12, lens_lr=1e-12, lens_rank=0, lens_zero_sum=0, lens_illegal=0, lens_kl=0, contrast_weight=0, horizon_gist_weight=0).items():
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(f"--mc_{name}={getattr(self, name)} must be a finite number, {'at least 0' if not least else 'above 0'}")
        if not self.wc_weight and not self.kl_weight:
            raise UserError("--mc_wc_weight=0 with --mc_kl_weight=0 trains nothing on the working context; raise one")
        if teachers["preference"] and self.variants < 2:
            raise UserError(f"--mc_teacher={self.teacher} prefers one of several variants; raise --mc_variants above {self.variants}")
        if self.lens_edits != MCConfig.lens_edits and not teachers["counterfactual"]:
            raise UserError(f"--mc_lens_edits={self.lens_edits} has no effect without --mc_teacher=counterfactual")
        dense = any(teachers[kind] for kind in DENSE_TEACHERS)
        if self.lens_rank and not dense:
            raise UserError(f"--mc_lens_rank={self.lens_rank} ranks by a dense teacher, {' or '.join(DENSE_TEACHERS)}, not by --mc_teacher={self.teacher}")
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
        if self.far_tokens and self.gists_per_block > 1:
            raise UserError(f"--mc_far_tokens={self.far_tokens} holds one gist per node, and --mc_gists_per_block={self.gists_per_block}; use 1")
        if self.lens != "bilinear" and self.gists_per_block > 1:
            raise UserError(f"--mc_lens={self.lens} reads one gist per node, and --mc_gists_per_block={self.gists_per_block}; use --mc_lens=bilinear")
        if not self.far_tokens and self.far_entries != MCConfig.far_entries:
            raise UserError(f"--mc_far_entries={self.far_entries} has no effect with --mc_far_tokens=0")
        if self.damping_floor != MCConfig.damping_floor and self.positions != "gaussian":
            raise UserError(f"--mc_damping_floor has no effect with --mc_positions={self.positions}")

        for name, value in (("far_tokens", self.far_tokens), ("lens", self.lens != "bilinear")):
            if value and self.gist_source == "hidden":
                raise UserError(f"--mc_gist_source=hidden has no hidden states for --mc_{name}={getattr(self, name)}; use embeddings")
        for name in ("gist_width", "gist_source", "contrast_weight"):
            if self.gist == "mean" and getattr(self, name) != getattr(MCConfig, name):
                raise UserError(f"--mc_{name} has no effect with --mc_gist=mean, which has no weights")

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
        """Weight of each kind of target in the lens's loss, in the order of TEACHERS. A kind that is named alone weighs 1."""
        alone = self.teacher.strip() in TEACHERS
        weights = _mixture("teacher", f"{self.teacher}:1" if alone else self.teacher, TEACHERS, "a kind or kind:weight")
        if set(weights) != set(TEACHERS) or not all(0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
            raise UserError(f"--mc_teacher={self.teacher}: name at least one of {', '.join(TEACHERS)}, with weights above 0")
        return weights


def _mixture(flag: str, text: str, names: tuple[str, ...], form: str) -> dict[str, float]:
    """"name:number, …" as numbers by name, 0 for names left out; UserError for what is no number. Names are not checked."""
    numbers = dict.fromkeys(names, 0.0)
    for part in text.split(","):
        name, _, number = part.partition(":")
        try:
            numbers[name.strip()] = numbers.get(name.strip(), 0) + float(number)
        except ValueError:
            raise UserError(f"--mc_{flag}={text}: {part!r} is not {form}") from None
    return numbers


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("MegaContext (with --mc_enabled=1)")
    for f in fields(MCConfig):
        group.add_argument(f"--mc_{f.name}", type=type(f.default), default=f.default, choices=f.metadata["choices"],
                           help=f.metadata["help"])


def from_flags(args: argparse.Namespace) -> MCConfig:
    return MCConfig(**{f.name: getattr(args, f"mc_{f.name}") for f in fields(MCConfig)})


RETIRED = dict(max_gap=0, far_nodes=0, lens_normalize=0, gist_pool="mean", gist_head="linear", gist_shared=1, targets="tail",
               split="end", lod_axis=0, alibi=0)  # settings of earlier versions, and the value at which they did nothing


def from_dict(values: dict) -> MCConfig:
    """The config that a checkpoint's meta holds, of this version or of an earlier one that made no use of what is gone."""
    if gone := [f"{name}={values[name]}" for name in RETIRED if values.get(name, RETIRED[name]) != RETIRED[name]]:
        raise UserError(f"it was made with {', '.join(gone)}, which this version does not have; an earlier commit reads it (see the log)")
    values = {name: value for name, value in values.items() if name not in RETIRED}
    if unknown := sorted(set(values) - {f.name for f in fields(MCConfig)}):
        raise UserError(f"MC config has unknown fields: {', '.join(unknown)}; it was written by another version")
    return MCConfig(**values)


to_dict = asdict
