"""Recovery after any mask: least-squares re-fit of the kept weights of every row.

For each row w with kept set S: min_v (v - w) H (v - w)^T with v = 0 outside S, so H_SS v_S =
(H w)_S. All rows are solved together by conjugate gradients on the masked system with the diagonal
of H as preconditioner: one product [out, in] x [in, in] an iteration, no factorisation per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparseworks.core.evidence import Hessian
from sparseworks.core.patterns import Pattern
from sparseworks.weights.oneshot.base import Solution, Target
from sparseworks.weights.oneshot.obs import prepare_hessian

__all__ = ["Refit", "refit_rows"]


@dataclass(frozen=True)
class Refit:
    """`recovery="refit"`.

    Args:
        damping: of the Hessian, relative to the mean of its diagonal.
    """

    damping: float = 0.01

    evidence: ClassVar[type[Hessian]] = Hessian

    def check(self, pattern: Pattern) -> None:
        """Any mask will do."""

    def recover(self, target: Target, dense: Tensor, solution: Solution, seen: Hessian) -> Solution:
        groups = target.view.groups
        rows = dense.shape[0] // groups
        parts = []
        change = energy = 0.0
        for group in range(groups):
            part = slice(group * rows, (group + 1) * rows)
            hessian, _ = prepare_hessian(seen.hessian(group), self.damping)
            new = refit_rows(dense[part], solution.mask[part], hessian, start=solution.weight[part])
            delta = new - dense[part]
            change += float(((delta @ hessian) * delta).sum())
            energy += float(((dense[part] @ hessian) * dense[part]).sum())
            parts.append(new)
        error = change / energy if energy > 0 else 0.0
        return replace(solution, weight=torch.cat(parts), error=error)


@torch.no_grad()
def refit_rows(
    dense: Tensor,
    mask: Tensor,
    hessian: Tensor,
    *,
    start: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-5,
) -> Tensor:
    """The weights on a given mask that come closest to the dense layer's outputs.

    Args:
        dense: `[out, in]` fp32, the weights to imitate.
        mask: `[out, in]` bool, True = kept.
        hessian: `[in, in]` fp32, positive definite (damped).
        start: first guess, zero outside the mask; the masked dense weights when None.
        iterations: at most; stops when every row's residual fell by `tolerance`.

    Returns:
        `[out, in]` fp32, exactly 0 outside the mask, never worse than `start`.
    """
    keep = mask.to(dense.dtype)
    solution = (dense if start is None else start) * keep
    residual = ((dense - solution) @ hessian) * keep
    scale = keep / hessian.diagonal()[None, :]
    step = residual * scale
    direction = step.clone()
    flow = (residual * step).sum(1, keepdim=True)
    goal = (tolerance**2) * (((dense @ hessian) * keep).square() * scale).sum(1, keepdim=True)
    for _ in range(iterations):
        open_rows = flow > goal
        if not bool(open_rows.any()):
            break
        image = (direction @ hessian) * keep
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(open_rows & (curvature > 0), flow / curvature, 0.0)
        solution += length * direction
        residual -= length * image
        step = residual * scale
        new_flow = (residual * step).sum(1, keepdim=True)
        direction = step + torch.where(flow > 0, new_flow / flow, 0.0) * direction
        flow = new_flow
    return solution
