"""own-method: what it does, in a line; then the equation and where it is from.

    score_g = sum over all slices of the group g of |w|^power

A group is what can only be cut together: a channel with its batch norm and the inputs that read it.
Higher scores are kept.

    sparseworks slim MODEL --plugin own_method.py --method own-method --flops 0.5 --out OUT
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.base import GroupScore, Scores


@sw.register
@dataclass(frozen=True)
class OwnMethod(GroupScore):
    """Cut the groups whose weights are smallest.

    Args:
        power: of |w|, above 0.
    """

    power: float = 1.0

    info: ClassVar[sw.MethodInfo] = sw.MethodInfo(
        name="own-method",
        title="The title of the paper, or of your idea",
        authors="-",
        year=2026,
        room="own",
        kind="structured",
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="none",
        summary="cut the groups with the smallest sum of |w|",
    )

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise InvalidArgument(f"own-method: power={self.power} must be above 0")

    # A score that needs batches: `needs=("data",)` in the info; `data` are then those of the call.
    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        """One number per group, by group number; the model stays as it is."""
        scores = np.zeros(coupling.count)
        parameters = dict(model.named_parameters())
        for (name, axis), groups in coupling.axes.items():  # groups[i]: of index i of this axis
            if name in parameters:
                weight = parameters[name].detach().double().abs() ** self.power
                sums = weight.movedim(axis, 0).reshape(len(groups), -1).sum(1)
                np.add.at(scores, groups, sums.cpu().numpy())
        return scores
