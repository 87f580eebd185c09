"""One run, one directory: taken at the start, gone on with after a stop, written to in between."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanochat.checkpoint import annotate, complete_steps, load_checkpoint, load_mc_state, load_model_state, save_checkpoint, set_rng_state  # noqa: E501
from nanochat.common import Ranks, UserError, base_dir, print0
from nanochat.controller import NullController
from nanochat.dataloader import Loader
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.outputs import BASE_DIR, holding, output_folder
from nanochat.plan import Plan, run_tag
from nanochat.tokenizer import Tokenizer

MAY_CHANGE = {
    "data", "device_batch_size", "stop_at", "eval_every", "eval_tokens", "probe_every", "save_every", "keep_last",
    "log_every", "trace_every",
    "resume", "model_tag", "run", "device", "compile", "vocab_size",
}  # fmt: skip  # flags of a resumed run; the loader compares the data itself, not its path


@dataclass
class RunProgress:
    """How far a run has come."""

    step: int = 0
    flops: float = 0.0
    trained_s: float = 0.0
    val: dict | None = None  # the last evaluation, with its step
    saved_step: int = 0  # the last one that is on disk

    def unjudged(self, last: int) -> bool:
        """Whether a run that has done its `last` step was stopped in its last evaluation."""
        return self.step == last and (not self.val or self.val.get("step", self.step) != self.step)


@contextmanager
def own_directory(args) -> Iterator[Path]:
    """The directory of a run's checkpoints, held against any other run until the end.
    UserError while another has it."""
    directory = base_dir() / "checkpoints" / run_tag(args)
    output_folder(directory, flag=BASE_DIR)
    with holding(directory) if int(os.environ.get("RANK", 0)) == 0 else contextlib.nullcontext():
        yield directory


@dataclass
class Checkpoints:
    """A run's checkpoints, and all that goes into them."""

    directory: Path
    args: object
    plan: Plan
    ranks: Ranks
    tokenizer: Tokenizer
    model: GPT
    controller: NullController
    optimizer: MuonAdamW
    loader: Loader
    progress: RunProgress = field(default_factory=RunProgress)

    def resume(self) -> RunProgress:
        """Where the newest intact checkpoint stands, everything put back; the beginning where there is none. UserError
        where there is one that is not to be gone on with."""
        if not (steps := complete_steps(self.directory)):
            return self.progress
        if not self.args.resume:
            raise UserError(f"{self.directory} holds checkpoints of another run, up to step {steps[-1]}; use "
                            "--resume=1, another --model_tag, or remove it")
        saved = load_checkpoint(self.directory, device=self.ranks.device, rank=self.ranks.rank,
                                world_size=self.ranks.world_size)
        check_resumable(saved.meta, self.args, self.plan, self.tokenizer, self.directory, self.controller)
        self.model.load_state_dict(saved.model)
        self.controller.load_state_dict(saved.mc)
        self.optimizer.load_state_dict(saved.optimizer)
        self.loader.load_state_dict(saved.loader)
        set_rng_state(saved.rng)
        print0(f"resumed {self.directory} at step {saved.step} of {self.plan.num_iterations}")
        self.progress = RunProgress(saved.step, saved.meta["flops"], saved.meta.get("trained_s", 0.0),
                                    saved.meta["val"], saved.step)
        return self.progress

    def save(self) -> None:
        """Where the run stands. Every rank calls it."""
        progress = self.progress
        meta = {
            "model_config": asdict(self.plan.model), "num_iterations": self.plan.num_iterations,
            "tokenizer": self.tokenizer.fingerprint,
            "flops": progress.flops, "tokens": self.plan.tokens_per_step * progress.step,
            "trained_s": progress.trained_s,
            "val": progress.val, "flags": vars(self.args), "mc": self.controller.meta(),
        }  # fmt: skip
        save_checkpoint(
            self.directory, progress.step, model=self.model.state_dict(), optimizer_shard=self.optimizer.state_dict(),
            meta=meta,
            mc=self.controller.state_dict(), loader=self.loader.state_dict(), rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            keep_last=self.args.keep_last,
        )  # fmt: skip
        progress.saved_step = progress.step

    def judged(self, val: dict) -> None:
        """An evaluation of where the run stands, which its checkpoint learns of when it came first."""
        progress = self.progress
        progress.val = {"step": progress.step, **val}
        if self.ranks.rank == 0 and progress.saved_step == progress.step:
            annotate(self.directory, progress.step, val=progress.val)


def check_resumable(meta: dict, args, plan: Plan, tokenizer: Tokenizer, directory: Path,
                    controller: NullController) -> None:
    """UserError when a run would go on with other flags than it began with: state that is restored
    would silently win over them."""
    now, saved = as_flags(vars(args)), as_flags(meta["flags"])
    # as this version reads it: settings that came or went since make no difference
    if meta.get("mc") and controller.modules:
        now, saved = ({name: v for name, v in flags.items() if not name.startswith("mc_")} for flags in (now, saved))
        now, saved = (flags | as_flags(settings, "mc_")
                      for flags, settings in ((now, controller.settings()), (saved, controller.settings(meta["mc"]))))
    changed = [f"--{k}={v} (was {saved.get(k, 'not there')})" for k, v in now.items() if saved.get(k) != v]
    changed += [f"--{k} (was {v})" for k, v in saved.items() if k not in now]
    if meta["tokenizer"] != tokenizer.fingerprint:
        changed.append(f"tokenizer {tokenizer.fingerprint} (was {meta['tokenizer']})")
    if not changed and (meta["model_config"] != asdict(plan.model) or meta["num_iterations"] != plan.num_iterations):
        changed.append(f"model or horizon (was {meta['model_config']}, {meta['num_iterations']} steps)")
    if changed:
        raise UserError(f"cannot resume {directory} with other settings: {', '.join(changed)}; use its flags, another "
                        "--model_tag, or --resume=0")


def as_flags(values: dict, prefix: str = "") -> dict:
    """Values as they stand on a command line, those apart that may change."""
    return {prefix + k: int(v) if isinstance(v, bool) else v for k, v in values.items() if k not in MAY_CHANGE}


def start_from(directory: str, plan: Plan, model: GPT, controller: NullController, tokenizer: Tokenizer) -> None:
    """The newest weights of another run of the same shape; MegaContext's where both runs have a
    tensor of that name and shape."""
    state, meta = load_model_state(directory, device=model.lm_head.weight.device)
    here, there = asdict(plan.model), meta["model_config"]
    different = [f"{name} {there.get(name)} there, {value} here" for name, value in here.items()
                 if name != "sequence_len" and there.get(name) != value]
    if meta["tokenizer"] != tokenizer.fingerprint:
        different.append(f"tokenizer {meta['tokenizer']} there, {tokenizer.fingerprint} here")
    if different:
        raise UserError(f"--init_from={directory} is another model: {'; '.join(different)}")
    model.load_state_dict(state)
    print0(f"starting from {directory}, step {meta['step']}")
    own, theirs = controller.state_dict(), load_mc_state(directory, meta["step"], model.lm_head.weight.device)
    if own and theirs:
        taken = {name: tensor for name, tensor in theirs.items() if name in own and own[name].shape == tensor.shape}
        controller.load_state_dict(own | taken)
        print0(f"{len(taken)} of {len(own)} tensors of MegaContext as well" + "".join(f", not {name}"
                                                                                      for name in own
                                                                                      if name not in taken))
