"""DASS (Mousavi et al. 2022, DASS: Differentiable Architecture Search for Sparse neural networks).

The architecture parameters alpha of a super-network are ranked by how its operations do when they
are pruned:

    min over alpha of L_val(W* . M*, alpha),  M* = argmin over M of L_train(W . M, alpha),
    W* = argmin over W of L_train(W . M*, alpha).

Three stages, the last two `cycles` times:

1. warm-up: M = 1; steps train W on one half of the data and alpha on the other, in turn;
2. scores: W and alpha rest; M keeps the top of |S|, S = W / max|W| at first, straight through:
   dL/dS = dL/d(W . M) W;
3. sparse: M rests; W on one half and alpha on the other, in turn (first-order DARTS).

The paper is known to us by its abstract and introduction: the objective and the stages are its,
the equations within them are a reconstruction.

In our quick setting (claim 024: three cells, digits, 98 % sparse) the architecture found beats a
random one by 8.3 points, but not the one of a dense search (-0.2 points, -2.6 to 2.2; 1.5 at equal
numbers of weights, -5.8 to 8.8).
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.training.gates import StraightThroughMask
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.masks import check_fraction, select_masks, span

__all__ = ["DASS"]

Turn = Literal["weights", "architecture", "scores"]


@dataclass(frozen=True, kw_only=True)
class DASS(Transform):
    """Search an architecture that does well when sparse.

    The loop asks `job.method.turn(job)` before each step and takes a batch of the second half of
    the data for "architecture", of the first half otherwise. What does not have its turn gets no
    gradient. At the end the model (`SuperNetwork`, say) tells what its alpha chose.

    Args:
        warmup: share of the steps before anything is pruned; 1: a dense search, pruned by
            magnitude at the end.
        scoring: share of a cycle's steps that train scores.
        cycles: how often the masks are chosen again.
        architecture: name pattern of the architecture parameters.
    """

    warmup: float = 0.5
    scoring: float = 0.3
    cycles: int = 1
    architecture: str = "*alpha*"

    info: ClassVar[MethodInfo] = MethodInfo(
        name="dass",
        title="DASS: Differentiable Architecture Search for Sparse neural networks",
        authors="Mousavi et al.",
        year=2022,
        card="024",
        room="weights",
        kind="transform",
        needs=("training",),
        budget="uniform",
        cost="a super-network; in the score stage one selection per tensor and step",
        summary="architecture search whose operations are compared with their weights pruned",
    )

    def __post_init__(self) -> None:
        check_fraction("dass", warmup=self.warmup, scoring=self.scoring)
        if self.cycles < 1:
            raise InvalidArgument(f"dass: cycles={self.cycles} must be at least 1")

    def begin(self, job: Transformed) -> None:
        span(job, 0.0, 1.0)
        if not self._alphas(job.model):
            raise ModelError(
                f"dass: {type(job.model).__name__} has no parameter named {self.architecture!r}; "
                "give `architecture`, the name pattern of its architecture parameters"
            )
        for name, weight in job.parameters.items():
            job.parametrize(name, StraightThroughMask(_relative(weight)))
        if self.turn(job) == "scores":  # no warm-up
            self._choose(job)

    def attached(self, job: Transformed) -> None:
        self._take_turns(job)  # not before: an optimizer is built of what takes gradients

    def turn(self, job: Transformed) -> Turn:
        """What the next step trains."""
        return self._turn(job, job.step)

    def update(self, job: Transformed) -> None:
        done, following = self._turn(job, job.step - 1), self.turn(job)
        if following == "scores" and done != "scores":
            self._from_weights(job)
        if "scores" in (done, following):
            self._choose(job)
        self._take_turns(job)

    def load_state_dict(self, job: Transformed, state: Any) -> None:
        self._take_turns(job)

    def finish(self, job: Transformed) -> None:
        if job.step <= self._stages(job)[0]:  # never pruned: by magnitude now
            self._from_weights(job)
            self._choose(job)

    def _from_weights(self, job: Transformed) -> None:
        """Scores start at W / max|W|, with fresh optimizer state."""
        for name, view in job.views.items():
            scores = job.part(name).get_parameter("scores")
            scores.copy_(_relative(view.parameter))
            if job.optimizer is not None:
                job.optimizer.state.pop(scores, None)

    def _stages(self, job: Transformed) -> tuple[int, int, int]:
        """Steps of the warm-up, of one cycle, and of the scores in it."""
        warm, steps = span(job, self.warmup, 1.0)
        cycle = -(-(steps - warm) // self.cycles)
        return warm, cycle, round(self.scoring * cycle)

    def _turn(self, job: Transformed, step: int) -> Turn:
        warm, cycle, scoring = self._stages(job)
        step = min(step, (job.steps or 1) - 1)  # the last cycle goes on, no new one begins
        if step >= warm and cycle and (step - warm) % cycle < scoring:
            return "scores"
        return "architecture" if step % 2 else "weights"

    def _choose(self, job: Transformed) -> None:
        scores = {
            n: v.matrix(job.part(n).get_parameter("scores").detach()).float().abs()
            for n, v in job.views.items()
        }
        select_masks(job, scores, job.sparsity or 0.0)

    def _alphas(self, model: nn.Module) -> list[nn.Parameter]:
        named = model.named_parameters()
        return [p for n, p in named if fnmatch.fnmatchcase(n, self.architecture)]

    def _take_turns(self, job: Transformed) -> None:
        """Only what the next step trains takes gradients."""
        turn = self.turn(job)
        job.train_only("parts" if turn == "scores" else "model")
        if turn == "scores":
            return
        alphas = {id(p) for p in self._alphas(job.model)}
        for parameter in job.model.parameters():
            if (id(parameter) in alphas) != (turn == "architecture"):
                parameter.requires_grad_(False)
                parameter.grad = None  # a zero gradient would still decay and move by momentum


@torch.no_grad()
def _relative(weight: Tensor) -> Tensor:
    return weight / weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
