"""The networks that a history is made with: of a checkpoint, or untrained ones where there is none.

Shapes: none.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from mc.config import MCConfig
from mc.model import MegaContext, fingerprint, load_mega_context
from nanochat.common import base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.loading import check_tokenizer, load_model
from nanochat.tokenizer import Tokenizer, tokenizer_dir

UNTRAINED_WIDTH = 128


@dataclass(frozen=True)
class Networks:
    """A base with its MegaContext, the tokenizer, and where they come from, in words and
    as `load_networks` takes it."""

    gpt: GPT
    mc: MegaContext
    tokenizer: Tokenizer
    origin: str  # JSON: {} for untrained ones, else checkpoint_dir and step
    trained_lods: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.gpt, self.mc)

    @property
    def description(self) -> str:
        if origin := json.loads(self.origin):
            return f"step {origin['step']} of {origin['checkpoint_dir']}"
        return (
            f"no checkpoint: gists are means of random embeddings of width {UNTRAINED_WIDTH}. Good for trying the "
            "store, no model can read "
            "them; train one, then: regist"
        )


def default_checkpoint() -> Path | None:
    """The quickstart's text model, or else the MegaContext checkpoint that was written
    last; None where there is none."""
    folder = base_dir() / "checkpoints"
    if any((quickstart := folder / "quickstart_facts_mc_42").glob("complete_*.json")):
        return quickstart
    found = sorted(folder.rglob("mc_*.pt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def load_networks(checkpoint_dir: Path | str, step: int | str = "latest",
                  device: torch.device | str = "cpu") -> Networks:
    """UserError where the checkpoint has no MegaContext, or the tokenizer is not the one it was trained with."""
    gpt, meta = load_model(checkpoint_dir, step, device)
    mc = load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd, device)
    tokenizer = Tokenizer.load()
    check_tokenizer(meta, tokenizer, checkpoint_dir)
    origin = json.dumps({"checkpoint_dir": str(Path(checkpoint_dir).resolve()), "step": meta["step"]})
    return Networks(gpt, mc, tokenizer, origin, tuple(meta["mc"].get("trained_lods", ())))


def untrained_networks(device: torch.device | str = "cpu") -> Networks:
    """Random embeddings (always the same) and the masked mean as GistNet; the tokenizer
    that is there, or single bytes."""
    there = (tokenizer_dir() / "tokenizer.json").exists()
    tokenizer = Tokenizer.load() if there else Tokenizer([bytes([i]) for i in range(256)])
    # the draws of the caller go on as if none had been made here
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=4, n_kv_head=4, n_embd=UNTRAINED_WIDTH,
                            value_embeds=False))
        # written out: stores that these made must stay readable
        mc = MegaContext(MCConfig(gist="mean", max_lod=2), UNTRAINED_WIDTH)
    return Networks(gpt.to(device).eval(), mc.to(device).eval(), tokenizer, "{}")
