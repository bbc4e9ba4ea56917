"""Operations of the native code while a program is laid out: buffers, and what products read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sparseworks.engine.geometry import Geometry
from sparseworks.engine.ir import Op, Precision, Product, Value
from sparseworks.engine.layout import Layout
from sparseworks.engine.shared import Shared

__all__ = ["Emitter", "Kind"]

_SMALL = 4_000  # vector multiply-adds below which one thread does an operation alone


class Kind(IntEnum):
    """Operations, as the native code numbers them."""

    LOAD = 0
    STORE = 1
    PRODUCT = 2
    POOL = 3
    MEAN = 4
    COMBINE = 5
    PHASES = 6
    NORM = 7
    ATTENTION = 8
    SHIFT = 9
    PAIRS = 10
    GATHER = 11
    UPSAMPLE = 12
    RANGE = 13
    QUADS = 14
    MOVE = 15
    GROUP_NORM = 16


@dataclass
class Emitter:
    """Operations one after the other, and buffers that live as long as one of them reads them.

    Args:
        ops: in the order in which they run.
        sizes: of each `Load` by its source.
        lanes: 1, or 16 images side by side.
        threads: among which an operation on one item may be divided.
        shared: what programs of other sizes have in common.
    """

    ops: Sequence[Op]
    sizes: Mapping[str, tuple[int, ...]]
    lanes: int
    threads: int
    shared: Shared
    layout: Layout = field(init=False)
    buffers: dict[Any, int] = field(default_factory=dict)
    floats: list[int] = field(default_factory=list)
    lives: list[list[int]] = field(default_factory=list)
    native: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    products: dict[int, tuple[Product, int]] = field(default_factory=dict)
    tensor_shapes: list[tuple[int, ...]] = field(default_factory=list)
    groups: dict[int, int] = field(default_factory=dict)
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    last: dict[Value, Op] = field(default_factory=dict)  # who reads a value last

    def buffer(self, key: Any, floats: int = 0) -> int:
        """The buffer of a value, which lives until the operation that is being made."""
        now = len(self.native)
        if key not in self.buffers:
            self.buffers[key] = len(self.floats)
            if isinstance(key, Value):
                floats = key.channels * self.layout.of(key).plane + 2 * self.layout.shift(key)
            self.floats.append(floats)
            self.lives.append([now, now])
        at = self.buffers[key]
        self.lives[at][1] = now
        return at

    def tensor(self, name: str, shape: tuple[int, ...]) -> int:
        self.tensors.append(name)
        self.tensor_shapes.append(shape)
        return len(self.tensors) - 1

    def add(self, kind: Kind, work: int = 0, **fields: Any) -> None:
        fields["kind"] = int(kind)
        fields["parts"] = 1 if work < _SMALL or self.threads == 1 else self.threads
        for name in ("to", "from"):
            if name in fields:
                fields[name] = fields[name].numbers()
        self.native.append(fields)

    def phase(self, op: Product, source: int) -> tuple[Geometry, int, int]:
        g = self.layout.geometry(self.layout.read_size(op))
        planes = op.x.channels * op.stride**2
        key = self.layout.read(op)
        done = key in self.buffers
        shift = planes * g.plane if self.layout.copied(op, Precision.FP32) else 0
        buffer = self.buffer(key, planes * g.plane + 2 * shift)
        if not done:
            self.add(
                Kind.PHASES, planes * g.size // 4, **{"in": source, "from": self.layout.of(op.x)},
                out=buffer, to=g, channels=op.x.channels, stride=op.stride, shift=shift,
            )  # fmt: skip
            self.buffer(key)
        return g, buffer, 1

    def words(self, op: Product, source: int, given: Geometry) -> int:
        """The input of a product in bf16 or int8, several channels in 32 bits."""
        inner = self.layout.phases(op)
        key = (op.precision, self.layout.read(op))
        done = key in self.buffers
        fields: dict[str, Any] = {"in": source}
        if op.precision == Precision.INT8:
            fields |= self.range(op.x)
            self.lives[source][1] = len(self.native)
        floats = -(-op.x.channels // op.precision) * inner * given.plane
        shift = floats if self.layout.copied(op, op.precision) else 0
        buffer = self.buffer(key, floats + 2 * shift)
        if not done:
            kind = Kind.PAIRS if op.precision == Precision.BF16 else Kind.QUADS
            self.add(
                kind, (floats + shift) * given.bands // 4, out=buffer, to=given, window=inner,
                channels=op.x.channels, shift=shift, **fields,
            )  # fmt: skip
            self.buffer(key)
        return buffer

    def range(self, x: Value) -> dict[str, Any]:
        """Fields of an operation that reads the largest magnitudes of a value."""
        key, g = ("range", x), self.layout.of(x)
        slots = 0 if x.kind == "tokens" else self.threads
        done = key in self.buffers
        buffer = self.buffer(key, 16 * slots if slots else g.plane)
        if not done:
            self.add(
                Kind.RANGE, x.channels * g.size // 16, **{"in": self.buffer(x), "from": g},
                out=buffer, channels=x.channels, slots=slots,
            )  # fmt: skip
            self.buffer(key)
        return {"extra": buffer, "slots": slots}
