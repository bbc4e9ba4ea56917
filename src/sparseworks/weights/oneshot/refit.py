"""Recovery after any mask: least-squares re-fit of the kept weights of every row.

For each row w with kept set S: min_v (v - w) H (v - w)^T with v = 0 outside S, so H_SS v_S =
(H w)_S. All rows are solved together by conjugate gradients on the masked system with the diagonal
of H as preconditioner: one product [out, in] x [in, in] an iteration, no factorisation per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["refit_rows"]


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
