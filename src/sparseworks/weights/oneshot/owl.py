"""OWL (Yin et al. 2023, Outlier Weighed Layerwise Sparsity: A Missing Secret Sauce for Pruning LLMs
to High Sparsity, arXiv 2310.05175): blocks with more outliers keep more.

With A_ij = |W_ij| * ||X_j||_2 over all weights of block l, the outlier ratio is

    D_l = share of entries with A_ij > M * mean(A),

and the density of the block is r_l - mean(r) + (1 - s), r_l = 2 lambda (D_l - min D) / (max D -
min D): densities span 2 lambda and their mean over the weights is that of the whole. The paper says
[s - lambda, s + lambda]; its code spans 2 lambda round the mean, as here. Where a density would
leave [0, 1] all the others move together.

In our quick setting (claim 183: a 6M-parameter Llama at 68.75 %) fewer than 0.5 % of the scores
are outliers, and the budget per block loses to uniform sparsity (0.13 nats, 0.04 to 0.21); ratios
per matrix (`per="tensor"`) beat it (0.024, 0.009 to 0.040).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from sparseworks.core.allocation import Sizes, shifted
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import InputNorm
from sparseworks.core.registry import MethodInfo, Need
from sparseworks.models.calibration import collect
from sparseworks.weights.oneshot.sensitivity import Blocks, Measured, Sensitivity
from sparseworks.weights.oneshot.wanda import Wanda

__all__ = ["OWL", "OutlierRatios"]


@dataclass(frozen=True, kw_only=True)
class OutlierRatios(Sensitivity):
    """The budget of OWL.

    Args:
        outliers: M, how many times the mean an outlier is.
        spread: lambda, half of what densities span.
    """

    outliers: float = 5.0
    spread: float = 0.08

    name: ClassVar[str] = "owl"
    needs: ClassVar[tuple[Need, ...]] = ("data",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.outliers > 0 and 0 <= self.spread < 1):
            raise InvalidArgument("budget owl: outliers= above 0, spread= in [0, 1)")

    @torch.no_grad()
    def measure(self, on: Measured, blocks: Blocks) -> dict[str, float]:
        assert on.calibration is not None
        views = [v for several in blocks.values() for v in several]
        seen = collect(
            on.model, views, on.calibration, lambda v, d: [InputNorm(v.groups, v.shape[1], d)]
        )
        found = {}
        for block, several in blocks.items():
            scores = []
            for view in several:
                (norm,) = seen[view.name]
                assert isinstance(norm, InputNorm)
                weight = view.matrix().float().abs().view(view.groups, -1, view.shape[1])
                scores.append((weight * norm.norm[:, None, :]).flatten())
            size = sum(s.numel() for s in scores)
            edge = self.outliers * sum(float(s.sum(dtype=torch.float64)) for s in scores) / size
            found[block] = sum(int((s > edge).sum()) for s in scores) / size
        return found

    def keep(
        self, sensitivity: Mapping[str, float], sizes: Sizes, sparsity: float
    ) -> Mapping[str, float]:
        low, high = min(sensitivity.values()), max(sensitivity.values())
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        return shifted({g: scale * (sensitivity[g] - low) for g in sizes}, sizes, sparsity)


@dataclass(frozen=True)
class OWL(Wanda):
    """Wanda with the sparsity of every block by its share of outliers.

    The budget's own options are said with it: `budget="owl:outliers=7,spread=0.1"`.
    """

    budget: str | Mapping[str, float] | Budget = field(default="owl", kw_only=True)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="owl",
        title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs "
        "to High Sparsity",
        authors="Yin et al.",
        year=2023,
        room="weights",
        kind="one-shot",
        needs=("data",),
        pattern="row (any that takes densities)",
        budget="owl",
        cost="three forward passes over the calibration data",
        summary="Wanda; blocks with more outliers among their scores keep more",
    )
