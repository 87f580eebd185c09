"""What a training run records of itself: the time of its parts, losses, speed, norms; and its looks at held-out rows.

    with TrainingMeter(...) as meter:
        meter.begin_step()
        with meter.span("train.forward"): ...
        meter.micro_step(result, controller.after_backward(), batch.num_targets)
        meter.read_losses()                  # at log lines: waits for the device, stops where a loss is not finite
        meter.updated()                      # the optimizer has stepped

Between log lines nothing here waits for the device.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Ranks, UserError, base_dir
from nanochat.controller import Metrics, NullController, StepResult
from nanochat.gpt import GPT
from nanochat.optim import assert_finite, global_grad_norm, relative_change
from nanochat.plan import Plan, run_tag, step_flops
from nanochat.resume import RunProgress
from nanochat.schedule import muon_momentum
from nanochat.telemetry.opening import open_recorder
from nanochat.telemetry.tracing import Reading, Trace

# dense bf16, data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
PRODUCTS = 8  # of matrices that a device without a data sheet is timed by


class TrainingMeter:
    """Measures one run; use as a context manager. progress: its step is the loop's, flops and
    trained_s are counted here."""

    def __init__(self, args, plan: Plan, model: GPT, controller: NullController, progress: RunProgress, ranks: Ranks):
        self.plan, self.model, self.controller, self.progress, self.ranks = plan, model, controller, progress, ranks
        self.trace_every, self.device, self.frozen = args.trace_every, ranks.device, args.freeze_base
        self.recorder = open_recorder(
            base_dir() / "runs" / run_tag(args), run=args.run, config=vars(args), total_steps=plan.num_iterations,
            first_step=progress.step, rank=ranks.rank,
            labels={"mc.stage": "train", "mc.variant": "mc" if controller.modules else "vanilla"},
        )  # fmt: skip
        self.peak = peak_flops(self.device) * ranks.world_size
        self.unlogged: list[Metrics] = []  # of the micro-steps since the last log line
        self.clock = time.perf_counter()  # at the last log line, as step and FLOPs: speed is measured from line to line
        self.logged_step, self.logged_flops = progress.step, progress.flops
        self.networks: dict[str, list] = {}

    def __enter__(self) -> "TrainingMeter":
        return self

    def __exit__(self, *exception) -> None:
        self.recorder.close()

    # -- one step ---------------------------------------------------------------------------------------------------------  # noqa: E501

    def begin_step(self) -> None:
        step = self.progress.step
        self.trace = Trace("train.step", self.device, keep=bool(self.trace_every) and step % self.trace_every == 0,
                           step=step)
        self.waited, self.losses = 0.0, 0.0
        self.speed: dict[str, float] | None = None  # at a log line, since the last one
        self.networks = {}

    def span(self, name: str):
        return self.trace.span(name)

    def next(self, loader):
        """The loader's next batch, timed."""
        asked = time.perf_counter()
        with self.span("train.data"):
            batch = loader.next()
        self.waited += time.perf_counter() - asked
        return batch

    def micro_step(self, result: StepResult, after: tuple[Tensor | float, Metrics], num_targets: int) -> None:
        """after: what the controller's `after_backward` gave."""
        self.losses = self.losses + result.loss.detach() + after[0]
        self.unlogged.append(result.metrics | after[1])
        self.progress.flops += step_flops(self.model, self.controller, self.plan, self.progress.step,
                                          num_targets) / self.plan.accumulation

    def read_losses(self) -> None:
        """At a log line, before the update: UserError where a loss is not finite, and it is on record then."""
        progress = self.progress
        self.recorder.step = progress.step + 1
        self._check_finite()  # fetched from the device, so the clock is read when its work is done
        elapsed = time.perf_counter() - self.clock
        progress.trained_s += elapsed
        step_time = elapsed / (progress.step + 1 - self.logged_step)
        self.speed = {
            "train.step_time": step_time, "train.tokens_per_second": self.plan.tokens_per_step / step_time,
            "train.mfu": (progress.flops - self.logged_flops) / elapsed / self.peak,
            "train.elapsed": progress.trained_s,
        }  # fmt: skip
        self.elapsed = elapsed
        self.clock, self.logged_step, self.logged_flops = self.clock + elapsed, progress.step + 1, progress.flops
        for metrics in mean_over_ranks(self.unlogged, self.ranks):
            self.record(metrics)
        self.unlogged.clear()
        self.networks = self.controller.networks() if self.controller.active(progress.step) else {}

    def record(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.recorder.record(name, value)

    def _check_finite(self) -> None:
        """`assert_finite`, and on record: closing the recorder hands the sinks what an alert can see."""
        try:
            assert_finite(self.losses, self.progress.step)
        except UserError:
            self.recorder.record("train.nonfinite", 1)
            raise
        self.recorder.record("train.nonfinite", 0)

    def gradients(self, clip: float) -> None:
        """Clip those of the base to a norm, 0: not at all; norms are recorded when they
        were taken, and at log lines."""
        if (clip or self.speed) and not self.frozen:
            norm = global_grad_norm(self.model.parameters(), self.ranks.world_size, clip or None)
            self.recorder.record("train.grad_norm", norm)
        for name, params in self.networks.items():
            self.recorder.record("mc.grad_norm", global_grad_norm(params, self.ranks.world_size), network=name)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The optimizer's step."""
        before = {name: [p.detach().clone() for p in params] for name, params in self.networks.items()}
        begin = time.perf_counter()
        with self.span("train.optimizer"):
            yield
        self.recorder.trace(self.trace)
        self.recorder.record("train.data_wait", self.waited)
        if self.device.type == "cpu":  # elsewhere it has only been launched
            self.recorder.record("train.optimizer_time", time.perf_counter() - begin)
        for name, params in self.networks.items():
            self.recorder.record("mc.update", relative_change(params, before[name]), network=name)

    def log(self, multiplier: float) -> None:
        """At a log line, after the update: what the run has come to. multiplier: of all
        learning rates, in this step."""
        record, progress = self.recorder.record, self.progress
        record("telemetry.overhead", self.recorder.take_spent() / self.elapsed)
        self.record(self.speed)
        record("train.tokens", progress.step * self.plan.tokens_per_step)
        record("train.flops", progress.flops)
        record("train.memory", peak_memory(self.device))
        record("optim.lr", multiplier)
        record("optim.momentum", muon_momentum(progress.step - 1, self.plan.num_iterations))

    def flush(self) -> None:
        self.recorder.flush(self.progress.step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluating and saving is no training."""
        begin = time.perf_counter()
        yield
        self.clock += time.perf_counter() - begin

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.recorder.record(name, time.perf_counter() - begin)


def mean_over_ranks(metrics: list[Metrics], ranks: Ranks) -> list[Metrics]:
    """Each value's mean over ranks, which record the same names in the same order: a curve must not be one rank's."""
    if ranks.world_size == 1:
        return metrics
    read = lambda v: float(v) if isinstance(v, Reading) else v.detach().reshape(())  # noqa: E731
    values = torch.stack([torch.as_tensor(read(v)).to(ranks.device, torch.float32) for m in metrics
                          for v in m.values()])
    dist.all_reduce(values)
    means = iter(values / ranks.world_size)
    return [{name: next(means) for name in m} for m in metrics]


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU is a share of: the data sheet's dense bf16 figure, or on other devices what a
    matrix product reaches now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_FLOPS.items():
            if known in name:
                return peak
    a, times = torch.full((512, 512), 0.5, device=device), []  # no draw: the generators' state is part of a checkpoint
    for _ in range(PRODUCTS):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - begin)
    return 2 * 512**3 / min(times)
