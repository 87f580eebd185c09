"""Token-importance labels, distilled from the base itself (D6): what each token of a history does for what follows,
read off the full pass as the gate utility (or the attention) of a block of one token (`mc.teachers`). Made once, stored
as safetensors shards of whole batches, tokens and importance side by side, under a manifest that says of what; a run
that was cut off goes on where it stopped.

Shapes: B rows, n tokens of history, T tokens of a row.
"""

import json
from pathlib import Path
from typing import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mc.teachers import attention_mass, continuation_pass, gate_utility
from nanochat.common import UserError, parse_json
from nanochat.gpt import GPT
from nanochat.outputs import output_folder, replacing, write_file

TEACHERS = ("gate", "attention")


def importance(gpt: GPT, tokens_BT: Tensor, targets_BT: Tensor, n: int, teacher: str = "gate") -> Tensor:
    """float32 [B, n]: what each token of the history does for the continuation, to first order
    [nats], or the attention it gets."""
    queries = slice(n - 1, tokens_BT.shape[1] - 1)
    captured = continuation_pass(gpt, tokens_BT, targets_BT, n)
    if teacher == "gate":
        return gate_utility(captured, slice(None), queries, n, 1).sum(1).float()
    mass = attention_mass(captured, slice(None), queries, n, 1)
    return (mass * (targets_BT[:, queries] >= 0).unsqueeze(-1)).sum(1).float()


def write_labels(directory: Path, facts: dict, batches: Callable[[int], tuple[Tensor, Tensor]], count: int,
                 progress: Callable[[int], None]) -> int:
    """Make the shards 0 … count − 1 that are not there yet; returns how many were made. batches(i):
    tokens, importance [B, n] of shard i.

    A directory holds labels of one base and one source: UserError when `facts` differ from those of its manifest.
    """
    output_folder(directory, flag="--labels")
    manifest = directory / "manifest.json"
    if manifest.exists():
        if (there := read_manifest(directory)) != facts:
            changed = [k for k in sorted(there.keys() | facts.keys()) if there.get(k) != facts.get(k)]
            said = ", ".join(f"{k}={there.get(k)} (now {facts.get(k)})" for k in changed)
            raise UserError(f"{directory} holds labels made otherwise: {said}; use another folder, or remove it")
    else:
        write_file(manifest, json.dumps(facts, indent=1))
    made = 0
    for i in range(count):
        path = directory / f"labels_{i:06d}.safetensors"
        if not path.exists():
            tokens, worth = batches(i)
            content = {"tokens": tokens.int().contiguous(), "importance": worth.contiguous()}
            with replacing(path, SafetensorError) as part:
                save_file(content, part)
            made += 1
        progress(i + 1)
    return made


def read_manifest(directory: Path) -> dict:
    try:
        found = parse_json((directory / "manifest.json").read_bytes())
        if not isinstance(found, dict):
            raise ValueError("manifest.json is not an object")
        return found
    except (OSError, ValueError) as e:
        raise UserError(f"no labels in {directory} ({e}); make them: python -m scripts.mc_study importance") from None


def read_labels(directory: Path) -> list[tuple[Tensor, Tensor]]:
    """Of each shard: tokens int64 [B, n], importance float32 [B, n]. UserError where there
    is none, or one is damaged."""
    paths = sorted(directory.glob("labels_*.safetensors"))
    if not paths:
        raise UserError(f"no labels in {directory}; make them: python -m scripts.mc_study importance")
    shards = []
    for path in paths:
        try:
            content = load_file(path)
            tokens, worth = content["tokens"], content["importance"]
            if not (tokens.dtype == torch.int32 and worth.dtype == torch.float32 and tokens.shape == worth.shape
                    and tokens.ndim == 2 and len(tokens) and worth.isfinite().all()):
                raise ValueError("tokens and importance are not of one shape")
            shards.append((tokens.long(), worth))
        except (OSError, KeyError, ValueError, SafetensorError) as e:
            raise UserError(f"{path} is damaged ({e}); remove it, and make it again") from None
    return shards


def keep_labels(importance_Bn: Tensor, share: float) -> Tensor:
    """bool [B, n]: the most important `share` of each row's tokens, of those that help at all."""
    count = max(round(share * importance_Bn.shape[1]), 1)
    least = importance_Bn.topk(count, dim=1).values[:, -1:]
    return (importance_Bn >= least) & (importance_Bn > 0)
