"""Node masks: hidden units switched off by zeroing what feeds them and what they feed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import Masks
from sparseworks.core.random import generator_for
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, Family, trace
from sparseworks.models.views import View, find_prunable

__all__ = ["NodeSampler"]


class NodeSampler:
    """Draws random node masks of one size for a model.

    A hidden layer of h nodes keeps max(1, round((1 - s) h)) of them, drawn without replacement. A
    node that goes takes its row of the weight that makes it and its columns of the weights that
    read it, so its output reaches nothing and the network equals the physically smaller one. Inputs
    and outputs of the model are never masked.

    Args:
        model: traced, not changed.
        views: the weights whose output nodes may go.
        example: one batch.
        sparsity: s, the share of nodes that go, in [0, 1).

    Raises:
        ModelError: no layer of these weights has nodes that can go.
    """

    def __init__(
        self, model: nn.Module, views: Sequence[View], example: Batch, sparsity: float
    ) -> None:
        self.coupling: Coupling = trace(model, example)
        self.sparsity = sparsity
        named = {v.name for v in views}
        self.families = [f for f in self.coupling.families if f.exact and _made_by(f, named)]
        if not self.families:
            raise ModelError(
                "no hidden nodes to mask: none of the chosen weights feeds nodes that can be "
                "removed by themselves"
            )
        touched = {name for f in self.families for name, _ in f.axes}
        self._shapes = {
            v.name: tuple(v.parameter.shape)
            for v in find_prunable(model, include="*")
            if v.name in touched
        }

    def kept(self, family: Family) -> int:
        """Nodes of a layer that stay: a legal multiple next to (1 - s) h, at least one."""
        unit = family.multiple
        wanted = round((1 - self.sparsity) * len(family) / unit) * unit
        return min(len(family), max(unit, wanted))

    def draw(self, seed: int, number: int) -> Masks:
        """The masks of the draw with this number."""
        keep = self.coupling.keep_all()
        for family in self.families:
            generator = generator_for(seed, f"nodes {family.index}", number)
            order = torch.randperm(len(family), generator=generator).numpy()
            keep[family.roots[order[self.kept(family) :]]] = False
        found = {}
        for name, shape in self._shapes.items():
            mask = torch.ones(shape, dtype=torch.bool)
            for axis in range(len(shape)):
                labels = self.coupling.axes.get((name, axis))
                if labels is not None:
                    stay = torch.from_numpy(np.ascontiguousarray(keep[labels]))
                    mask &= stay.view([-1 if a == axis else 1 for a in range(len(shape))])
            found[name] = mask
        return Masks.of(found, "random-search")


def _made_by(family: Family, names: set[str]) -> bool:
    """Is one of these weights what makes the nodes (its rows are theirs)?"""
    return any(axis == 0 and name in names for name, axis in family.axes)
