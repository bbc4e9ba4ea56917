"""What a compiled program is made of: operations on values, before anything has a size.

A value is an image `[batch, channels, height, width]` (a vector `[batch, channels]` is an image of
one pixel) or tokens `[batch, tokens, channels]`. Operations are in the order in which they run.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

__all__ = ["Activation", "Attention", "Combine", "Load", "Mean", "Norm", "Op", "Pool",
           "Precision", "Product", "Store", "Value"]  # fmt: skip


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
    residual: Value | None = None
    activation: Activation = Activation.NONE
    precision: Precision = Precision.FP32

    def inputs(self) -> list[Value]:
        return [self.x, *([] if self.residual is None else [self.residual])]


@dataclass(eq=False)
class Pool(Op):
    """Largest or mean value of windows."""

    x: Value
    window: int
    stride: int
    padding: int
    largest: bool
    count_padding: bool = True
    ceil: bool = False

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

    def inputs(self) -> list[Value]:
        return [self.x, *([] if self.y is None else [self.y])]


@dataclass(eq=False)
class Norm(Op):
    """Layer norm over channels."""

    x: Value
    gamma: Tensor | None
    beta: Tensor | None
    epsilon: float

    def inputs(self) -> list[Value]:
        return [self.x]


@dataclass(eq=False)
class Heads:
    """Where a view's heads lie in a tokens value: `heads` of `size` channels from `first` on.

    `order` names the axes that the view has, of "b", "s", "h", "d".
    """

    value: Value
    heads: int
    size: int
    first: int = 0
    order: tuple[str, ...] = ("b", "s", "h", "d")


@dataclass(eq=False)
class Attention(Op):
    """softmax(scale q k^T + mask) v, head by head."""

    q: Heads
    k: Heads
    v: Heads
    scale: float
    causal: bool = False
    mask: str | None = None

    def inputs(self) -> list[Value]:
        return [self.q.value, self.k.value, self.v.value]
