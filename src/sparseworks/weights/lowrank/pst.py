"""PST (Li et al. 2022, Parameter-Efficient Sparsity for Large Language Models Fine-Tuning, IJCAI,
arXiv:2205.11005): a mask and an update of frozen weights, both learned in few parameters.

    W' = W + beta U V                                          U [out, r1], V [r1, in]
    S  = |W'| + a1 A B + a2 (R 1^T + 1 C^T)                    A [out, r2], B [r2, in]
    M  = 0 at the int(s_t out in) lowest S of the layer,       y = x (M * W')^T + b

W and b rest. |W'| is the data-free part of the importance; the others stand in for what movement
pruning accumulates in full size, -sum dL/dM. U and A start as N(0, 1), V, B, R and C at 0. The
mask is passed straight through, dL/dS := dL/dM; with G = dL/d(M * W') and Q = G * W'

    dA = a1 Q B^T,   dB = a1 A^T Q,   dR, dC = a2 row, column sums of Q
    dW' = G * (M + |W'|),   dU = beta dW' V^T,   dV = beta U^T dW'

(Q sign(W') = G |W'| is the data-free part's). s_t is 0 for `warmup` of the training, then rises as
a cubic to the sparsity, which it has for the last `cooldown`.

The released script trains these alone and leaves its classifier head as it was drawn; here the
output head trains too unless `head` is off. It has one learning rate, 3e-5, for all. At larger ones
the scores drown |W|, which is of the size of 0.05: Adam's steps do not depend on the size of
gradients, so that a1 = a2 = 0.1 are the scores at a tenth of the learning rate.

In our quick setting (claim 086: a byte decoder of width 64, 90 %, 150 steps) the learned importance
is worth 0.008 nats; the same number of parameters in the update alone is worth 0.027, and training
all weights 0.07 more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Unstructured, count_dropped
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.core.selection import keep_top
from sparseworks.models.roles import Adapters, output_head
from sparseworks.models.views import View
from sparseworks.training.transforming import Transform, Transformed

__all__ = ["PST", "LowRankImportance", "masked_update"]


class _Masked(torch.autograd.Function):
    """M * W' forward; dW' = G * M, dS = G * W' backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


