"""The kept weights of a product as the native code reads them.

They are packed once. A tap is the number of its column in the weight; how far from a position in
memory that column's input lies is what a program of another size has of its own: one number where
columns are inputs, else one for every tap.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseworks.engine.geometry import Geometry
from sparseworks.engine.ir import Precision, Product
from sparseworks.kernels.native import module

__all__ = ["Packed", "distances", "pack", "places"]

_SHARED = 4  # rows that share their taps where weights are nearly dense
_FULL = 0.72  # share of non-zeros in the taps of four rows from which on sharing pays
_CACHE = 40 << 10  # bytes of the first cache for the inputs of a block of taps
_TAPS = 20  # of a row in a block, at least
_CHUNK = 64  # groups of rows within which they change places, at most
_RUN = 16  # vectors of a channel that are multiplied at once, at most
_COLUMNS = 1 << 16  # of a block, that 16 bits can number


@dataclass(frozen=True, eq=False)
class Packed:
    """What a product reads in programs of all sizes.

    Args:
        tensors: start `[blocks x groups + 1]`, column and value of the taps, and more where a
            product has it: bias `[rows]`; order of groups; scale and zero of int8.
        numbers: rows, group, blocks, chunk, word, and width of a block in columns.
        inputs: words of channels that a row reads.
        native: the same for the native code, which reads these tensors.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, int]
    inputs: int
    native: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        made = module().Weights({**self.tensors, **self.numbers})  # type: ignore[union-attr]
        object.__setattr__(self, "native", made)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def group(self) -> int:
        """Rows that share their taps."""
        return self.numbers["group"]

    @property
    def values(self) -> int:
        return self.tensors["value"].numel()


def distances(op: Product) -> list[int]:
    """Of the columns of a kernel from the pixel itself."""
    width = op.weight.shape[3] if op.weight.ndim == 4 else 1
    return [n * op.dilation - op.padding for n in range(width)]


