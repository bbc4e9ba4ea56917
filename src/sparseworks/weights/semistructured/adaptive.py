"""AST (Huang et al. 2024, Pruning Large Language Models with Semi-Structural Adaptive Sparse
Training, arXiv:2407.20584).

A trained model goes on training with W = theta * M, straight through, while pruned weights are
pulled to 0 inside Adam by a strength that ramps up, so that masks settle slowly:

    e <- b1 e + (1 - b1) g                      g = dL/dW, of the loss alone
    u <- e + lambda_t (1 - M) * theta           lambda_t from 0 to lambda over `ramp`
    v <- b2 v + (1 - b2) u^2                    of u, not of g
    theta <- theta - lr / (1 - b1^t) u / (sqrt(v / (1 - b2^t)) + eps)

v of u and not of g makes steps longer than Adam's at the same lr, by sqrt((1 + b1) / (1 - b1)) (4.4
at b1 = 0.9) where gradients are noise, and by 1 / (1 - b1) at first: lower lr and warm up.

M is chosen again every `every` steps. The loss is 1/3 cross-entropy + 2/3 T^2 KL to the dense
model, T = 2 (`training.distilling`).

`term="gradient"` is what the authors' 7B code does: lambda_t (1 - M) * theta is added to g before
Adam, as in SR-STE. Their GPT-2 code keeps M as int32, whose ~M is -1 or -2, so that its decay
pushes every weight outwards; here it is 1 - M.

In our quick setting (claim 043: a byte decoder of width 64 at 1:4, 100 steps) AST is 0.05 nats
below SR-STE in Adam, the teacher takes 0.08 more, the side branch of "slorb" 0.03 more; with a
teacher the moving mask is 0.02 below a fixed one (0.01 to 0.04).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.registry import MethodInfo
from sparseworks.training.adam import adam_step, check_adam
from sparseworks.training.straight_through import AtIntervals, masked_part
from sparseworks.training.swapping import StraightThroughRun
from sparseworks.weights.dynamic.masks import check_fraction, span

__all__ = ["AST"]


@dataclass(frozen=True, kw_only=True)
class AST(AtIntervals):
    """Retrain a trained model to N:M with masks that settle under a growing decay.

    Args:
        decay: lambda. It acts where lambda mean|theta| is near the root mean square of the
            gradients: 1e-4 for the paper's long trainings, 1e-2 for a few hundred steps.
        ramp: share of the training over which the decay rises.
        term: where the decay enters, "adam" or "gradient" (then any optimizer will do).
    """

    decay: float = 1e-4
    ramp: float = 0.25
    term: Literal["adam", "gradient"] = "adam"

    recovery: ClassVar[Mapping[str, float]] = {"task": 1 / 3, "kl": 2 / 3, "temperature": 2.0}
    info: ClassVar[MethodInfo] = MethodInfo(
        name="ast",
        title="Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
        authors="Huang et al.",
        year=2024,
        card="043",
        room="weights",
        command="sparseworks train MODEL --data DATA --method ast --optimizer adamw --out OUT",
        kind="hooked",
        needs=("training",),
        pattern="2:4 (any N:M; others by budget)",
        budget="that of N:M",
        cost="one selection per tensor every `every` steps; a forward of the teacher",
        summary="N:M masks that settle under a decay inside Adam; with distillation",
    )

    def __post_init__(self) -> None:
        check_fraction("ast", ramp=self.ramp)
        if not self.decay >= 0 or self.every < 1 or self.term not in ("adam", "gradient"):
            raise InvalidArgument(
                f"ast: decay={self.decay} must be at least 0, every={self.every} at least 1, "
                f"term={self.term!r} 'adam' or 'gradient'"
            )

    @property
    def has_rule(self) -> bool:  # type: ignore[override]
        return self.term == "adam"

    def begin(self, run: StraightThroughRun) -> None:
        self.strength(run)
        if self.has_rule:
            check_adam("ast", run.optimizers)
        run.choose()

    def strength(self, run: StraightThroughRun) -> float:
        """lambda_t of the next step."""
        _, steps = span(run, 0.0, self.ramp)
        return self.decay * (min(1.0, run.step / steps) if steps else 1.0)

    def add(
        self,
        run: StraightThroughRun,
        name: str,
        weight: Tensor,
        mask: Tensor,
        gradient: Tensor,
        scale: float,
    ) -> None:
        gradient.add_(masked_part(weight, mask), alpha=self.strength(run) * scale)

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
        pull = masked_part(weight, mask).mul_(self.strength(run))
        adam_step(weight, gradient, state, group, pull.add_)
