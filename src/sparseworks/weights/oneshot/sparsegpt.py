"""SparseGPT (Frantar & Alistarh 2023, Massive Language Models Can Be Accurately Pruned in
One-Shot).

Per layer min ||W X - W' X||^2 with the zeros of a pattern: score w_ij^2 / U_jj^2 with
H^-1 = U^T U, H = (2/n) X X^T + lambda mean(diag H) I; columns left to right, every removed weight
compensated by the columns after it. Masks are chosen per block of 128 columns from the already
compensated values, all rows together (N:M: every M columns, per row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.evidence import Hessian
from sparseworks.core.registry import MethodInfo
from sparseworks.weights.oneshot.base import OneShot, Solution, Target
from sparseworks.weights.oneshot.obs import (
    column_solve,
    energy,
    inverse_factor,
    prepare_hessian,
    row_grid,
)

_VANISHING = 1e-30  # mean squared inputs below this have lost their digits


@dataclass(frozen=True)
class SparseGPT(OneShot):
    """Prune with second-order compensation of the kept weights.

    Args:
        block: columns whose mask is chosen together.
        damping: lambda, relative to the mean of the Hessian's diagonal.
        bits: also round the kept weights to a grid of 2^bits levels per row, jointly compensated.
        propagate: calibrate a block on the outputs of the "pruned" blocks before it, or "dense".
    """

    block: int = 128
    damping: float = 0.01
    bits: int | None = None
    propagate: Literal["pruned", "dense"] = "pruned"

    collector = Hessian
    info: ClassVar[MethodInfo] = MethodInfo(
        name="sparsegpt",
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        authors="Frantar & Alistarh",
        year=2023,
        card="a02",
        room="weights",
        kind="one-shot",
        needs=("data",),
        pattern="unstructured (row, N:M, block)",
        cost="two forward passes and one Cholesky factorisation a tensor",
        summary="optimal-brain-surgeon pruning with compensation, column by column",
    )

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InvalidArgument(f"sparsegpt: block={self.block} must be at least 1")
        if not self.damping > 0:
            raise InvalidArgument(f"sparsegpt: damping={self.damping} must be positive")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise InvalidArgument(f"sparsegpt: bits={self.bits}; 2 to 8, or None")
        if self.propagate not in ("pruned", "dense"):
            raise InvalidArgument(f"sparsegpt: propagate={self.propagate!r}; 'pruned' or 'dense'")

    def solve(self, target: Target, weight: Tensor, evidence: Hessian) -> Solution:
        groups = target.view.groups
        rows = weight.shape[0] // groups
        unseen = set(evidence.unseen_groups())
        weights, masks = [], []
        loss, whole = 0.0, 0.0
        share = target.keep // groups
        for group in range(groups):
            part = weight[group * rows : (group + 1) * rows]
            gram = evidence.hessian(group)
            vanishing = float(gram.diagonal().mean()) < _VANISHING
            if group in unseen or vanishing:  # nothing to go by: fall back to magnitude
                gram = torch.eye(gram.shape[0], device=gram.device)
            hessian, dead = prepare_hessian(gram, self.damping, overwrite=True)
            whole += energy(part, hessian)
            allowed = target.allowed
            new, mask, cost = column_solve(
                torch.where(dead[None, :], 0.0, part),
                inverse_factor(hessian, overwrite=True),
                target.pattern,
                share + (1 if group < target.keep - share * groups else 0),
                allowed=None if allowed is None else allowed[group * rows : (group + 1) * rows],
                block=self.block,
                quantize=None if self.bits is None else row_grid(part, self.bits),
            )
            weights.append(new)
            masks.append(mask)
            loss += cost
        return Solution(torch.cat(weights), torch.cat(masks), loss / whole if whole > 0 else 0.0)
