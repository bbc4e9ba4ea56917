"""Rounding weights to integers with a scale for each group of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Grid", "least_error", "round_groups", "row_steps"]

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the largest weight, that its code stands for


@dataclass(frozen=True)
class Grid:
    """weight = scale * (code - zero).

    Args:
        codes: int8 `[rows, groups, columns of a group]`.
        scale: fp16 `[rows, groups]`.
        zero: int8 `[rows, groups]`, or None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def weight(self) -> Tensor:
        """`[rows, columns]`, fp32."""
        codes = self.codes.float()
        if self.zero is not None:
            codes = codes - self.zero.float()[..., None]
        return (codes * self.scale.float()[..., None]).flatten(1)

    def fits(self, rows: int, columns: int, group: int, bits: int) -> bool:
        """Is this a matrix of that size in such groups, of codes of so many bits?"""
        if columns % group or self.codes.shape != (rows, columns // group, group) or not bits:
            return False
        top = 2 ** (bits - 1)
        return bool(-top <= int(self.codes.min()) and int(self.codes.max()) < top)

    def part(self, first: int, count: int, fill: int = 0) -> Grid:
        """Some rows, and `fill` rows of zeros after them."""
        end = first + count
        zero = None if self.zero is None else F.pad(self.zero[first:end], (0, 0, 0, fill))
        codes = F.pad(self.codes[first:end], (0, 0, 0, 0, 0, fill))
        return Grid(codes, F.pad(self.scale[first:end], (0, 0, 0, fill)), zero)

    def finer(self, group: int) -> Grid | None:
        """The same numbers in groups of `group` columns; None where these do not divide its own."""
        own = self.codes.shape[2]
        if own % group:
            return None
        many = own // group
        zero = None if self.zero is None else self.zero.repeat_interleave(many, 1)
        codes = self.codes.reshape(self.codes.shape[0], -1, group)
        return Grid(codes, self.scale.repeat_interleave(many, 1), zero)


def round_groups(
    weight: Tensor,
    kept: Tensor,
    group: int,
    bits: int,
    importance: Tensor | None = None,
    zeros: bool = False,
    steps: Tensor | None = None,
) -> Grid:
    """Codes and scales that leave the least sum h (w - scale (code - zero))^2 in each group.

    Scales are tried from that of the largest weight (for 4 bits with its code at either end) down
    to 0.8 of it, and `steps`.

    Args:
        weight: fp32 `[rows, columns]`, columns a multiple of `group`; 0 where not kept.
        kept: bool, the same shape.
        group: columns that share a scale.
        bits: of a code, 4 or 8.
        importance: `[columns]`, h; None: 1.
        zeros: also find a zero point, from the smallest and largest kept weight.
        steps: `[rows]`, scales to be tried as well (see `row_steps`).
    """
    rows, columns = weight.shape
    w = weight.view(rows, columns // group, group)
    m = kept.view_as(w)
    h = None if importance is None else importance.view(1, -1, group)
    top = 2 ** (bits - 1) - 1
    if zeros:
        return _with_zeros(w, m, bits)
    largest = w.abs().amax(2)
    tried = [largest / top]
    if bits < 8:  # the code -8 has no partner, so that it may stand for the largest
        signed = w.gather(2, w.abs().argmax(2, keepdim=True)).squeeze(2)
        tried = [base * s for base in (*tried, signed / -(top + 1)) for s in _SHRINK]
    if steps is not None:
        tried.append(steps[:, None].expand_as(largest))
    codes, scale = least_error(w, (base.half() for base in tried), partial(_codes, top=top), h)
    return Grid(codes, scale)


def least_error(
    w: Tensor,
    scales: Iterable[Tensor],
    codes_of: Callable[[Tensor, Tensor], Tensor],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of some scales the one that leaves the least sum h (w - scale code)^2 in each group.

    Args:
        w: fp32 `[rows, groups, columns of a group]`.
        scales: `[rows, groups]` each, of one dtype.
        codes_of: codes of `w` for a scale, whole numbers in fp32.
        importance: h, to be broadcast over `w`; None: 1.

    Returns:
        int8 codes of the shape of `w`, and the scales.
    """
    least = torch.full(w.shape[:2], torch.inf)
    best, chosen = torch.zeros(w.shape, dtype=torch.int8), None
    for scale in scales:
        codes = codes_of(w, scale)
        error = (codes * scale.float()[..., None]).sub_(w).square_()
        total = error.sum(2) if importance is None else (error * importance).sum(2)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better[..., None], codes.to(torch.int8), best)
        chosen = torch.where(better, scale, torch.zeros_like(scale) if chosen is None else chosen)
    assert chosen is not None
    return best, chosen


def row_steps(weight: Tensor, most: int = 512) -> Tensor | None:
    """`[rows]`: the distance of neighbouring values, where rows hold few values; None elsewhere.

    Rows that were rounded to a grid before hold few values, all whole multiples of one step; the
    least distance between two of them is that step in all but odd cases.
    """
    if weight.shape[1] < 64:
        return None
    some = weight[:: max(1, weight.shape[0] // 4)][:4].float()
    if any(row.unique().numel() > min(most, weight.shape[1] // 4) for row in some):
        return None
    ordered = weight.float().abs().sort(1).values
    gaps = torch.diff(ordered, dim=1, prepend=torch.zeros(weight.shape[0], 1))
    gaps[gaps <= 1e-6 * ordered[:, -1:]] = torch.inf
    found = gaps.amin(1)
    return torch.where(torch.isfinite(found), found, 0.0)


def _codes(w: Tensor, scale: Tensor, top: int) -> Tensor:
    wide = scale.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    return (w * inverse[..., None]).round_().clamp_(-top - 1 if top < 127 else -top, top)


def _with_zeros(w: Tensor, m: Tensor, bits: int) -> Grid:
    """scale = (max - min) / (2^b - 1), zero = round(-min / scale), of kept weights of a group."""
    low = torch.where(m, w, torch.inf).amin(2)
    high = torch.where(m, w, -torch.inf).amax(2)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # 0 is on the grid
    scale = ((high - low) / (2**bits - 1)).half()
    wide = scale.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    half = 2 ** (bits - 1)
    zero = (-low * inverse).round_().clamp_(0, 2**bits - 1) - half
    codes = (w * inverse[..., None]).round_() + zero[..., None]
    codes = codes.clamp_(-half, half - 1)
    return Grid(codes.to(torch.int8), scale, zero.to(torch.int8))
