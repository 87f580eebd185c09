"""Muon for matrices, AdamW for the rest: one optimizer, alone or with its state sharded over ranks.

Muon replaces a matrix's momentum by the nearest (semi-)orthogonal matrix, so that every direction of the
update has the same size; embeddings, the head and scalars, where that makes no sense, get AdamW.

A step has three phases. *Reduce*: every bucket launches one asynchronous collective that averages gradients
over ranks. *Update*: each bucket waits for its own, computes, and launches a gather. *Apply*: wait and write
the parameters. The later collectives run while the first buckets compute. Three kinds of bucket:

    Muon             matrices of one shape, stacked; a rank owns, and orthogonalizes, a slice of the stack
    AdamW sharded    one large parameter whose first dimension divides by the ranks; a rank owns a slice of rows
    AdamW replicated all others of a group: one flat all-reduce, then every rank does the same update

With one rank nothing is sent, and all of AdamW is the third kind. A parameter without a gradient counts as
having a gradient of zero: the collectives are then the same on every rank, whatever each rank's batch touched
(its momentum still acts, and decays; a parameter that never had a gradient does not move unless decayed).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError

SHARD_MIN = 65_536  # [elements] below this, AdamW state is cheaper to repeat than a collective of its own

# Odd quintics a·x + b·x³ + c·x⁵, each (nearly) the best one on the interval of singular
# values that the one before leaves,
# starting from [1e-3, 1]: Amsel et al., "The Polar Express", arXiv 2505.16932, Algorithm 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01  # that paper's guard against rounding pushing a singular value beyond the interval
STEPS = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS]


def orthogonalize(matrices: Tensor) -> Tensor:
    """The orthogonal polar factor U·Vᵀ of each matrix U·S·Vᵀ, approximately: singular values end near 1.

    matrices: float [n, rows, cols]. Computed in bfloat16 on CUDA, else in the dtype given; a zero matrix stays zero.
    Singular values below 1e-3 of the Frobenius norm come out smaller than 1.
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * SAFETY).clamp_min(1e-12)
    if x.is_cuda:
        x = x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT  # the Gram matrix is then the smaller of the two
    # squaring the spectrum is safe in float32, not in bfloat16
    elongated = x.size(-1) >= 2 * x.size(-2) and not x.is_cuda
    x = _iterate_gram(x) if elongated else _iterate(x)
    return x.mT if tall else x


