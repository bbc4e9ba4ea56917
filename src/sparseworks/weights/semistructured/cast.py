"""CAST (Huang et al. 2025, CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware
Training for Large Language Models, arXiv:2509.25996).

The layers compute with all of theta and true gradients; there is no mask in the forward pass. In
every group the n largest |theta| win, and while the training goes on (a = t / T, t = 0 .. T - 1)
the losers follow the loss less and less and an L1 pull more and more, so that the projection at the
end costs next to nothing. AdamS, with M chosen again at the top of every `every`-th step:

    mu  <- b1 mu + (1 - b1) g
    mu~ = (1 - a) mu + a lambda sign(theta)  where M = 0,   mu where M = 1
    v   <- b2 v + (1 - b2) mu~^2
    theta <- theta - lr / (1 - b1^t) mu~ / (sqrt(v / (1 - b2^t)) + eps)

A late loser moves by about lr a step whatever lambda is, so sum(lr_t a_t) must exceed the typical
loser, and lr must fall to leave it near 0. Weights are scaled, W = theta * A, with a learned factor
for each row of each of `blocks` equal parts of the columns, folded in at the end. The loss is 2/3
cross-entropy + 1/3 KL to the dense model (`training.distilling`).

There is no released code; AdamS is checked against the paper's Algorithm 1 as a public
reimplementation quotes it, the layout of A (contiguous blocks of columns) is a reading of it.

In our quick setting (claim 077: a byte decoder of width 64, 120 steps) the projection changes the
loss by less than 0.0001 nats and losers end at 0.00015 of the winners, but at 1:4 a fixed mask with
a teacher is 0.03 nats better (0.02 to 0.04).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, PatternError
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.training.adam import adam_step, check_adam
from sparseworks.training.delegated import Delegated
from sparseworks.training.hooked import Run
from sparseworks.training.optimizers import Optimizers
from sparseworks.training.straight_through import AtIntervals, masked_part
from sparseworks.training.swapping import StraightThroughRun
from sparseworks.training.transforming import Transformed
from sparseworks.weights.dynamic.masks import span

__all__ = ["CAST", "AdamS", "BlockScale"]


class BlockScale(nn.Module):
    """W = theta * A: a factor for each row of each of `blocks` equal parts of the columns.

    Args:
        rows: outputs, the first axis of the weight.
        blocks: of consecutive columns (channels of a convolution, at all taps).
    """

    def __init__(self, rows: int, blocks: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(rows, blocks))

    def forward(self, weight: Tensor) -> Tensor:
        rows, columns, *taps = weight.shape
        blocks = self.factor.shape[1]
        factor = self.factor.to(weight.dtype).repeat_interleave(columns // blocks, 1)
        return weight * factor.view(rows, columns, *(1 for _ in taps))


@dataclass(frozen=True, kw_only=True)
class AdamS(AtIntervals):
    """The optimizer's rule, on weights that the layers see whole.

    Args:
        decay: lambda.
    """

    decay: float = 1e-2

    has_rule: ClassVar[bool] = True
    info: ClassVar[MethodInfo] = MethodInfo(
        name="cast", title="", authors="", year=2025, room="weights", kind="hooked"
    )

    def begin(self, run: StraightThroughRun) -> None:
        span(run, 0.0, 1.0)
        check_adam("cast", run.optimizers)
        run.choose()

    def used(self, run: StraightThroughRun, name: str, weight: Tensor, mask: Tensor) -> None:
        """All of theta."""

    def rule(
        self,
        run: StraightThroughRun,
        name: str,
        weight: Tensor,
        mask: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
    ) -> None:
        assert run.steps is not None
        a = min(1.0, run.step / run.steps)
        pull = masked_part(weight, mask).sign_().mul_(a * self.decay)

        def faded(momentum: Tensor) -> Tensor:
            return pull.add_(momentum).sub_(masked_part(momentum, mask), alpha=a)

        adam_step(weight, gradient, state, group, faded)


@dataclass(frozen=True, kw_only=True)
class CAST(Delegated):
    """Retrain a trained model densely until its losers are nearly 0, then drop them.

    Needs Adam or AdamW. The model is sparse only after `finish`: before that its metrics are those
    of a dense model.

    Args:
        decay: lambda; it acts at about 10 times the root mean square of the gradients.
        every: steps between choices of the winners.
        blocks: factors of each row; 0: no scaling.
    """

    pattern: str | Pattern = "2:4"
    decay: float = 1e-2
    every: int = 10
    blocks: int = 2

    recovery: ClassVar[Mapping[str, float]] = {"task": 2 / 3, "kl": 1 / 3, "temperature": 1.0}
    info: ClassVar[MethodInfo] = MethodInfo(
        name="cast",
        title="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for "
        "Large Language Models",
        authors="Huang et al.",
        year=2025,
        card="077",
        room="weights",
        command="sparseworks train MODEL --data DATA --method cast --optimizer adamw --out OUT",
        kind="transform",
        needs=("training",),
        pattern="2:4 (any N:M; others by budget)",
        budget="that of N:M",
        cost="a dense training; one selection per tensor every `every` steps; a teacher's forward",
        summary="a dense training that pulls each group's losers to zero inside Adam",
    )

    def __post_init__(self) -> None:
        if not self.decay >= 0 or self.every < 1 or self.blocks < 0:
            raise InvalidArgument(
                f"cast: decay={self.decay} and blocks={self.blocks} must be at least 0, "
                f"every={self.every} at least 1"
            )

    def begin(self, job: Transformed) -> None:
        span(job, 0.0, 1.0)
        for name, view in job.views.items():
            parameter = view.parameter
            if not self.blocks:
                continue
            if view.layout not in ("linear", "conv") or parameter.shape[1] % self.blocks:
                raise PatternError(
                    f"cast: {name} is {view.layout} of {list(parameter.shape)}; factors need a "
                    f"linear layer or a convolution whose inputs {self.blocks} blocks divide; "
                    "exclude it, or set blocks=0"
                )
            job.parametrize(name, BlockScale(len(parameter), self.blocks).to(parameter.device))

    def start(self, job: Transformed) -> Run:
        assert job.optimizer is not None
        run = StraightThroughRun(
            job.model,
            Optimizers(job.optimizer),
            AdamS(decay=self.decay, every=self.every),
            [replace(v, name=self.name_of(job, n)) for n, v in job.views.items()],
            sparsity=job.sparsity,
            steps=job.steps,
            pattern=job.pattern,
            budget=job.budget,
            seed=job.seed,
        )
        run.start()
        return run

    def name_of(self, job: Transformed, name: str) -> str:
        """The name of theta in the model now."""
        view = job.views[name]
        if view.attribute in view.module._parameters:
            return name
        return f"{view.module_name}.parametrizations.{view.attribute}.original".lstrip(".")

    def finish(self, job: Transformed) -> None:
        self.update(job)
        self.run_of(job).remove()
