"""AlphaPruning (Lu et al. 2024, AlphaPruning: Using Heavy-Tailed Self Regularization Theory for
Improved Layer-wise Pruning of Large Language Models, arXiv 2410.10912): blocks whose spectra have
heavier tails, which are better trained, keep more.

For a matrix with eigenvalues l_1 <= .. <= l_n of W^T W, the exponent of the tail by Hill's
estimator over the largest k = n / 2 is

    alpha = 1 + k / sum_{i=1}^{k} ln(l_{n-i+1} / l_{n-k}).

With alpha_b the mean over the matrices of block b, the block's sparsity is

    s_b = eta ((alpha_b - min) / (max - min) 2 tau + 1 - tau),

eta such that the whole sparsity is s; a block never exceeds 1. No data are needed. The paper tunes
tau between 0.1 and 0.5 per model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.core.allocation import Sizes, rescaled
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import count_dropped
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.sensitivity import Blocks, Measured, Sensitivity
from sparseworks.weights.oneshot.wanda import Wanda

__all__ = ["AlphaPruning", "HeavyTails", "hill_alpha"]


def hill_alpha(eigenvalues: Tensor, share: float = 0.5) -> float:
    """Exponent of a power-law tail, 1 + k / sum ln(l_i / l_{n-k}) over the k = share n largest.

    Args:
        eigenvalues: `[n]`, at least 0, any order; zeros are left out.

    Returns:
        inf where the k largest are all alike, or fewer than two are above 0.
    """
    values = eigenvalues.double().flatten()
    values = values[values > values.max() * 1e-12].sort().values if values.numel() else values
    n = values.numel()
    k = min(n - 1, max(1, int(n * share)))
    if n < 2:
        return float("inf")
    total = float((values[n - k :] / values[n - k - 1]).log().sum())
    return 1.0 + k / total if total > 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class HeavyTails(Sensitivity):
    """The budget of AlphaPruning; its sensitivity is -alpha.

    Args:
        tau: half of the range of relative sparsities.
        tail: share of the eigenvalues that are the tail.
    """

    tau: float = 0.3
    tail: float = 0.5

    name: ClassVar[str] = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.tau < 1 and 0 < self.tail < 1):
            raise InvalidArgument("budget alpha: tau= in [0, 1), tail= in (0, 1)")

    @torch.no_grad()
    def measure(self, on: Measured, blocks: Blocks) -> dict[str, float]:
        found = {}
        for block, several in blocks.items():
            alphas = [
                hill_alpha(torch.linalg.svdvals(m.float()).square(), self.tail)
                for view in several
                for m in view.matrix().view(view.groups, -1, view.shape[1])
            ]
            alphas = [a for a in alphas if a != float("inf")]  # too small to have a tail
            if alphas:
                found[block] = -sum(alphas) / len(alphas)
        mean = sum(found.values()) / len(found) if found else 0.0
        return {block: found.get(block, mean) for block in blocks}

    def keep(
        self, sensitivity: Mapping[str, float], sizes: Sizes, sparsity: float
    ) -> Mapping[str, float]:
        alpha = {g: -sensitivity[g] for g in sizes}
        low, high = min(alpha.values()), max(alpha.values())
        scale = 2 * self.tau / (high - low) if high > low else 0.0
        relative = {g: scale * (alpha[g] - low) + 1 - self.tau for g in sizes}
        total = sum(sizes.values())
        dropped = rescaled(relative, sizes, count_dropped(total, sparsity))
        return {g: sizes[g] - dropped[g] for g in sizes}


@dataclass(frozen=True)
class AlphaPruning(Wanda):
    """Wanda with the sparsity of every block by the tails of its weights' spectra.

    The budget's own options are said with it: `budget="alpha:tau=0.2"`.
    """

    budget: str | Mapping[str, float] | Budget = field(default="alpha", kw_only=True)

    info: ClassVar[MethodInfo] = MethodInfo(
        name="alpha-pruning",
        title="AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise "
        "Pruning of Large Language Models",
        authors="Lu et al.",
        year=2024,
        room="weights",
        kind="one-shot",
        needs=("data",),
        pattern="row (any that takes densities)",
        budget="alpha",
        cost="two forward passes and the singular values of every matrix",
        summary="Wanda; blocks with heavier tails in their spectra keep more",
    )
