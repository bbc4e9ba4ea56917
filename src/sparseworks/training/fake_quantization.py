"""Weights rounded to integers in groups while they train.

    W_q = s (q - z),   q = clamp(round(W / s) + z, -2^(b-1), 2^(b-1) - 1),   z = round(zero)

with one s (fp16, as it is stored) and z for each group of consecutive columns; pruned weights are
0. Rounding is passed straight through, so that the gradient reaches W, s and zero; a
clamped weight moves s and z alone (LSQ: Esser et al. 2020, Learned Step Size Quantization). Frozen,
the integers q and z rest and s trains alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.grids import Grid, round_groups
from sparseworks.models.matrix import View
from sparseworks.models.quantized import Quantized
from sparseworks.training.parametrizing import refuse_tied, unparametrize

__all__ = ["FakeQuantized", "quantized_weights", "rounded"]

_LEAST = 2.0**-14  # the smallest normal fp16: a scale never collapses to 0


class _Round(torch.autograd.Function):
    """To the nearest integer; the gradient passes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def rounded(x: Tensor) -> Tensor:
    """To the nearest integers; the gradient passes straight through."""
    return _Round.apply(x)  # type: ignore[no-untyped-call, no-any-return]


class _Half(torch.autograd.Function):
    """As fp16 stores it; the gradient passes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clamp_min(_LEAST).half().float()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class FakeQuantized(nn.Module):
    """The part of a weight: its scales and zeros, and its integers once these are frozen.

    Args:
        view: of the weight, whose values give the first scales and zeros (min and max of a group).
        bits: of a code, 2 to 8.
        group: consecutive columns that share a scale.
        kept: bool matrix, False where a weight is pruned and stays 0; None: none is. A group
            without kept weights is not stored.

    Raises:
        InvalidArgument: the columns are not whole groups.
    """

    kept: Tensor
    codes: Tensor | None

    def __init__(self, view: View, bits: int, group: int, kept: Tensor | None = None) -> None:
        super().__init__()
        rows, columns = view.shape
        if columns % group or not 2 <= bits <= 8:
            raise InvalidArgument(
                f"{view.name}: {columns} columns in groups of {group}, {bits} bits: give whole "
                "groups and 2 to 8 bits"
            )
        weight = view.matrix().float()
        mask = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
        mask = mask.to(weight.device)
        grid = round_groups(torch.where(mask, weight, 0.0), mask, group, bits, zeros=True)
        assert grid.zero is not None
        self.view, self.bits, self.group = view, bits, group
        self.scale = nn.Parameter(grid.scale.float().clamp_min(_LEAST))
        self.zero = nn.Parameter(grid.zero.float())
        self.register_buffer("kept", mask.view(rows, -1, group))
        self.register_buffer("codes", None)

    def _grid(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[rows, groups, group]`, s and z `[rows, groups, 1]`."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        scale: Tensor = _Half.apply(self.scale)[..., None]  # type: ignore[no-untyped-call]
        if self.codes is not None:
            return self.codes.float(), scale, self.zero.detach().round()[..., None]
        zero = rounded(self.zero.clamp(low, high))[..., None]
        matrix = self.view.matrix(weight).float().view(self.kept.shape)
        return (rounded(matrix / scale) + zero).clamp(low, high), scale, zero

    def forward(self, weight: Tensor) -> Tensor:
        codes, scale, zero = self._grid(weight)
        matrix = (scale * (codes - zero) * self.kept).flatten(1)
        return self.view.from_matrix(matrix).to(weight.dtype)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """The integers of this weight are the final ones; scales go on training."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        codes, _, zero = self._grid(weight)
        self.codes = torch.where(self.kept, codes, zero).to(torch.int8)
        self.zero.copy_(self.zero.clamp(low, high).round())
        self.zero.requires_grad_(False)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The integers, scales and zeros as they are stored.

        Raises:
            InvalidArgument: they are not frozen yet.
        """
        if self.codes is None:
            raise InvalidArgument(f"{self.view.name}: freeze the integers first")
        scale = self.scale.clamp_min(_LEAST).half()
        grid = Grid(self.codes, scale, self.zero.round().to(torch.int8))
        return Quantized.of(self.view, grid, self.bits, self.kept.any(2))


@contextmanager
def quantized_weights(model: nn.Module, parts: Iterable[FakeQuantized]) -> Iterator[None]:
    """Layers compute with fake-quantized weights while this is open; then with the raw ones again.

    Args:
        model: it holds the weights.
        parts: of its weights, each with a view of its own.

    Raises:
        ModelError: a weight has a second name, which would not see its part.
    """
    on: list[tuple[View, list[str]]] = []
    orders: dict[nn.Module, list[str]] = {}
    try:
        for part in parts:
            view = part.view
            refuse_tied(model, view)
            order = orders.setdefault(view.module, list(view.module._parameters))
            parametrize.register_parametrization(view.module, view.attribute, part)
            on.append((view, order))
        yield
    finally:
        for view, order in reversed(on):
            unparametrize(view.module, view.attribute, order)
