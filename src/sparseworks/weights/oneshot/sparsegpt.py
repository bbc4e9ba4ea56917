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
    prepare_hessian,
    row_grid,
    upper_factor,
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
        weights, masks = [], []
        loss, whole = 0.0, 0.0
        share = target.keep // groups
        for group in range(groups):
            part = weight[group * rows : (group + 1) * rows]
            known, all_of_it = _factored(evidence, group, part, self.damping)
            whole += all_of_it
            allowed = target.allowed
            new, mask, cost = column_solve(
                torch.where(known.dead[None, :], 0.0, part),
                known.factor,
                target.pattern,
                share + (1 if group < target.keep - share * groups else 0),
                allowed=None if allowed is None else allowed[group * rows : (group + 1) * rows],
                block=self.block,
                quantize=None if self.bits is None else row_grid(part, self.bits),
                overwrite=True,
            )
            weights.append(new)
            masks.append(mask)
            loss += cost
        error = loss / whole if whole > 0 else 0.0
        if groups == 1:
            return Solution(weights[0], masks[0], error)
        return Solution(torch.cat(weights), torch.cat(masks), error)


@dataclass(frozen=True)
class _Factored:
    """A damped Hessian, factored.

    Attributes:
        factor: R of `upper_factor`.
        dead: inputs that are always zero.
        added: to every entry of the diagonal.
        blind: there was nothing to go by, and H is the identity.
    """

    factor: Tensor
    dead: Tensor
    added: float
    blind: bool


def _factored(
    evidence: Hessian, group: int, weight: Tensor, damping: float
) -> tuple[_Factored, float]:
    """The factored Hessian of a group, once for all weights that share it, and 1/2 tr(W H W^T).

    That loss of a weight without its outputs is known from the outputs where calibration saw them;
    else it takes as many multiply-adds as the solver.
    """
    key, kept, power = ("factored", group, damping), evidence.kept, evidence.power
    known = None if kept is None else kept.get(key)
    assert known is None or isinstance(known, _Factored)
    loss = None
    if known is None or known.blind or power is None:
        hessian = evidence.hessian(group)
        blind = group in evidence.unseen_groups()
        if blind or float(hessian.diagonal().mean()) < _VANISHING:
            blind, hessian = True, torch.eye(hessian.shape[0], device=hessian.device)
        diagonal = hessian.diagonal().clone()
        hessian, dead = prepare_hessian(hessian, damping, overwrite=True)
        if power is None or blind:
            loss = energy(weight, hessian)
        if known is None:
            added = damping * float(diagonal.masked_fill_(dead, 1.0).mean())
            known = _Factored(upper_factor(hessian, overwrite=True), dead, added, blind)
            if kept is not None:
                kept[key] = known
    if loss is None:
        assert power is not None
        idle = weight[:, known.dead].square().sum() / 2
        damped = known.added * torch.linalg.vector_norm(weight).square() / 2
        loss = float(power[group] / evidence.samples + damped + idle)
    return known, loss
