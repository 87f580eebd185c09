"""Measured utilities of path edits, kept in a folder: what a lens alone is trained on (`scripts.mc_study labels`,
`scripts.mc_study train_lensnet`).

    manifest.json              what the labels are of: base and gists by fingerprint, data, how they
                               were drawn; where they were made
    labels_00000.npz, …        one per pass: contexts with their edits. A file is there whole or not at
                               all, so an interrupted run goes on

Arrays only, nothing is unpickled. The fingerprint leaves the lens out: a lens learns from labels that
another lens's checkpoint gave.

Per context the tokens are embedded, the tree is built and the full pass runs once, for all its cursors and edits; the
full pass says which blocks are worth a try (gate gradients). The cuts of an edit share tokens and tree, and the keys
and values of what lies before it (`mc.arms.shared_prefix`).

Shapes: C contexts, T tokens, Q cursors of a context, E edits of a cursor, N blocks.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arms.counterfactual import can_flip, draw_cut, draw_edits, edit_utilities, standardized
from mc.arms.shared_prefix import continuation_from_cache
from mc.config import complete
from mc.lens_loss import visible_blocks
from mc.model import MegaContext
from mc.teachers import continuation_pass, gate_utility
from nanochat.common import UserError, parse_json
from nanochat.gpt import GPT, Captured
from nanochat.outputs import output_folder, replacing, write_file

FORMAT = 1
CONTRAST = 3.0  # logits per standard deviation of gate utility, when edits are drawn
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Labels:
    """Contexts with measured edits."""

    row_C: Tensor  # int64, global row number in the data
    tokens_CT: Tensor  # int64
    n_CQ: Tensor  # int64, tokens of history
    block_CQE: Tensor  # int64
    utility_CQE: Tensor  # float32, nats per token of the continuation, positive where detail helps
    valid_CQE: Tensor  # bool
    nll_CQ: Tensor  # float32, of the cut that was edited

    def fit(self) -> bool:
        """Whether types and shapes are those of labels."""
        whole, real = torch.int64, torch.float32
        types = dict(row_C=whole, tokens_CT=whole, n_CQ=whole, block_CQE=whole, utility_CQE=real, valid_CQE=torch.bool,
                     nll_CQ=real)
        sizes: dict[str, int] = {}
        for name, dtype in types.items():
            x, letters = getattr(self, name), name.rpartition("_")[2]
            if x.dtype != dtype or x.ndim != len(letters) or any(sizes.setdefault(letter, size) != size
                                                                 for letter, size in zip(letters, x.shape)):
                return False
        return True

    @staticmethod
    def cat(parts: "Sequence[Labels]") -> "Labels":
        return Labels(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Labels)})


def label_fingerprint(gpt: GPT, mc: MegaContext) -> str:
    """Of all that a label depends on: base, gists, and the settings, those of the lens and of training left out."""
    about_context = ("block_size", "max_lod", "budget", "recent", "horizon", "positions", "damping_floor", "lod_axis",
                     "alibi")
    settings = {name: value for name, value in complete(mc.config).items() if name.startswith("gist")
                or name in about_context}
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    state = gpt.state_dict() | {f"mc.{name}": x for name, x in mc.state_dict().items()
                                if not name.startswith(("lensnet.", "earlier_lens."))}
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def cursors(mc: MegaContext, T: int, count: int) -> list[int]:
    """Ends of history at block boundaries: the last that leaves room for a continuation, the others spread evenly over
    the second half of what does not fit the budget. UserError when there are fewer."""
    K = mc.config.block_size
    last = (T - mc.config.horizon) // K
    first = max(last // 2, mc.config.budget // K + 1)
    if count > last - first + 1:
        raise UserError(f"--cursors={count}: rows of {T} tokens with a budget of {mc.config.budget} have "
                        f"{max(last - first + 1, 0)} ends of history")
    return [K * round(last - i * (last - first) / max(count - 1, 1)) for i in range(count)]


def measure(gpt: GPT, mc: MegaContext, tokens_CT: Tensor, targets_CT: Tensor, rows_C: Tensor, at: Sequence[int],
            edits: int, seed: int, reuse: bool = True) -> Labels:
    """Labels of one batch of contexts at the ends of history `at`. targets: next tokens, −1 where none counts.
    reuse: False runs and differentiates everything from scratch, to the same result."""
    c, N = mc.config, tokens_CT.shape[1] // mc.config.block_size
    captured = (continuation_from_cache if reuse else continuation_pass)(gpt, tokens_CT, targets_CT, min(at))
    gates = _gate_utilities(captured, targets_CT, at, c.block_size, c.horizon)
    with torch.no_grad():
        tree = mc.build_tree(gpt.embed(tokens_CT))
    n_CQ = torch.tensor(list(at), device=tokens_CT.device).expand(len(tokens_CT), -1)
    drawn = []
    for n, gate_CN in zip(at, gates):
        here = torch.full((len(tokens_CT),), n, device=tokens_CT.device)
        editable = visible_blocks(here, N, c.block_size, c.protected)
        expanded = draw_cut(mc.allocator, editable, here, rows_C, seed, n)
        there = can_flip(expanded, editable, here, c.block_size)
        wanted = CONTRAST * standardized(F.pad(gate_CN, (0, N - gate_CN.shape[1])), there)
        drawn.append((*expanded, *draw_edits(wanted, there, edits, rows_C, seed, n)))
    *expanded, block, valid = (torch.stack(x, 1).flatten(0, 1) for x in zip(*drawn))  # [C·Q, …]

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(len(at), 0)

    trees = tree.with_table(each(tree.table_BND))
    utility, nll = edit_utilities(gpt, mc, trees, each(tokens_CT), each(targets_CT), n_CQ.flatten(), expanded, block,
                                  reuse)
    shape = (len(tokens_CT), len(at))
    return Labels(rows_C, tokens_CT, n_CQ.contiguous(),
                  *(x.unflatten(0, shape) for x in (block, utility.float().masked_fill(~valid, 0), valid, nll.float())))


def _gate_utilities(captured: Sequence[Captured], targets_CT: Tensor, at: Sequence[int], block_size: int,
                    horizon: int) -> list[Tensor]:
    """[C, n / K] for each end of history: gate utilities of the continuation's queries."""
    found = []
    for n in at:
        queries = slice(n - 1, n + horizon - 1)
        counted = (targets_CT[:, queries] >= 0).unsqueeze(-1)
        found.append((gate_utility(captured, slice(None), queries, n // block_size, block_size) * counted).sum(1))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The folder


class LabelFolder:
    """A folder of labels. settings: what must agree for labels to belong together; the manifest
    holds more that is only said."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def manifest(self) -> dict:
        """UserError where there is none, or it is not ours."""
        path = self.folder / MANIFEST
        try:
            found = parse_json(path.read_bytes())
            if found["format"] != FORMAT or not isinstance(found["settings"], dict):
                raise ValueError
        except OSError as e:
            raise UserError(f"no labels in {self.folder}: {path.name}: {e.strerror}; make some with: python -m "
                            "scripts.mc_study labels") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not the manifest of labels of format {FORMAT}") from None
        return found

    def begin(self, settings: dict, about: dict) -> None:
        """Write the manifest, or find that of an earlier run; UserError if that run's labels are of something else."""
        if not (self.folder / MANIFEST).exists():
            output_folder(self.folder, MANIFEST)
            write_file(self.folder / MANIFEST, json.dumps({"format": FORMAT, "settings": settings, "about": about},
                                                          indent=1))
            return
        there = self.manifest()["settings"]
        different = [f"{name} {there.get(name)} there, {settings.get(name)} here" for name in settings | there
                     if settings.get(name) != there.get(name)]
        if different:
            raise UserError(f"{self.folder} holds other labels: {'; '.join(different)}; name another --out")

    def path(self, index: int) -> Path:
        return self.folder / f"labels_{index:05d}.npz"

    def add(self, index: int, labels: Labels) -> None:
        with replacing(self.path(index)) as part, open(part, "wb") as f:
            np.savez(f, **{name: x.cpu().numpy() for name, x in asdict(labels).items()})

    def read(self) -> Labels:
        """All that is there, in the order it was drawn. UserError where there is nothing, or a file is damaged."""
        parts = []
        for path in sorted(self.folder.glob("labels_*.npz")):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    parts.append(Labels(**{f.name: torch.from_numpy(arrays[f.name]) for f in fields(Labels)}))
                if not parts[-1].fit() or any(x.shape[1:] != y.shape[1:]
                                              for x, y in zip(vars(parts[0]).values(), vars(parts[-1]).values())):
                    raise ValueError("arrays that do not fit each other")
            except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError, RuntimeError,
                    EOFError, zipfile.BadZipFile, zlib.error) as e:
                raise UserError(
                    f"{path} is damaged ({type(e).__name__}); remove it and label again, the others are kept") from None
        if not parts:
            raise UserError(f"no labels in {self.folder} yet: make some with: python -m scripts.mc_study labels")
        return Labels.cat(parts)
