"""How a model multiplies by parameters that no layer owns: seen in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sparseworks.models.calls import Batch, call, move
from sparseworks.models.matrix import Layout, View
from sparseworks.models.tap import EvidenceTap, calibration_mode

__all__ = ["look_at"]


class _ProductTap(EvidenceTap):  # type: ignore[no-untyped-call]
    """Notes as which matrix, inputs by outputs, each product reads a watched parameter.

    Attributes:
        found: name -> (layout, groups) of every product; None of one that reads a part of it, or
            it in another shape.
    """

    def __init__(self, views: Iterable[View]) -> None:
        super().__init__(views, lambda view, inputs, groups, outputs: None)
        self.found: dict[str, set[tuple[Layout, int] | None]] = {}

    def product(self, left: Tensor, right: Tensor, output: Tensor | None = None) -> None:
        self._note(right.mT if right.ndim > 1 else right)
        self._note(left)

    batched_product = product

    def grouped_product(self, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
        self._note(right.mT)

    def convolution(self, args: tuple[Any, ...]) -> None:
        weight, transposed, groups = args[1], args[6], args[8]
        if (found := self._find(weight)) is not None:
            whole = weight.shape == found[0].parameter.shape and not transposed
            self._add(found[0], ("conv", groups) if whole else None)

    def _note(self, operand: Tensor) -> None:
        """operand: [..., out, in]."""
        if (found := self._find(operand)) is None:
            return
        view = found[0]
        parameter, layout = view.parameter, None
        banks = parameter.shape[0] if parameter.ndim == 3 else 1
        if parameter.ndim in (2, 3):
            if _same_matrix(operand, parameter):
                layout = "linear" if parameter.ndim == 2 else "experts"
            elif _same_matrix(operand, parameter.mT):
                layout = "transposed" if parameter.ndim == 2 else "experts_transposed"
        self._add(view, None if layout is None else (layout, banks))  # type: ignore[arg-type]

    def _add(self, view: View, read: tuple[Layout, int] | None) -> None:
        self.found.setdefault(view.name, set()).add(read)


def _same_matrix(operand: Tensor, matrix: Tensor) -> bool:
    """Are the last two axes of both the same entries in the same order?"""
    return all(
        operand.shape[a] == matrix.shape[a]
        and (operand.shape[a] == 1 or operand.stride(a) == matrix.stride(a))
        for a in (-2, -1)
    )


def look_at(
    model: nn.Module, batches: Sequence[Batch]
) -> Callable[[Sequence[View]], Mapping[str, View | str]]:
    """What `find_prunable` asks about bare parameters, answered by forward passes over batches.

    Returns:
        A function of views that gives for each name the view as it is multiplied, or why it has
        none.
    """

    def look(views: Sequence[View]) -> Mapping[str, View | str]:
        device = next(p.device for p in model.parameters())
        with calibration_mode(model), _ProductTap(views) as tap:
            for batch in batches:
                call(model, move(batch, device))
                if len(tap.found) == len(views):
                    break
        return {v.name: _answer(v, tap.found.get(v.name, set())) for v in views}

    return look


def _answer(view: View, found: set[tuple[Layout, int] | None]) -> View | str:
    if not found:
        return "a bare parameter by which the forward pass is not seen to multiply"
    read = next(iter(found))
    if len(found) > 1 or read is None:
        return "a bare parameter that the forward pass multiplies by in parts, or in several ways"
    return replace(view, layout=read[0], groups=read[1])
