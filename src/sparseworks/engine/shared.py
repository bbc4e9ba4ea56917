"""What programs of all sizes of the same operations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from sparseworks.engine.ir import Norm, Op, Product
from sparseworks.engine.taps import Packed, pack
from sparseworks.kernels.native import module

__all__ = ["Shared"]


class Shared:
    """What programs of all sizes have in common.

    Attributes:
        packed: kept weights, and what norms read, by operation.
        arena: working memory.
    """

    def __init__(self) -> None:
        self.packed: dict[Op, Any] = {}

    @cached_property
    def arena(self) -> Any:
        return module().Arena()  # type: ignore[union-attr]

    def product(self, op: Product) -> Packed:
        found = self.packed.get(op)
        if found is None:
            found = self.packed[op] = pack(op)
        return found

    def norm(self, op: Norm) -> Any:
        found = self.packed.get(op)
        if found is None:
            read = {"scale": op.gamma, "bias": op.beta}
            held = {n: t.float().contiguous() for n, t in read.items() if t is not None}
            found = self.packed[op] = module().Weights(held)  # type: ignore[union-attr]
        return found

    def prepare(self, ops: Sequence[Op]) -> None:
        """Pack all at once, so that no call has to."""
        for op in ops:
            if isinstance(op, Product):
                self.product(op)
            elif isinstance(op, Norm):
                self.norm(op)

    @property
    def bytes(self) -> int:
        """Of the kept weights."""
        return sum(p.bytes for p in self.packed.values() if isinstance(p, Packed))