def masked_update(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """M * W' with a gradient for the scores as if the mask were they."""
    made: Tensor = _Masked.apply(weight, scores, mask)  # type: ignore[no-untyped-call]
    return made


class LowRankImportance(nn.Module):
    """The part of a weight: its update, its importance and its mask.

    Args:
        view: of the weight.
        method: its options.
        seed: of U and A.
    """

    mask: Tensor

    def __init__(self, view: View, method: PST, seed: int) -> None:
        super().__init__()
        self.method, self.view = method, view
        weight, (out, width) = view.parameter.detach(), view.shape
        generator = generator_for(seed, view.name)

        def made(*shape: int, drawn: bool = False) -> nn.Parameter:
            start = torch.randn(shape, generator=generator) if drawn else torch.zeros(shape)
            return nn.Parameter(start.to(weight.device, weight.dtype))

        self.up, self.down = made(out, method.rank, drawn=True), made(method.rank, width)
        self.score_up = made(out, method.score_rank, drawn=True)
        self.score_down = made(method.score_rank, width)
        self.rows, self.columns = made(out), made(width)
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def updated(self, weight: Tensor) -> Tensor:
        """W', as a matrix."""
        return self.view.matrix(weight) + self.method.beta * self.up @ self.down

    def scores(self, updated: Tensor) -> Tensor:
        """S."""
        low = self.method.low_rank * self.score_up @ self.score_down
        structured = self.method.structured * (self.rows[:, None] + self.columns)
        free = updated.abs() if self.method.through else updated.detach().abs()
        return free + low + structured

    @torch.no_grad()
    def choose(self, weight: Tensor, sparsity: float) -> None:
        """The mask of S as it is now."""
        scores = self.scores(self.updated(weight))
        kept = keep_top(scores.float(), scores.numel() - count_dropped(scores.numel(), sparsity))
        self.mask.copy_(self.view.from_matrix(kept))

    def forward(self, weight: Tensor) -> Tensor:
        updated = self.updated(weight)
        if not torch.is_grad_enabled():
            return self.view.from_matrix(updated) * self.mask
        mask = self.view.matrix(self.mask)
        return self.view.from_matrix(masked_update(updated, self.scores(updated), mask))


@dataclass(frozen=True, kw_only=True)
class PST(Transform):
    """Learn a mask and a low-rank update of frozen weights.

    Args:
        rank: r1, of the update.
        score_rank: r2, of the importance.
        beta: of the update.
        low_rank, structured: a1 and a2; 0 for both: magnitude alone.
        warmup, cooldown: parts of the training at sparsity 0 and at the final one.
        head: the output head trains too.
        through: the gradient goes through |W'| in S too.
    """

    rank: int = 8
    score_rank: int = 8
    beta: float = 1.0
    low_rank: float = 1.0
    structured: float = 1.0
    warmup: float = 0.1
    cooldown: float = 0.3
    head: bool = True
    through: bool = True

    info: ClassVar[MethodInfo] = MethodInfo(
        name="pst",
        title="Parameter-Efficient Sparsity for Large Language Models Fine-Tuning",
        authors="Li et al.",
        year=2022,
        card="086",
        room="weights",
        kind="transform",
        needs=("training",),
        command="sparseworks train MODEL --data DATA --method pst --sparsity 0.9 --optimizer adamw "
        "--out OUT",
        pattern="unstructured",
        budget="uniform",
        cost="(r1 + r2) (out + in) + out + in parameters train; a dense score per weight and step",
        summary="learn mask and update of frozen weights in few parameters",
    )

    def __post_init__(self) -> None:
        if self.rank < 1 or self.score_rank < 1:
            raise InvalidArgument(
                f"pst: rank={self.rank} and score_rank={self.score_rank} must be at least 1"
            )
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown >= 1:
            raise InvalidArgument(
                f"pst: warmup={self.warmup} and cooldown={self.cooldown} must not be negative and "
                "add up to less than 1"
            )

    def begin(self, job: Transformed) -> None:
        _ = job.progress  # refuses a job without `steps`
        if not isinstance(job.pattern, Unstructured) or job.budget != "uniform":
            raise InvalidArgument(
                f"pst: the mask is unstructured and the same share of every layer, not "
                f"{job.pattern} by {job.budget}"
            )
        for name, view in job.views.items():
            job.parametrize(name, LowRankImportance(view, self, job.seed))
        kept = output_head(job.model, Adapters(job.model)) if self.head else None
        layers = [m for m in job.model.modules() if kept is not None and _holds(m, kept)]
        trains = {id(p) for m in layers for p in m.parameters(recurse=False)}
        trains |= {id(p) for p in job.added.values()}
        job.train_only("parts")
        for parameter in job.model.parameters():
            if id(parameter) in trains:
                parameter.requires_grad_(True)

    def sparsity_at(self, job: Transformed) -> float:
        """s_t."""
        u = (job.progress - self.warmup) / (1 - self.warmup - self.cooldown)
        final = job.sparsity or 0.0
        return final * (1 - (1 - min(1.0, max(0.0, u))) ** 3)

    def update(self, job: Transformed) -> None:
        sparsity = self.sparsity_at(job)
        for name, view in job.views.items():
            job.part(name, LowRankImportance).choose(view.parameter, sparsity)

    def finish(self, job: Transformed) -> None:
        for name, view in job.views.items():
            job.part(name, LowRankImportance).choose(view.parameter, job.sparsity or 0.0)


def _holds(module: nn.Module, weight: Tensor) -> bool:
    return any(p is weight for p in module.parameters(recurse=False))
