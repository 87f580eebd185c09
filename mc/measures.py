"""What a study's cells are judged by: functions from a checkpoint directory to measures, one number per held-out context each."""

from pathlib import Path

import numpy as np
import torch

from mc.evaluation import FocusComparison, plain_outcomes
from mc.model import MegaContext, load_mega_context
from nanochat.common import UserError
from nanochat.dataloader import make_source
from nanochat.gpt import GPT
from nanochat.loading import load_model
from nanochat.tokenizer import Tokenizer


def load(checkpoint_dir: Path) -> tuple[GPT, MegaContext, dict]:
    gpt, meta = load_model(checkpoint_dir)
    return gpt, load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd), meta


def focus(checkpoint_dir: Path, contexts: int = 64, batch: int = 32, oracle: int = 1, data: str = "") -> dict[str, list[float]]:
    """NLL and accuracy of every way to show a history, the last `horizon` tokens of held-out rows judged.

    nll_, acc_ of full, window, random, recency, lens and gist (no block raw), of oracle if asked for (it tries every block), and hit: whether
    the lens's first choice is the block that the continuation's gate gradient names. data: other text than the training's.
    """
    gpt, mc, meta = load(checkpoint_dir)
    flags, c = meta["flags"], mc.config
    T = gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    source = make_source(data or flags["data"], "val", T=T, seed=flags["seed"], tokenizer=Tokenizer.load(), rows=flags["rows"], text_column=flags["text_column"],
                         needles=flags["needles"], recall_blocks=flags["recall_blocks"])
    if (have := source.count_rows(contexts)) < contexts:
        raise UserError(f"contexts: {contexts}: the held-out split has {have} rows of {T} tokens")
    found: dict[str, list] = {}
    for first in range(0, contexts, batch):
        rows = np.arange(first, min(first + batch, contexts))
        tokens, mask = source.row_tokens(rows)
        targets = torch.from_numpy(tokens[:, 1:] if mask is None else np.where(mask[:, 1:], tokens[:, 1:], -1))[:, :n + c.horizon]
        tokens = torch.from_numpy(tokens[:, :n + c.horizon])
        comparison = FocusComparison(gpt, mc, tokens, targets, n, flags["seed"], torch.from_numpy(rows))
        scores = {policy: comparison.scores(policy) for policy in ("random", "recency", "lens")}
        shown = {policy: comparison.outcome(s) for policy, s in scores.items()}
        outcomes = plain_outcomes(gpt, tokens, targets, n, c.budget) | shown | {"gist": comparison.at_lod(1)}
        if oracle:
            outcomes["oracle"] = comparison.oracle(shown)
        for name, outcome in outcomes.items():
            found.setdefault(f"nll_{name}", []).append(outcome.nll_B)
            found.setdefault(f"acc_{name}", []).append(outcome.acc_B)
        choosable = slice(0, (n - c.protected) // c.block_size)
        first_choice = scores["lens"][:, choosable].argmax(1)
        found.setdefault("hit", []).append((first_choice == comparison.teacher_scores()["gate"][:, choosable].argmax(1)).float())
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}
