"""Transforms that train linear layers as factors, in place and back.

`Factoring` is their base: it chooses the linear layers, replaces each by the one that the method
makes, and at the end makes ordinary layers of them again. `factored` and `memory_of` find and count
the factored layers of a model, `merge` turns them into dense linear layers at any time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.views import View, view_of
from sparseworks.training.parametrizing import refuse_tied
from sparseworks.training.transforming import Transform, Transformed
from sparseworks.weights.lowrank.layers import Factored, Memory

__all__ = ["Factoring", "factored", "memory_of", "merge", "rank_of"]


def factored(model: nn.Module) -> Iterator[tuple[str, Factored]]:
    """(name, layer) of the factored layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, Factored):
            yield name, module


def memory_of(model: nn.Module) -> Memory:
    """What all factored layers of a model take."""
    total = Memory(0, 0, 0, 0, 0, 0)
    for _, layer in factored(model):
        total = total + layer.memory()
    return total


def merge(model: nn.Module) -> nn.Module:
    """Turn the factored layers of a model into dense linear layers, in place; returns it.

    Raises:
        ModelError: a layer computes no linear map; the model is as it was.
    """
    made = {name: layer.merged() for name, layer in factored(model)}
    if "" in made:
        return made[""]
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def rank_of(rank: float, shape: tuple[int, int]) -> int:
    """A rank as a number: below 1 it is a share of the smaller side."""
    return max(1, int(rank * min(shape))) if rank < 1 else int(rank)


@dataclass(frozen=True, kw_only=True)
class Factoring(Transform):
    """Base of methods that train linear layers as factors.

    Args:
        after: what `finish` leaves: "parts", ordinary linear layers for the factors and, with a
            mask, for the sparse rest; "merged", one dense linear layer each; or "factored", the
            layers as they trained.
    """

    after: str = "parts"

    needs_sparsity: ClassVar[bool] = False
    choices: ClassVar[tuple[str, ...]] = ("parts", "merged", "factored")

    def __post_init__(self) -> None:
        if self.after not in self.choices:
            raise InvalidArgument(
                f"{self.info.name}: after={self.after!r}; use one of {', '.join(self.choices)}"
            )

    @abstractmethod
    def layer(self, job: Transformed, view: View) -> Factored:
        """The factored layer for a linear one."""

    def begin(self, job: Transformed) -> None:
        views = [v for v in job.views.values() if type(v.module) is nn.Linear]
        for name, view in job.views.items():
            if type(view.module) is not nn.Linear:
                job.skipped[name] = "no plain linear layer"
        if not views:
            raise ModelError(
                f"method {self.info.name!r} trains plain linear layers as factors, and "
                f"{type(job.model).__name__} has none that it may take"
            )
        for view in views:
            refuse_tied(job.model, view)
            if not view.parameter.requires_grad:
                raise InvalidArgument(
                    f"{self.info.name}: {view.name} is frozen (requires_grad=False); exclude it"
                )
        job.views = {}  # the weights are no tensors until `finish`
        for view in views:
            made = self.layer(job, view).train(view.module.training)
            job.replace(view.module_name, made)

    def counted(self, job: Transformed) -> tuple[int, int] | None:
        counts = [layer.counted() for _, layer in factored(job.model)]
        return sum(k for k, _ in counts), sum(n for _, n in counts)

    def finish(self, job: Transformed) -> None:
        for name, layer in list(factored(job.model)):
            if self.after == "factored":
                continue
            made: nn.Module
            made, masks = (layer.merged(), {}) if self.after == "merged" else layer.parts()
            job.replace(name, made.train(layer.training))
            for inner, mask in masks.items():
                full = f"{name}.{inner}"
                owner, _, attribute = inner.rpartition(".")
                view: Any = view_of(made.get_submodule(owner), attribute, full)
                job.views[full] = view
                job.set_mask(full, mask)
