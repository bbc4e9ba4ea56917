"""Wanda (Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models).

score_ij = |W_ij| * ||X_j||_2, compared inside each output row; weights are not updated. A few
input features of large models have huge norms, which |W| alone ignores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import InputNorm
from sparseworks.core.patterns import Pattern, Unstructured
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.base import OneShot, Target


@dataclass(frozen=True)
class Wanda(OneShot):
    """Keep the weights whose product with the norm of their input is largest.

    Args:
        rows: "equal": every row keeps the same number; "alpha": the paper's variant in which each
            row drops its lowest scores up to a share alpha of its sum, one alpha per tensor.
        propagate: calibrate a block on the outputs of the "pruned" blocks before it, or "dense".
    """

    rows: Literal["equal", "alpha"] = "equal"
    propagate: Literal["pruned", "dense"] = "pruned"

    pattern: str | Pattern = field(default="row", kw_only=True)
    collector = InputNorm
    info: ClassVar[MethodInfo] = MethodInfo(
        name="wanda",
        title="A Simple and Effective Pruning Approach for Large Language Models",
        authors="Sun et al.",
        year=2023,
        card="a01",
        room="weights",
        kind="one-shot",
        needs=("data",),
        pattern="row (any)",
        cost="two forward passes over the calibration data",
        summary="|w| times the norm of its input, per output row",
    )

    def __post_init__(self) -> None:
        if self.rows not in ("equal", "alpha"):
            raise InvalidArgument(f"wanda: rows={self.rows!r}; 'equal' or 'alpha'")
        if self.propagate not in ("pruned", "dense"):
            raise InvalidArgument(f"wanda: propagate={self.propagate!r}; 'pruned' or 'dense'")

    def by_rows(self) -> bool:
        return type(self) is Wanda and self.rows == "equal"

    def score(self, target: Target, weight: Tensor, evidence: InputNorm) -> Tensor:
        norm = evidence.norm.clone()
        for group in evidence.unseen_groups():
            norm[group] = 1.0  # an expert that no token reached: fall back to magnitude
        return weight.abs() * norm[:, None, :]

    def select(self, target: Target, scores: Tensor) -> Tensor:
        if self.rows == "alpha" and isinstance(target.pattern, Unstructured):
            return _select_by_alpha(scores, target.keep)
        return super().select(target, scores)


def _select_by_alpha(scores: Tensor, keep: int) -> Tensor:
    """Drop in each row the longest ascending prefix whose sum is <= alpha * row sum.

    alpha in [0, 0.8] is bisected until the sparsity is within 1e-3 of what is asked.
    """
    values = scores.clamp_min(0.0)
    ordered, order = torch.sort(values, dim=1, stable=True)
    share = ordered.double().cumsum(1)
    total = share[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    share = share / total
    wanted = 1.0 - keep / scores.numel()
    low, high, alpha = 0.0, 0.8, 0.4
    dropped = share <= alpha
    while high - low >= 1e-3:
        dropped = share <= alpha
        sparsity = float(dropped.sum()) / scores.numel()
        if abs(sparsity - wanted) <= 1e-3:
            break
        low, high = (alpha, high) if sparsity < wanted else (low, alpha)
        alpha = (low + high) / 2
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, order, ~dropped)
    return mask & ~torch.isneginf(scores)