def _iterate(x: Tensor) -> Tensor:
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor) -> Tensor:
    """The same polynomials, multiplied up on the Gram matrix [rows, rows] and applied to x once: measured 1.7 times
    faster at rows:cols 1:4 on one CPU thread (1.3 times slower for a square), rounding in
    float32 1e-5 to 4e-5 either way."""
    gram, product = x @ x.mT, None
    for i, (a, b, c) in enumerate(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if i + 1 < len(STEPS):
            gram = factor @ gram @ factor
    return product @ x


# torch 2.13 renamed both collectives and warns at the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]


class _MuonBucket:
    """Matrices [rows, cols] of one shape, stacked and padded with zeros to a multiple of the ranks."""

    def __init__(self, group: dict, params: list[Tensor], rank: int, world_size: int):
        self.group, self.params, self.world_size = group, params, world_size
        rows, cols = params[0].shape
        self.scale = max(1.0, rows / cols) ** 0.5  # keeps the update's size per output independent of the shape
        share = -(-len(params) // world_size)
        self.pad = share * world_size - len(params)
        self.state = {"momentum": params[0].new_zeros(share, rows, cols)}

    def reduce(self) -> None:
        grads = _grads(self.params)
        self.grad = self.sent = torch.stack(grads + [torch.zeros_like(grads[0])] * self.pad)
        if self.world_size > 1:
            self.grad = torch.empty_like(self.state["momentum"])
            self.work = _reduce_scatter(self.grad, self.sent, async_op=True)

    def update(self) -> None:
        if self.world_size > 1:
            self.work.wait()
            self.grad /= self.world_size
        mu, momentum = self.group["momentum"], self.state["momentum"]
        momentum.lerp_(self.grad, 1 - mu)
        own = orthogonalize(torch.lerp(self.grad, momentum, mu))  # Nesterov: look one step ahead
        self.updates = own
        if self.world_size > 1:
            self.updates = own.new_empty(own.size(0) * self.world_size, *own.shape[1:])
            self.work = _all_gather(self.updates, own.contiguous(), async_op=True)

    def apply(self) -> None:
        if self.world_size > 1:
            self.work.wait()
        lr, decay = self.group["lr"], self.group["weight_decay"]
        updates = list(self.updates[: len(self.params)].to(self.params[0].dtype).unbind(0))
        # cautious: only where the update and the decay pull the same way (Cautious Weight Decay, arXiv 2510.12402)
        if decay:
            agree = torch._foreach_mul(updates, self.params)
            torch._foreach_sign_(agree)
            torch._foreach_clamp_min_(agree, 0)
            torch._foreach_mul_(agree, self.params)
            torch._foreach_add_(self.params, agree, alpha=-lr * decay)
        torch._foreach_add_(self.params, updates, alpha=-lr * self.scale)
        del self.grad, self.sent, self.updates


class _AdamWBucket:
    """Parameters of one dtype that every rank updates alike; `targets` is what this rank updates."""

    def __init__(self, group: dict, params: list[Tensor], rank: int, world_size: int):
        self.group, self.params, self.world_size = group, params, world_size
        self.targets = self._own(rank)
        self.state = {"step": torch.zeros((), device=params[0].device)}
        for i, target in enumerate(self.targets):
            self.state[f"exp_avg.{i}"] = torch.zeros_like(target)
            self.state[f"exp_avg_sq.{i}"] = torch.zeros_like(target)
        self.exp_avgs = [self.state[f"exp_avg.{i}"] for i in range(len(self.targets))]
        self.exp_avg_sqs = [self.state[f"exp_avg_sq.{i}"] for i in range(len(self.targets))]

    def _own(self, rank: int) -> list[Tensor]:
        return [p.detach() for p in self.params]

    def reduce(self) -> None:
        self.grads = _grads(self.params)
        if self.world_size > 1:
            self.flat = torch.cat([g.reshape(-1) for g in self.grads])
            self.work = dist.all_reduce(self.flat, async_op=True)

    def _mean_grads(self) -> list[Tensor]:
        if self.world_size == 1:
            return self.grads
        self.work.wait()
        parts = (self.flat / self.world_size).split([p.numel() for p in self.params])
        return [part.view_as(p) for part, p in zip(parts, self.params)]

    def update(self) -> None:
        beta1, beta2 = self.group["betas"]
        self.state["step"] += 1
        torch._fused_adamw_(
            self.targets, self._mean_grads(), self.exp_avgs, self.exp_avg_sqs, [],
            [self.state["step"]] * len(self.targets),
            lr=self.group["lr"], beta1=beta1, beta2=beta2, weight_decay=self.group["weight_decay"],
            eps=self.group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def apply(self) -> None:
        self.grads = self.flat = None


class _ShardedAdamWBucket(_AdamWBucket):
    """One large parameter [rows, ...]; this rank owns rows [rank·rows/ranks, (rank+1)·rows/ranks)."""

    def _own(self, rank: int) -> list[Tensor]:
        return [self.params[0].detach().chunk(self.world_size)[rank]]

    def reduce(self) -> None:
        self.grads = [g.contiguous() for g in _grads(self.params)]
        self.flat = torch.empty_like(self.targets[0])
        self.work = _reduce_scatter(self.flat, self.grads[0], async_op=True)

    def _mean_grads(self) -> list[Tensor]:
        self.work.wait()
        return [self.flat / self.world_size]

    def update(self) -> None:
        super().update()
        self.gathered = torch.empty_like(self.params[0])
        self.work = _all_gather(self.gathered, self.targets[0], async_op=True)

    def apply(self) -> None:
        self.work.wait()
        self.params[0].detach().copy_(self.gathered)
        self.grads = self.flat = self.gathered = None


def _make_buckets(group: dict, rank: int, world_size: int) -> list[_MuonBucket | _AdamWBucket]:
    alike: dict[tuple, list[Tensor]] = defaultdict(list)
    buckets: list[_MuonBucket | _AdamWBucket] = []
    for p in group["params"]:
        if group["kind"] == "muon":
            if p.ndim != 2:
                raise ValueError(f"group {group['name']!r}: Muon takes matrices, got a parameter of shape "
                                 f"{tuple(p.shape)}")
            alike[p.dtype, p.shape].append(p)
        elif world_size > 1 and p.numel() >= SHARD_MIN and p.size(0) % world_size == 0:
            buckets.append(_ShardedAdamWBucket(group, [p], rank, world_size))
        else:
            alike[(p.dtype,)].append(p)
    kind = {"muon": _MuonBucket, "adamw": _AdamWBucket}[group["kind"]]
    return buckets + [kind(group, params, rank, world_size) for params in alike.values()]


class MuonAdamW(torch.optim.Optimizer):
    """Param groups are dicts with `params`, `kind` ("muon" or "adamw"), `name` and `lr`; optional `betas`, `eps`
    (AdamW), `momentum` (Muon) and `weight_decay` (decoupled; cautious for Muon). All may change between steps;
    `initial_lr` keeps the first `lr` for schedules. Joins the default process group if there is one: build it the same
    way on every rank, from equal parameters. Gradients are averaged over ranks inside `step`.

    Raises ValueError for a group without kind or name, or a Muon parameter that is not a matrix.
    """

    DEFAULTS = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0, "momentum": 0.95}

    def __init__(self, groups: Iterable[dict]):
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._buckets: list[_MuonBucket | _AdamWBucket] = []
        super().__init__(list(groups), dict(self.DEFAULTS))

    def add_param_group(self, param_group: dict) -> None:
        if param_group.get("kind") not in ("muon", "adamw") or "name" not in param_group or "lr" not in param_group:
            raise ValueError(f"a group needs kind 'muon' or 'adamw', a name and lr; got the keys {sorted(param_group)}")
        super().add_param_group({"initial_lr": param_group["lr"], **param_group})
        self._buckets += _make_buckets(self.param_groups[-1], self.rank, self.world_size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Average gradients over ranks and update. The loss should be known to be finite (`assert_finite`)."""
        assert closure is None, "a closure is not supported"
        for bucket in self._buckets:
            bucket.reduce()
        for bucket in self._buckets:
            bucket.update()
        for bucket in self._buckets:
            bucket.apply()

    def state_dict(self) -> dict:
        """This rank's shard: plain containers and tensors, so that it loads with `weights_only=True`."""
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {"rank": self.rank, "world_size": self.world_size, "groups": groups,
                "buckets": [dict(b.state) for b in self._buckets]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a shard saved by the same rank of as many ranks; afterwards steps are bit-identical.

        Raises UserError when the ranks, the groups or the shapes differ; nothing is changed then.
        """
        saved_by, here = (state_dict["rank"], state_dict["world_size"]), (self.rank, self.world_size)
        if saved_by != here:
            raise UserError(
                f"optimizer state of rank {saved_by[0]} of {saved_by[1]} cannot resume rank {here[0]} of {here[1]}: "
                f"run with {saved_by[1]} rank(s), as when it was saved, or start anew from the model weights"
            )
        mine = self.state_dict()
        names, saved_names = ([g["name"] for g in d["groups"]] for d in (mine, state_dict))
        if names != saved_names:
            raise UserError(f"optimizer groups in the checkpoint are {saved_names}, this run has {names}: use the "
                            "flags it was saved with")
        shapes, saved_shapes = ([{k: tuple(t.shape) for k, t in b.items()} for b in d["buckets"]]
                                for d in (mine, state_dict))
        if shapes != saved_shapes:
            raise UserError("optimizer state in the checkpoint has other shapes than this model: use the flags it was "
                            "saved with")
        for group, saved in zip(self.param_groups, state_dict["groups"]):
            group.update(saved)
        for bucket, saved in zip(self._buckets, state_dict["buckets"]):
            for key, tensor in bucket.state.items():
                tensor.copy_(saved[key])


def gpt_param_groups(
    named_params: Iterable[tuple[str, nn.Parameter]],
    n_embd: int,
    *,
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    scalar_lr: float,
    weight_decay: float,
) -> list[dict]:
    """Groups for nanochat's GPT by parameter name; empty ones are left out, parameters without gradient too.

    Learning rates are given for width 768; those of embeddings and head are scaled by (n_embd / 768)^-1/2. Muon needs
    no such scaling and scalars have no width. weight_decay is for the matrices alone. The residual scalars act on the
    whole stream, hence a hundredth of scalar_lr; those of x0 get a longer memory (beta1 0.96).
    """
    width = (n_embd / 768) ** -0.5
    options = {
        "embedding": {"kind": "adamw", "lr": embedding_lr * width},
        "unembedding": {"kind": "adamw", "lr": unembedding_lr * width},
        "matrix": {"kind": "muon", "lr": matrix_lr, "weight_decay": weight_decay},
        "resid_lambdas": {"kind": "adamw", "lr": scalar_lr * 0.01},
        "x0_lambdas": {"kind": "adamw", "lr": scalar_lr, "betas": (0.96, 0.95)},
        "scalar": {"kind": "adamw", "lr": scalar_lr},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in options}
    for name, p in named_params:
        if p.requires_grad:
            members[_gpt_group(name.removeprefix("_orig_mod."), p)].append(p)
    return [{"name": name, "params": members[name], **option} for name, option in options.items() if members[name]]


def _gpt_group(name: str, p: Tensor) -> str:
    if name == "transformer.wte.weight" or name.startswith("value_embeds."):
        return "embedding"
    if name == "lm_head.weight":
        return "unembedding"
    if name.startswith("transformer.h.") and p.ndim == 2:
        return "matrix"
    return name if name in ("resid_lambdas", "x0_lambdas") else "scalar"


def check_groups(modules: Mapping[str, nn.Module], groups: Iterable[dict]) -> None:
    """AssertionError, with names, unless every trainable parameter of the modules is in exactly
    one group, and no other is."""
    counts: dict[int, int] = defaultdict(int)
    for group in groups:
        for p in group["params"]:
            counts[id(p)] += 1
    names = {id(p): f"{module}.{name}" for module, m in modules.items() for name, p in m.named_parameters()
             if p.requires_grad}
    wrong = [f"{name} (in {counts[key]} groups)" for key, name in names.items() if counts[key] != 1]
    assert not wrong, f"every trainable parameter must be in exactly one optimizer group: {', '.join(wrong)}"
    strangers = sum(key not in names for key in counts)
    assert not strangers, f"{strangers} parameter(s) in the optimizer groups are not trainable parameters of {', '.join(modules)}"  # noqa: E501


@torch.no_grad()
def global_grad_norm(params: Iterable[Tensor], world_size: int = 1, max_norm: float | None = None) -> Tensor:
    """L2 norm, float32 [], of all gradients together, averaged over ranks; with max_norm,
    scales them down to it in place.

    With several ranks it averages a copy of each gradient, one at a time: as much traffic as a step, so call it on
    logging steps. Call it on every rank, before `MuonAdamW.step`.
    """
    params = list(params)
    grads = _grads(params)
    if world_size == 1:
        norms = torch._foreach_norm(grads)
    else:
        norms = []
        for grad in grads:
            mean = grad / world_size
            dist.all_reduce(mean)
            norms.append(mean.norm())
    norm = torch.stack([n.float() for n in norms]).norm()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([p.grad for p in params if p.grad is not None], scale)
    return norm


@torch.no_grad()
def relative_change(params: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """L2 norm, float32 [], of what has changed in the parameters together since `before`,
    over the norm that they had."""
    changed, had = (torch.stack([x.float() for x in torch._foreach_norm(list(xs))]).norm()
                    for xs in (torch._foreach_sub(list(params), list(before)), before))
    return changed / had.clamp_min(1e-30)


def assert_finite(loss: Tensor | float, step: int) -> None:
    """UserError unless the loss is finite; call before `step`, so that a bad batch does not reach the weights."""
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"loss is not finite at step {step} ({value}): lower the learning rates or look at the data of "
                        "that step")
