"""What a compiled program is made of: operations on values, before anything has a size.

A value is an image `[batch, channels, height, width]` (a vector `[batch, channels]` is an image of
one pixel) or tokens `[batch, tokens, channels]`. Operations are in the order in which they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

__all__ = ["Activation", "Attention", "Combine", "Gather", "Load", "Mean", "Norm", "Op", "Pool",
           "Precision", "Product", "Store", "Upsample", "Value"]  # fmt: skip


class Activation(IntEnum):
    """As the native code numbers them."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    GELU = 3
    GELU_TANH = 4
    SILU = 5
    HARDSWISH = 6
    HARDSIGMOID = 7
    SIGMOID = 8
    TANH = 9
    LEAKY_RELU = 10
    QUICK_GELU = 11
    ELU = 12
    MISH = 13


class Precision(IntEnum):
    """Of the weight and the input of a product; the number is how many fit into 32 bits.

    Attributes:
        FP32: as they are.
        BF16: rounded to bf16, sums fp32.
        INT8: rounded to whole numbers times a scale, which is max|w| / 127 of every row of the
            weight, and max|x| / 127 of every token or image; sums int32, scaled in fp32.
    """

    FP32 = 1
    BF16 = 2
    INT8 = 4


@dataclass(eq=False)
class Value:
    """One activation.

    Args:
        kind: "image" or "tokens".
        channels: of it.
    """

    kind: str
    channels: int


@dataclass(eq=False)
class Op:
    """One operation; `out` is what it makes."""

    out: Value

    def inputs(self) -> list[Value]:
        return []


@dataclass(eq=False)
class Load(Op):
    """An input of the program; `source` names it, `vector` says that it has no pixels.

    `columns`: tokens are the columns of one matrix `[channels, tokens]`.
    """

    source: str
    vector: bool = False
    columns: bool = False


@dataclass(eq=False)
class Store(Op):
    """An output of the program (`out` is the value that is stored)."""

    target: str
    vector: bool = False
    columns: bool = False

    def inputs(self) -> list[Value]:
        return [self.out]


@dataclass(eq=False)
class Product(Op):
    """activation(weight * x + bias + residual): a linear layer or a convolution.

    Args:
        x: the input.
        weight: `[rows, columns / groups, kh, kw]`, zeros are skipped.
        bias: `[rows]` or None.
        name: of the parameter.
        padding: zeros before the first row and column.
        more: zeros behind the last row and column beyond as many.
        border: zeros on both sides of the kernel's rows and columns, that the layer does not have.
        slope: of a leaky ReLU below zero.
        precision: of weight and x; bias, residual and result are fp32.
    """

    x: Value
    weight: Tensor
    bias: Tensor | None
    name: str
    stride: int = 1
    padding: int = 0
    more: int = 0
    dilation: int = 1
    groups: int = 1
    border: tuple[int, int] = (0, 0)
    residual: Value | None = None
    activation: Activation = Activation.NONE
    slope: float = 0.0
    precision: Precision = Precision.FP32

    def inputs(self) -> list[Value]:
        return [self.x, *([] if self.residual is None else [self.residual])]


@dataclass(eq=False)
class Pool(Op):
    """Largest or mean value of windows; `row`: of an image of one row, which is one of one row."""

    x: Value
    window: int
    stride: int
    padding: int
    largest: bool
    count_padding: bool = True
    ceil: bool = False
    row: bool = False

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Mean(Op):
    """Mean over all pixels."""

    x: Value

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Combine(Op):
    """activation(x + y), activation(x y) or activation(x); y may have a single pixel."""

    x: Value
    y: Value | None = None
    multiply: bool = False
    activation: Activation = Activation.NONE
    slope: float = 0.0

    def inputs(self) -> list[Value]:
        return [self.x, *([] if self.y is None else [self.y])]


@dataclass(eq=False)
class Gather(Op):
    """Channels of several values, one after the other.

    Args:
        parts: of each value its first channel and how many there are from there.
    """

    parts: list[tuple[Value, int, int]]

    def inputs(self) -> list[Value]:
        return [value for value, _, _ in self.parts]


@dataclass(eq=False)
class Upsample(Op):
    """Every pixel `factor` times in both directions."""

    x: Value
    factor: int

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Norm(Op):
    """Layer norm over channels; not `centred`: x / sqrt(mean of x^2 + epsilon) gamma + beta."""

    x: Value
    gamma: Tensor | None
    beta: Tensor | None
    epsilon: float
    centred: bool = True

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Moved:
    """Where positions of a value go, and channels `first`, `first + step`, ...

    Args:
        sources: positions of `value` `[n]`, or several for each place `[n, taps]`.
        places: positions of the result `[n]`.
        weights: of the sources, `[n, taps]`; None: as they are.
        count: of the channels, which become those of the result.
    """

    value: Value
    sources: Tensor
    places: Tensor
    weights: Tensor | None
    first: int
    step: int
    count: int


@dataclass(eq=False)
class Move(Op):
    """An image of another size, whose pixels are pixels, or weighted sums of pixels, of others.

    Args:
        parts: where they come from; what none of them reaches is zero.
        size: height and width.
    """

    parts: list[Moved]
    size: tuple[int, int]

    def inputs(self) -> list[Value]:
        return [part.value for part in self.parts]


@dataclass(eq=False)
class GroupNorm(Op):
    """Norm over all pixels of groups of channels."""

    x: Value
    groups: int
    gamma: Tensor | None
    beta: Tensor | None
    epsilon: float

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Heads:
    """Where heads lie in a tokens value: `heads` of `size` channels from `first` on."""

    value: Value
    heads: int
    size: int
    first: int = 0


@dataclass(eq=False)
class Attention(Op):
    """softmax(scale q k^T + mask + bias) v, head by head.

    Args:
        mask: a tensor [entries or 1, 1, queries or 1, keys], by name.
        bias: a tensor [entries or 1, heads, queries, keys], by name.
        windows: equal runs of positions, that see themselves alone; sizes are of one then, and a
            mask has an entry for each.
    """

    q: Heads
    k: Heads
    v: Heads
    scale: float
    causal: bool = False
    mask: str | None = None
    bias: str | None = None
    windows: int = 1

    def inputs(self) -> list[Value]:
        return [self.q.value, self.k.value, self.v.value]
