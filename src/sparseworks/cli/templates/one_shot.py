"""own-method: what it does, in a line; then the equation and where it is from.

    score_ij = |w_ij| / (mean_j |w_ij|)^balance

Higher scores are kept. With balance = 1 rows of small weights lose no more than rows of large ones.

    sparseworks prune MODEL --plugin own_method.py --method own-method --sparsity 0.5 --out OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.weights.oneshot.base import OneShot, Target


@sw.register
@dataclass(frozen=True)
class OwnMethod(OneShot):
    """Keep the weights that are largest within their row.

    Args:
        balance: 0, plain magnitude; 1, all rows count alike.
    """

    balance: float = 1.0

    info: ClassVar[sw.MethodInfo] = sw.MethodInfo(
        name="own-method",
        title="The title of the paper, or of your idea",
        authors="-",
        year=2026,
        room="own",
        kind="one-shot",
        cost="none",
        summary="|w| over the mean of its row",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.balance <= 1.0:
            raise InvalidArgument(f"own-method: balance={self.balance} must be in [0, 1]")

    # To see the inputs of a layer: `collector = InputNorm` (from sparseworks.core.evidence) in the
    # class, `needs=("data",)` in its info; `evidence.norm` is then [groups, in].
    def score(self, target: Target, weight: Tensor, evidence: Any) -> Tensor:
        """Scores of the shape of `weight`, [groups, out, in], fp32; higher = keep."""
        size = weight.abs()
        row = size.mean(2, keepdim=True).clamp_min(1e-12)
        return size / row**self.balance