def pack(op: Product) -> Packed:
    """The kept weights of a product.

    They are in blocks of input channels that are read together, in each by rows; rows that are
    nearly dense share their taps. Where there are several blocks, rows of equally many taps follow
    each other: a processor guesses the ends of short loops by what was before.
    """
    weight, kept = op.weight.detach().float(), op.weight.detach() != 0
    if weight.ndim == 2:
        weight, kept = weight[:, :, None, None], kept[:, :, None, None]
    rounded: dict[str, Tensor] = {}
    if op.precision == Precision.BF16:
        weight, kept = _in_pairs(weight), _in_pairs(kept.float()) != 0
    elif op.precision == Precision.INT8:
        weight, rounded = _in_quads(weight)
        kept = weight != 0
    rows, per_group, kh, kw = weight.shape
    flat, kept = weight.reshape(rows, -1), kept.reshape(rows, -1)
    group, united = _grouped(kept, op.groups)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -rows % group))
    by_group = flat.view(-1, group, flat.shape[1]).transpose(1, 2)
    share = int(torch.count_nonzero(kept)) / max(1, kept.numel())
    width = _block(per_group, kh * kw, share)
    blocks = -(-per_group // width)
    edges = [min(b * width, per_group) * kh * kw for b in range(blocks + 1)]
    chunk = _chunk(len(united)) if blocks > 1 else 1
    starts, columns, values, orders = [torch.zeros(1, dtype=torch.int64)], [], [], []
    for low, high in itertools.pairwise(edges):
        part = united[:, low:high]
        count = part.sum(1)
        in_chunk = torch.arange(len(united)) // chunk
        order = (in_chunk * (high - low + 1) + count).argsort(stable=True)
        starts.append(count[order])
        place, column = part[order].nonzero(as_tuple=True)
        row = order[place]
        columns.append(column.to(torch.uint16))
        values.append(by_group[row, low + column].reshape(-1))
        orders.append(order.to(torch.int32))
    tensors = rounded | {
        "start": torch.cat(starts).cumsum(0),
        "column": torch.cat(columns),
        "value": torch.cat(values).contiguous().view(torch.float32),
    }
    if blocks > 1:
        tensors["order"] = torch.cat(orders)
    if op.bias is not None:
        tensors["bias"] = op.bias.float().contiguous()
    numbers = {
        "rows": rows, "group": group, "blocks": blocks, "chunk": chunk, "word": int(op.precision),
        "width": width * kh * kw,
    }  # fmt: skip
    return Packed(tensors, numbers, per_group)


def places(
    op: Product, inputs: int, given: Geometry, phased: bool, whole: bool
) -> tuple[int, list[int]]:
    """How far from a position its taps read, in floats.

    Args:
        inputs: words of channels that a row reads.
        given: of the input.
        phased: the input is cut into phases.
        whole: pixels to the side are read from shifted copies.

    Returns:
        From one input to the next, and of every place of the kernel.
    """
    s = op.stride if phased else 1
    step = s * s * given.plane
    copy = step * inputs * op.groups
    near = []
    for y in (n * op.dilation - op.padding for n in range(_height(op))):
        for x in distances(op):
            phase = y % s * s + x % s
            # the copy moved to the right has the pixel to the left
            side = (0, 2, 1)[x // s] * copy if whole else x // s * given.lanes
            near.append(phase * given.plane + y // s * given.pitch + side)
    return step, near


def _height(op: Product) -> int:
    return op.weight.shape[2] if op.weight.ndim == 4 else 1


def _grouped(kept: Tensor, groups: int) -> tuple[int, Tensor]:
    """How many rows share their taps, and the taps of each such group: four where they are full."""
    rows, columns = kept.shape
    if rows // groups % _SHARED and groups > 1:
        return 1, kept
    filled = torch.nn.functional.pad(kept, (0, 0, 0, -rows % _SHARED))
    four = filled.view(-1, _SHARED, columns).any(1)
    taps = _SHARED * int(torch.count_nonzero(four))
    full = int(torch.count_nonzero(kept)) >= _FULL * taps > 0
    return (_SHARED, four) if full else (1, kept)


def _in_pairs(weight: Tensor) -> Tensor:
    """Channels two by two: `[rows, channels, ...]` to `[rows, channels / 2, ...]` of int32."""
    odd = weight.shape[1] % 2
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, odd))
    bits = padded.bfloat16().view(torch.int16).int() & 0xFFFF
    return bits[:, ::2] | bits[:, 1::2] << 16


def _in_quads(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Channels four by four: `[rows, channels, ...]` to `[rows, channels / 4, ...]` of int32.

    Returns:
        Words of four int8; and by rows the scale of sums for inputs of magnitude 1, and what sums
        begin with because inputs are moved by 128.
    """
    largest = weight.abs().amax((1, 2, 3))
    scale = largest / 127
    whole = (weight / scale.where(scale > 0, 1.0)[:, None, None, None]).round()
    missing = -weight.shape[1] % 4
    padded = torch.nn.functional.pad(whole, (0, 0, 0, 0, 0, missing)).to(torch.int8)
    by_four = padded.view(len(padded), -1, 4, *padded.shape[2:]).movedim(2, -1)
    words = by_four.flatten().view(torch.int32).view(by_four.shape[:-1])
    zero = -128 * whole.sum((1, 2, 3), dtype=torch.float64)
    return words, {"scale": scale / 127, "zero": zero.to(torch.int32)}


def _chunk(groups: int) -> int:
    """Groups that may change places; threads share out whole chunks."""
    return _CHUNK if groups >= 8 * _CHUNK else _CHUNK // 4


def _block(channels: int, kernel: int, share: float) -> int:
    """Input channels in a block of taps: what a run of positions reads of them fits the cache."""
    most = min(channels, _COLUMNS // kernel)
    if kernel > 1:  # neighbouring taps read the same pixels, that is enough
        return most
    worth = _TAPS / max(1e-6, share)  # fewer taps do not pay for storing the sums
    return int(min(most, max(_CACHE // (64 * _RUN), worth)))
