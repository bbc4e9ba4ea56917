"""Batch-norm scales gamma by coupled group: what they are, what presses on them, what they mark.

A group of a residual stream holds one scale in every batch norm that feeds the stream; pressing,
ranking and cutting treat these as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, Family
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.checking import check
from sparseworks.weights.structured.cutting import cut
from sparseworks.weights.structured.folding import fold
from sparseworks.weights.structured.selection import under

__all__ = ["Scales", "agreed", "cut_folded", "find_scales", "press"]

Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class Scales:
    """The scales of one family of groups.

    Args:
        family: its groups.
        entries: gamma of every batch norm of the family, by parameter name, with the position in
            the family of each of its entries (-1: an entry of none of its groups).
    """

    family: Family
    entries: Mapping[str, tuple[nn.Parameter, Tensor]]

    def table(self) -> Tensor:
        """|gamma|, `[batch norms, groups]` fp64; NaN where a batch norm holds none of a group."""
        rows = []
        for gamma, index in self.entries.values():
            row = torch.full((len(self.family),), float("nan"), dtype=torch.float64)
            inside = index >= 0
            row[index[inside]] = gamma.detach().abs().double().cpu()[inside]
            rows.append(row)
        return torch.stack(rows)

    def mean(self) -> Tensor:
        """Mean |gamma| of every group, `[groups]`."""
        return self.table().nanmean(0)

    def largest(self) -> Tensor:
        """Largest |gamma| of every group, `[groups]`; under a threshold: so in every norm."""
        return self.table().nan_to_num(0.0).amax(0)


def find_scales(
    model: nn.Module, coupling: Coupling, exclude: Sequence[str] = ()
) -> tuple[Scales, ...]:
    """The families whose groups all hold batch-norm scales, apart from excluded names.

    Raises:
        ModelError: there is none.
    """
    gammas = {
        f"{n}.weight" if n else "weight": m.weight
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
    }
    found = []
    for family in coupling.families:
        names = [n for n, _ in family.axes]
        if len(family) < 2 or any(under(n, p) for n in names for p in exclude):
            continue
        order = {int(r): i for i, r in enumerate(family.roots)}
        entries = {}
        for name in names:
            if name in gammas:
                index = [order.get(int(r), -1) for r in coupling.axes[name, 0]]
                entries[name] = (gammas[name], torch.tensor(index))
        if entries:
            found.append(Scales(family, entries))
    if not found:
        raise ModelError(
            f"{type(model).__name__}: no channels under a batch norm with scales that may be cut"
        )
    return tuple(found)


def agreed(wishes: Tensor, there: Tensor) -> Tensor:
    """Groups that several batch norms give up together, bool `[groups]`; one stays at least.

    With V_c the norms that give up group c (those that do not hold it, too), the groups with
    V_c >= i go, i falling from the number of norms until as many go as the norm with the fewest
    wishes gives up by itself.

    Args:
        wishes: what each norm by itself would give up, bool `[norms, groups]`.
        there: groups that each norm holds, of the same shape.
    """
    votes = (wishes | ~there).sum(0)
    goal = int((wishes & there).sum(1).min())
    counts = [int((votes >= i).sum()) for i in range(len(wishes), 0, -1)]
    fewest = next((i for i, n in zip(range(len(wishes), 0, -1), counts) if n >= goal), 1)
    gone = votes >= fewest
    if bool(gone.all()):
        gone[int(votes.argmin())] = False
    return gone


@torch.no_grad()
def press(
    scales: Sequence[Scales], strength: float, on: Keep | None = None, near: float = 0.0
) -> None:
    """Add the slope of strength * sum |gamma| to the gradients, of the groups `on` (None: all).

    Args:
        scales: of the families to press on.
        strength: s.
        on: True for group numbers that are pressed.
        near: below this |gamma| the slope is that of s gamma^2 / 2 instead, which does not
            oscillate round zero.
    """
    for family in scales:
        pressed = None if on is None else torch.as_tensor(on[family.family.roots])
        for gamma, index in family.entries.values():
            slope = torch.where(gamma.abs() < near, gamma, gamma.sign()) if near else gamma.sign()
            inside = index >= 0
            if pressed is not None:
                inside = inside & pressed[index.clamp_min(0)]
            slope = strength * slope * inside.to(gamma)
            gamma.grad = slope if gamma.grad is None else gamma.grad.add_(slope)


def cut_folded(
    model: nn.Module, example: Batch, coupling: Coupling, keep: Keep, data: Sequence[Batch]
) -> None:
    """Cut in place; what cut channels say on average over `data` goes into the next layer."""
    check(model, example, coupling, keep)
    backup = Backup()
    try:
        if data:
            fold(model, coupling, keep, data, backup)
        cut(model, coupling, keep, backup)
    except BaseException:
        backup.restore()
        raise
