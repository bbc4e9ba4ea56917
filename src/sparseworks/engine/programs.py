"""Operations with sizes: the native program for one height, width or number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparseworks.engine.emitting import Emitter, Kind
from sparseworks.engine.geometry import Geometry, arrange
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
    Store,
    Upsample,
    Value,
)
from sparseworks.engine.layout import Layout
from sparseworks.engine.shared import Shared
from sparseworks.engine.taps import places
from sparseworks.kernels.native import module

__all__ = ["Instance", "build", "lone_product"]

_HELD = 300  # bytes of Python's about a product or tensor


@dataclass
class Instance:
    """A native program for one size.

    Args:
        native: the program.
        lanes: images side by side.
        tensors: names of its inputs and outputs, in its order.
        tensor_shapes: of those, for one item.
        products: index of the native operation of each product, with its multiply-adds.
        groups: rows that share taps, by the same index.
        sizes: of the inputs of products, by the same index.
        shapes: of each output without the batch.
        bytes: that it takes, about.
    """

    native: Any
    lanes: int
    tensors: list[str]
    tensor_shapes: list[tuple[int, ...]]
    products: dict[int, tuple[Product, int]]
    groups: dict[int, int]
    sizes: dict[int, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]

    @property
    def bytes(self) -> int:
        return int(self.native.bytes) + _HELD * (len(self.products) + len(self.tensors) + 1)

    @cached_property
    def work(self) -> int:
        """Multiply-adds of the products on one item."""
        return sum(work for _, work in self.products.values())


def build(
    ops: Sequence[Op],
    sizes: Mapping[str, tuple[int, ...]],
    lanes: int,
    threads: int,
    shared: Shared | None = None,
) -> Instance:
    """Lay a program out.

    Args:
        ops: in the order in which they run.
        sizes: height and width, or the number of tokens, of each `Load` by its source.
        lanes: 1, or 16 images side by side.
        threads: among which an operation on one item may be divided.
        shared: what programs of other sizes of these operations have in common.

    Raises:
        ModelError: sizes that do not fit the operations.
    """
    return _Builder(ops, sizes, lanes, threads, Shared() if shared is None else shared).instance()


def lone_product(
    weight: Tensor, kind: str, size: tuple[int, ...], precision: Precision = Precision.FP32
) -> Instance:
    """One linear layer or convolution by itself, from tensor "x" to "y", on one thread."""
    rows, columns = weight.shape[:2]
    x, y = Value(kind, columns), Value(kind, rows)
    product = Product(y, x, weight, None, "weight", precision=precision)
    return build([Load(x, "x"), product, Store(y, "y")], {"x": size}, 1, 1)


class _Builder(Emitter):
    def instance(self) -> Instance:
        self.layout = Layout(self.ops, self.sizes, self.lanes, self.threads)
        for op in self.ops:
            self.last.update(dict.fromkeys(op.inputs(), op))
        for op in self.ops:
            self._emit(op)
        where, arena = arrange(self.floats, [(a, b) for a, b in self.lives])
        for fields in self.native:
            fields["apart"] = arena
        size = arena * self.layout.bands
        program = module().Program(where, size, self.lanes, self.shared.arena, self.native)  # type: ignore[union-attr]
        return Instance(
            program, self.lanes, self.tensors, self.tensor_shapes, self.products, self.groups,
            self.inputs, self.outputs,
        )  # fmt: skip

    def _emit(self, op: Op) -> None:
        emit = getattr(self, "_" + type(op).__name__.lower())
        emit(op)
        shift = 0 if isinstance(op, Store | Product) else self.layout.shift(op.out)
        if shift:
            self.add(
                Kind.SHIFT, shift // 8, out=self.buffer(op.out), to=self.layout.of(op.out),
                channels=op.out.channels, shift=shift,
            )  # fmt: skip

    def _load(self, op: Load) -> None:
        g = self.layout.of(op.out)
        self.add(
            Kind.LOAD, op.out.channels * g.size // 16, out=self.buffer(op.out), to=g,
            channels=op.out.channels, tensor=self.tensor(op.source, self._shape(op)),
            layout=_layout(op),
        )  # fmt: skip

    def _store(self, op: Store) -> None:
        g, channels = self.layout.of(op.out), op.out.channels
        self.add(
            Kind.STORE, channels * g.size // 16, **{"in": self.buffer(op.out), "from": g},
            channels=channels, tensor=self.tensor(op.target, self._shape(op)),
            layout=_layout(op),
        )  # fmt: skip
        self.outputs[op.target] = self._shape(op)[1:]

    def _shape(self, op: Load | Store) -> tuple[int, ...]:
        """Of a caller's tensor, for one item."""
        shape, channels = self.layout.shape[op.out], op.out.channels
        if op.out.kind == "tokens":
            return (self.lanes, *shape, channels)
        return (self.lanes, channels) if op.vector else (self.lanes, channels, *shape)

    def _product(self, op: Product) -> None:
        made, given = self.layout.of(op.out), self.layout.of(op.x)
        source, stride = self.buffer(op.x), op.stride
        if self.layout.phased(op):
            given, source, stride = self.phase(op, source)
        whole = self.layout.whole((given.height, given.width)) if op.x.kind == "image" else False
        if op.precision != Precision.FP32:
            source = self.words(op, source, given)
        taps = self.shared.product(op)
        step, near = places(op, taps.inputs, given, self.layout.phased(op), whole)
        fields: dict[str, Any] = {
            "in": source, "from": given, "weights": taps.native, "step": step, "near": near,
            "inputs": taps.inputs, "divided": op.groups,
        }  # fmt: skip
        if given.bands > 1:
            inner = self.layout.phases(op)
            fields["planes"] = -(-op.x.channels // op.precision) * inner
            if max(op.weight.shape[2:], default=1) > 1:
                fields["copies"] = 3 if self.layout.copied(op, op.precision) else 1
        if op.precision == Precision.INT8:
            fields |= self.range(op.x)
        if op.residual is not None:
            fields["other"] = self.buffer(op.residual)
        flat = made.lanes == 1 and made.pitch == given.pitch and stride == 1
        if made.lanes == 1 and len(self.layout.shape[op.out]) == 2 and made.pitch != made.width:
            fields["live"] = 1
        other = None if op.residual is op.x or taps.numbers["blocks"] > 1 else op.residual
        if other is not None and self.last[other] is op:
            at = self.buffers[other]  # each sum is read before it is made
            self.buffers[op.out] = at
            size = op.out.channels * made.plane + 2 * self.layout.shift(op.out)
            self.floats[at] = max(self.floats[at], size)
        vectors = made.height * -(-made.width * made.lanes // 16)
        work = taps.values * vectors
        positions = made.height * made.width * made.lanes
        self.products[len(self.native)] = (op, taps.values * positions * op.precision)
        self.groups[len(self.native)] = taps.group
        self.inputs[len(self.native)] = self.layout.shape[op.x]
        self.add(
            Kind.PRODUCT, work, out=self.buffer(op.out), to=made, channels=op.out.channels,
            stride=stride, flat=int(flat), activation=int(op.activation), number=op.slope,
            shift=self.layout.shift(op.out), **fields,
        )  # fmt: skip

    def _pool(self, op: Pool) -> None:
        given = self.layout.of(op.x)
        self.add(
            Kind.POOL, op.x.channels * given.size * op.window // 16,
            **{"in": self.buffer(op.x), "from": given}, out=self.buffer(op.out),
            to=self.layout.of(op.out), channels=op.out.channels, stride=op.stride, window=op.window,
            padding=op.padding, flag=int(op.largest), broadcast=int(op.count_padding),
        )  # fmt: skip

    def _mean(self, op: Mean) -> None:
        given = self.layout.of(op.x)
        self.add(
            Kind.MEAN, op.x.channels * given.size // 16,
            **{"in": self.buffer(op.x), "from": given}, out=self.buffer(op.out),
            to=self.layout.of(op.out), channels=op.out.channels,
        )  # fmt: skip

    def _combine(self, op: Combine) -> None:
        made = self.layout.of(op.out)
        fields: dict[str, Any] = {"in": self.buffer(op.x)}
        if op.y is not None:
            fields["other"] = self.buffer(op.y)
            fields["from"] = self.layout.of(op.y)
            fields["broadcast"] = int(self.layout.shape[op.y] != self.layout.shape[op.x])
        self.add(
            Kind.COMBINE, op.out.channels * made.size // 8, out=self.buffer(op.out), to=made,
            channels=op.out.channels, flag=int(op.multiply), activation=int(op.activation),
            number=op.slope, **fields,
        )  # fmt: skip

    def _gather(self, op: Gather) -> None:
        made, done = self.layout.of(op.out), 0
        for value, first, count in op.parts:
            self.add(
                Kind.GATHER, count * made.size // 8, **{"in": self.buffer(value)}, to=made,
                out=self.buffer(op.out), channels=count, q=first, k=done,
            )  # fmt: skip
            done += count

    def _move(self, op: Move) -> None:
        made = self.layout.of(op.out)
        for number, part in enumerate(op.parts):
            given = self.layout.of(part.value)
            fields: dict[str, Any] = {"in": self.buffer(part.value), "from": given, "to": made}
            fields["sources"] = _offsets(part.sources, given)
            fields["places"] = _offsets(part.places, made)
            if part.weights is not None:
                fields["shares"] = part.weights.float().flatten().contiguous()
            self.add(
                Kind.MOVE, part.count * part.sources.numel() * made.lanes // 4, channels=part.count,
                out=self.buffer(op.out), q=part.first, q_step=part.step, flag=int(number == 0),
                **fields,
            )  # fmt: skip

    def _groupnorm(self, op: GroupNorm) -> None:
        made = self.layout.of(op.out)
        fields = {"in": self.buffer(op.x)}
        for name, tensor in (("scale", op.gamma), ("bias", op.beta)):
            if tensor is not None:
                fields[name] = tensor.float().contiguous()  # type: ignore[assignment]
        self.add(
            Kind.GROUP_NORM, op.out.channels * made.plane // 4, out=self.buffer(op.out), to=made,
            channels=op.out.channels, groups=op.groups, number=op.epsilon, **fields,
        )  # fmt: skip

    def _upsample(self, op: Upsample) -> None:
        made = self.layout.of(op.out)
        self.add(
            Kind.UPSAMPLE, op.out.channels * made.size // 8, **{"in": self.buffer(op.x)}, to=made,
            **{"from": self.layout.of(op.x)}, out=self.buffer(op.out), channels=op.out.channels,
            window=op.factor,
        )  # fmt: skip

    def _norm(self, op: Norm) -> None:
        made = self.layout.of(op.out)
        fields = {"in": self.buffer(op.x), "weights": self.shared.norm(op)}
        self.add(
            Kind.NORM, op.out.channels * made.plane // 4, out=self.buffer(op.out), to=made,
            channels=op.out.channels, number=op.epsilon, flag=int(not op.centred), **fields,
        )  # fmt: skip

    def _attention(self, op: Attention) -> None:
        queries, keys = self.layout.of(op.q.value), self.layout.of(op.k.value)
        fields: dict[str, Any] = {"from": queries, "to": keys, "in": self.buffer(op.q.value)}
        fields["other"], fields["extra"] = self.buffer(op.k.value), self.buffer(op.v.value)
        if op.mask is not None:
            fields["mask"] = self.tensor(op.mask, (0,))
        if op.bias is not None:
            fields["added"] = self.tensor(op.bias, (0,))
        self.add(
            Kind.ATTENTION, op.q.heads * op.q.size * queries.plane * keys.width // (8 * op.windows),
            out=self.buffer(op.out), heads=op.q.heads, groups=op.k.heads, window=op.q.size,
            q=op.q.first, k=op.k.first, v=op.v.first, number=op.scale,
            keys=keys.width // op.windows, windows=op.windows, flag=int(op.causal), **fields,
        )  # fmt: skip


def _offsets(positions: Tensor, g: Geometry) -> Tensor:
    """Of pixels, in floats from the beginning of their plane."""
    flat = positions.flatten()
    found = flat // g.width * g.pitch + g.origin + flat % g.width * g.lanes
    return found.to(torch.int32).contiguous()


def _layout(op: Load | Store) -> int:
    """Of the caller's tensor, as the native code numbers them."""
    return 2 if op.columns else int(op.out.kind == "tokens")
