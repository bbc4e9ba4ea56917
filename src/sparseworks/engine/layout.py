"""How the values of a program lie in memory, given the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparseworks.core.errors import ModelError
from sparseworks.engine.geometry import Geometry, fills, image, tokens, whole_rows
from sparseworks.engine.ir import (
    Attention,
    Combine,
    Gather,
    GroupNorm,
    Load,
    Mean,
    Move,
    Norm,
    Op,
    Pool,
    Precision,
    Product,
    Upsample,
    Value,
)
from sparseworks.engine.taps import distances

__all__ = ["Layout"]

_BAND = 8  # vectors of a channel in a band, at least

Size = tuple[int, ...]  # height and width, or the number of tokens


class Layout:
    """Sizes and geometries of all values.

    Args:
        ops: in the order in which they run.
        sizes: of each `Load` by its source.
        lanes: 1, or 16 images side by side.
        threads: among which an operation on one item may be divided.

    Attributes:
        shape: size of each value.

    Raises:
        ModelError: sizes that do not fit the operations.
    """

    def __init__(
        self, ops: Sequence[Op], sizes: Mapping[str, Size], lanes: int, threads: int
    ) -> None:
        self.sizes, self.lanes, self.threads = sizes, lanes, threads
        self.shape: dict[Value, Size] = {}
        self._beside: set[tuple[Precision, Any]] = set()  # what is read one pixel away
        self._pads: dict[Size, int] = {}
        self._far: set[Size] = set()  # read beyond the pixels next to them
        self._uneven: set[Size] = set()  # from or to which a product changes
        self._apart = not any(isinstance(op, Move | GroupNorm) for op in ops)
        for op in ops:
            self._size(op)

    @property
    def bands(self) -> int:
        """Of the values that have most."""
        return max((self.geometry(shape).bands for shape in self._pads), default=1)

    def _size(self, op: Op) -> None:
        shape = self.shape
        if isinstance(op, Load):
            shape[op.out] = self.sizes[op.source]
        elif isinstance(op, Product):
            shape[op.out] = self._convolved(op)
        elif isinstance(op, Pool):
            height, width = shape[op.x]
            shape[op.out] = (height if op.row else _pooled(height, op), _pooled(width, op))
        elif isinstance(op, Mean):
            shape[op.out] = (1, 1)
        elif isinstance(op, Attention):
            shape[op.out] = shape[op.q.value]
        elif isinstance(op, Combine):
            shape[op.out] = shape[op.x]
            if op.y is not None and shape[op.y] not in (shape[op.x], (1, 1)):
                raise ModelError(f"sizes {shape[op.x]} and {shape[op.y]} do not fit together")
        elif isinstance(op, Norm | GroupNorm):
            shape[op.out] = shape[op.x]
        elif isinstance(op, Move):
            shape[op.out] = tuple(op.size)
        elif isinstance(op, Gather):
            shape[op.out] = shape[op.parts[0][0]]
            if any(shape[value] != shape[op.out] for value in op.inputs()):
                raise ModelError("images of different sizes are put one behind the other")
        elif isinstance(op, Upsample):
            height, width = shape[op.x]
            shape[op.out] = (op.factor * height, op.factor * width)
        if len(shape[op.out]) == 2:
            self._pads.setdefault(shape[op.out], 0)

    def _convolved(self, op: Product) -> Size:
        given = self.shape[op.x]
        if len(given) == 1:
            return given
        kernel = tuple(op.weight.shape[2:]) or (1, 1)
        reach = [op.dilation * (k - 1) for k in kernel]
        made = tuple(
            (n + 2 * op.padding + op.more - r - 1) // op.stride + 1
            for n, r in zip(given, reach, strict=True)
        )
        if min(made) < 1:
            raise ModelError(f"{op.name}: an image of {given} pixels is smaller than the kernel")
        if op.residual is not None and self.shape[op.residual] != made:
            raise ModelError(f"{op.name}: sizes {made} and {self.shape[op.residual]} are added")
        read, phased = self.read_size(op), self.phased(op)
        x = [n // (op.stride if phased else 1) for n in distances(op)]
        if any(x):
            self._beside.add((op.precision, self.read(op)))
        if max(map(abs, x)) > 1 or made[1] > read[1]:
            self._far.add(read)
        if made != read:
            self._uneven.update((made, read))
        for n, out, r in zip(read, made, reach, strict=True):
            step = 1 if phased else op.stride
            first = op.padding // op.stride + (op.padding % op.stride > 0)
            left = first if phased else op.padding
            last = (r - op.padding) // op.stride if phased else r - op.padding
            right = (out - 1) * step + last - (n - 1)
            self._pads[read] = max(self._pads.get(read, 0), left, right)
        return made

    def phased(self, op: Product) -> bool:
        """Whether a product reads the phases of its input, that its stride cuts it into."""
        return op.stride > 1 and (self.lanes == 1 or op.stride > 2)

    def read(self, op: Product) -> Any:
        """What a product reads, as a key of buffers: its input, or the phases of that."""
        return ("phases", op.x, op.stride) if self.phased(op) else op.x

    def phases(self, op: Product) -> int:
        """Planes of a channel that a product reads."""
        return op.stride**2 if self.phased(op) else 1

    def copied(self, op: Product, precision: Precision) -> bool:
        """Whether what a product reads, in this precision, has shifted copies."""
        beside = (precision, self.read(op)) in self._beside
        return op.x.kind == "image" and beside and self.whole(self.read_size(op))

    def read_size(self, op: Product) -> Size:
        """Of what a product reads."""
        size = self.shape[op.x]
        return tuple(-(-n // op.stride) for n in size) if self.phased(op) else size

    def geometry(self, shape: Size) -> Geometry:
        if len(shape) == 1:
            return tokens(shape[0])
        if self.whole(shape):
            return whole_rows(shape[0], shape[1], self._pads[shape], self._bands_of(shape))
        return image(shape[0], shape[1], self._pads[shape], self.lanes)

    def whole(self, shape: Size) -> bool:
        """Whether images of this size lie in whole vectors, with shifted copies."""
        near = self._pads[shape] == 1 and shape not in self._far
        return self.lanes == 1 and near and fills(shape[1])

    def _bands_of(self, shape: Size) -> int:
        """Into how many bands whole rows are cut: one for each thread, where that is even."""
        height, vectors = shape[0], shape[0] * -(-shape[1] // 16)
        even = self._apart and height % self.threads == 0 and shape not in self._uneven
        return self.threads if even and vectors >= _BAND * self.threads else 1

    def shift(self, value: Value) -> int:
        """Floats between a value and its shifted copies; 0 where it has none."""
        if (Precision.FP32, value) not in self._beside or not self.whole(self.shape[value]):
            return 0
        return value.channels * self.of(value).plane

    def of(self, value: Value) -> Geometry:
        return self.geometry(self.shape[value])


def _pooled(n: int, op: Pool) -> int:
    span = n + 2 * op.padding - op.window
    count = (-(-span // op.stride) if op.ceil else span // op.stride) + 1
    if op.ceil and (count - 1) * op.stride >= n + op.padding:
        count -= 1
    return count
