"""What changes over a run, as pure functions of the step; the number of iterations must be known first.

Steps count from 0; a run has steps 0 … num_iterations − 1.
"""


def ramp(step: int, start: int, length: int) -> float:
    """0 before `start`, then a straight line that reaches 1 at step `start + length` and stays there [steps].

    Already positive at `start` itself; length 0 is a switch.
    """
    return min(max((step - start + 1) / (max(length, 0) + 1), 0.0), 1.0)


def phases(num_iterations: int, warmup_steps: int, warmdown_ratio: float) -> tuple[int, int]:
    """(warm-up, warm-down) lengths in steps that never overlap: in a short run the warm-up gives way.

    Raises ValueError for a number of iterations below 1, or a ratio outside [0, 1].
    """
    if num_iterations < 1 or not 0 <= warmdown_ratio <= 1:
        raise ValueError(f"num_iterations must be at least 1 and warmdown_ratio in [0, 1]; got {num_iterations} and "
                         f"{warmdown_ratio}")
    warmdown = min(round(warmdown_ratio * num_iterations), num_iterations - 1)
    return min(max(warmup_steps, 0), num_iterations - 1 - warmdown), warmdown


def lr_multiplier(
    step: int, num_iterations: int, *, warmup_steps: int = 0, warmdown_ratio: float = 0.5, final_lr_frac: float = 0.0
) -> float:
    """Factor on every learning rate, in (0, 1]: up from 1 / (warmup_steps + 1), flat at 1,
    linearly down towards final_lr_frac.

    final_lr_frac would be reached one step after the last, so that no step is wasted on a rate of zero. At least one
    step runs at 1.
    """
    warmup, warmdown = phases(num_iterations, warmup_steps, warmdown_ratio)
    left = min(max(num_iterations - step, 0) / (warmdown + 1), 1.0)
    return ramp(step, 0, warmup) if step < warmup else left + (1 - left) * final_lr_frac


def muon_momentum(step: int, num_iterations: int, *, start: float = 0.85, end: float = 0.95,
                  length: int = 300) -> float:
    """Muon's momentum, from `start` to `end` over the first `length` steps, or over a quarter of a shorter run: early
    gradients age fast."""
    return start + (end - start) * ramp(step, 0, min(length, num_iterations // 4))


def weight_decay_multiplier(step: int, num_iterations: int) -> float:
    """Factor on the weight decay, in (0, 1]: linearly down to zero, reached one step after the last."""
    return max(num_iterations - step, 0) / num_iterations


def batch_lr_scale(batch_tokens: int, reference_tokens: int = 524_288, *, low: float = 0.5, high: float = 2.0) -> float:
    """Factor on learning rates tuned at `reference_tokens` per step when a step has `batch_tokens` [tokens].

    Square root of the ratio (for adaptive optimizers: arXiv 2205.10287), held in [low, high]: the rule is local, and
    unclamped would divide the rates by 8 for an 8,192-token step on a CPU, and by 16 for 2,048.
    """
    return min(max((batch_tokens / reference_tokens) ** 0.5, low), high)
