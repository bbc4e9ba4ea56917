"""The kept weights of a product as the native code reads them: distances in memory, and values."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sparseworks.engine.geometry import Geometry
from sparseworks.engine.ir import Precision, Product

__all__ = ["distances", "run_vectors", "taps_of"]

_SHARED = 4  # rows that share their taps where weights are nearly dense
_FULL = 0.72  # share of non-zeros in the taps of four rows from which on sharing pays
_CACHE = 40 << 10  # bytes of the first cache for the inputs of a block of taps
_TAPS = 20  # of a row in a block, at least
_CHUNK = 64  # groups of rows within which they change places, at most


def distances(op: Product) -> Tensor:
    """Of the columns of a kernel from the pixel itself."""
    width = op.weight.shape[3] if op.weight.ndim == 4 else 1
    return torch.arange(width) * op.dilation - op.padding


def taps_of(op: Product, given: Geometry, stride: int, whole: bool) -> dict[str, Any]:
    """The kept weights, as distances from the position itself.

    They are in blocks of input channels that are read together, in each by rows; rows that are
    nearly dense share their taps. Where there are several blocks, rows of equally many taps follow
    each other: a processor guesses the ends of short loops by what was before.

    Args:
        stride: of the pixels that are read; 0: the input is cut into phases.
        whole: pixels to the side are read from shifted copies.
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
    first, local = _places(op, weight.shape, given, stride, whole)
    flat, kept = weight.reshape(rows, -1), kept.reshape(rows, -1)
    group, united = _grouped(kept, op.groups)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -rows % group))
    by_group = flat.view(-1, group, flat.shape[1]).transpose(1, 2)
    share = int(torch.count_nonzero(kept)) / max(1, kept.numel())
    width = _block(given, per_group, kh, kw, share)
    blocks = -(-per_group // width)
    edges = [min(b * width, per_group) * kh * kw for b in range(blocks + 1)]
    chunk = _chunk(len(united)) if blocks > 1 else 1
    starts, offsets, values, orders = [torch.zeros(1, dtype=torch.int64)], [], [], []
    for low, high in itertools.pairwise(edges):
        part = united[:, low:high]
        count = part.sum(1)
        in_chunk = torch.arange(len(united)) // chunk
        order = (in_chunk * (high - low + 1) + count).argsort(stable=True)
        starts.append(count[order])
        place, column = part[order].nonzero(as_tuple=True)
        row = order[place]
        offsets.append((first[row * group] + local[low + column]).to(torch.int32))
        values.append(by_group[row, low + column].reshape(-1))
        orders.append(order.to(torch.int32))
    ordered = {} if blocks == 1 else {"order": torch.cat(orders), "chunk": chunk}
    return (
        ordered
        | rounded
        | {
            "start": torch.cat(starts).cumsum(0),
            "offset": torch.cat(offsets),
            "value": torch.cat(values).contiguous().view(torch.float32),
            "word": int(op.precision),
            "group": group,
            "blocks": blocks,
        }
    )


def _places(
    op: Product, shape: torch.Size, given: Geometry, stride: int, whole: bool
) -> tuple[Tensor, Tensor]:
    """Where a row's first channel begins `[rows]`, and each tap from there `[columns]`."""
    rows, per_group, kh, _ = shape
    y, x = torch.arange(kh) * op.dilation - op.padding, distances(op)
    channels = torch.arange(per_group)[:, None, None]
    step = per_group
    if stride == 0:
        s = op.stride
        channels = channels * s * s + (y % s)[:, None] * s + (x % s)[None, :]
        y, x = y // s, x // s
        step = per_group * s * s
    if whole:  # the copy moved to the right has the pixel to the left
        side = torch.tensor([2, 0, 1])[1 - x] * (step * op.groups * given.plane)
    else:
        side = x * given.lanes
    shift = y[:, None] * given.pitch + side[None, :]
    first = torch.arange(rows) // (rows // op.groups) * step * given.plane
    return first, (channels * given.plane + shift).reshape(-1)


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


def run_vectors(given: Geometry) -> int:
    """Vectors of one channel that are multiplied at once."""
    return min(16, given.plane // 16)


def _chunk(groups: int) -> int:
    """Groups that may change places; threads share out whole chunks."""
    return _CHUNK if groups >= 8 * _CHUNK else _CHUNK // 4


def _block(given: Geometry, channels: int, kh: int, kw: int, share: float) -> int:
    """Input channels in a block of taps: what a run of positions reads of them fits the cache."""
    if kh * kw > 1:  # neighbouring taps read the same pixels, that is enough
        return channels
    fits = max(1, _CACHE // (64 * run_vectors(given)))
    worth = _TAPS / max(1e-6, share)  # fewer taps do not pay for storing the sums
    return int(min(channels, max(fits, worth)))
