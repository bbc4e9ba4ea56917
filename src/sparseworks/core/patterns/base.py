"""What a pattern is: the contract, and the counting that all patterns share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from decimal import Decimal

from torch import Tensor

from sparseworks.core.errors import InvalidArgument

__all__ = ["Pattern", "check_sparsity", "count_dropped", "required", "resolve_sparsity"]


def check_sparsity(sparsity: float) -> float:
    """Return the sparsity as a float in [0, 1).

    Raises:
        InvalidArgument: not a number in [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise InvalidArgument(f"sparsity={sparsity!r} is not a number; give a fraction in [0, 1)")
    if not 0.0 <= sparsity < 1.0:
        hint = f"; did you mean {sparsity / 100:g}?" if 1.0 < sparsity < 100.0 else ""
        raise InvalidArgument(f"sparsity={sparsity:g} is not in [0, 1){hint}")
    return float(sparsity)


def count_dropped(units: int, sparsity: float) -> int:
    """floor(sparsity * units) in exact decimal arithmetic, so that 0.29 of 100 is 29, not 28."""
    return math.floor(Decimal(repr(float(sparsity))) * units)


class Pattern(ABC):
    """The zeros that are legal in a matrix `[out, in]`."""

    fixed_density: float | None = None
    """The one density this pattern has (N:M), or None when it takes any."""

    @abstractmethod
    def units(self, shape: Sequence[int]) -> int:
        """Number of units in a matrix of this shape."""

    @abstractmethod
    def pool(self, scores: Tensor) -> Tensor:
        """Unit scores (fp32) from weight scores `[out, in]`: their sum over each unit."""

    @abstractmethod
    def select(self, scores: Tensor, keep: int | None = None) -> Tensor:
        """Bool mask `[out, in]`, True = kept, with the `keep` units of the highest scores.

        Ties keep the lowest flat index; -inf is never kept; NaN is refused. `keep` is a number of
        units; None is allowed where the pattern has one density only.
        """

    def check(self, shape: Sequence[int], run: int | None = None) -> None:  # noqa: B027
        """Raise `PatternError` with the reason when a matrix cannot take this pattern.

        Args:
            shape: `[out, in]`.
            run: how many consecutive inputs belong together (channels at a fixed tap of a
                convolution); None: all of them.
        """

    def keep(self, shape: Sequence[int], sparsity: float) -> int:
        """Units kept in one matrix at this sparsity: units - floor(sparsity * units)."""
        total = self.units(shape)
        return total - count_dropped(total, sparsity)

    def reachable(self, shape: Sequence[int], keep: int) -> int:
        """The largest number of units, at most `keep`, that `select` can keep."""
        return min(keep, self.units(shape))

    def weights_per_unit(self, shape: Sequence[int]) -> float:
        """Weights in one unit."""
        return math.prod(shape) / max(1, self.units(shape))


def resolve_sparsity(pattern: Pattern, sparsity: float | None, who: str = "") -> float:
    """The sparsity of a call: what was given, or what the pattern has where it has one only.

    Args:
        who: needs the sparsity, for the message; "": the pattern.

    Raises:
        InvalidArgument: none is given or known, not in [0, 1), or one that the pattern contradicts.
    """
    density = pattern.fixed_density
    if density is None:
        if sparsity is None:
            raise InvalidArgument(
                f"{who or f'pattern {pattern}'} needs `sparsity`, a fraction in [0, 1)"
            )
        return check_sparsity(sparsity)
    if sparsity is not None and abs(check_sparsity(sparsity) - (1 - density)) > 1e-9:
        raise InvalidArgument(
            f"pattern {pattern} has sparsity {1 - density:g}, which contradicts "
            f"sparsity={sparsity:g}; leave `sparsity` out"
        )
    return 1 - density


def required(pattern: Pattern, keep: int | None) -> int:
    """The number of units to keep, which this pattern cannot do without."""
    if keep is None:
        raise InvalidArgument(f"pattern {pattern} needs the number of units to keep")
    return keep
