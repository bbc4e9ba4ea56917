"""own-method: what it does, in a line; then the equation and where it is from.

    z = w * m,   m = the largest scores s of a tensor,   dL/ds := dL/dz * w

Every weight gets a score that trains with it; the mask is passed straight through. Scores start as
|w|.

    sparseworks train MODEL --plugin own_method.py --method own-method --sparsity 0.9 \\
        --data DATA --out OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import sparseworks as sw
from sparseworks.training.gates import StraightThroughMask
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.dynamic.masks import select_masks


@sw.register
@dataclass(frozen=True, kw_only=True)
class OwnMethod(Transform):
    """Learn which weights to keep, by a score for each.

    Args:
        scale: of the first scores; small ones let the mask move sooner.
    """

    scale: float = 1.0

    info: ClassVar[sw.MethodInfo] = sw.MethodInfo(
        name="own-method",
        title="The title of the paper, or of your idea",
        authors="-",
        year=2026,
        room="own",
        kind="transform",
        needs=("training",),
        cost="a score per weight while it trains",
        summary="a trained score per weight chooses the mask",
    )

    def begin(self, job: Transformed) -> None:
        """Change the model through `job.parametrize`, `job.replace` and `job.freeze` only."""
        for name, view in job.views.items():
            first = view.parameter.detach().abs() * self.scale
            job.parametrize(name, StraightThroughMask(first))
        self.update(job)

    def update(self, job: Transformed) -> None:
        """Without gradients after every optimizer step, `job.step` counted from 1."""
        select_masks(job, self.scores(job), job.sparsity or 0.0)

    def scores(self, job: Transformed) -> dict[str, Tensor]:
        """A matrix [out, in] per tensor, higher = keep."""
        return {
            name: view.matrix(job.part(name, StraightThroughMask).scores.detach()).float()
            for name, view in job.views.items()
        }

    # `penalty(job)` is added to the loss of every step; `finish(job)` may choose other last masks.
