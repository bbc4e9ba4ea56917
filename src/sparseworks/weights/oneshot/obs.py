"""The optimal-brain-surgeon column solver under SparseGPT.

For min ||W X - W' X||^2 with H = X X^T, eliminating columns left to right needs U, the upper
Cholesky factor of H^-1 (H^-1 = U^T U): removing w_j costs w_j^2 / U_jj^2 and is compensated by
W[:, j:] -= (w_j / U_jj) U[j, j:].

U itself is never made. With H = R R^T, R upper triangular, U = R^-1, and the change D = W - W' of
all columns and the errors E (w_j / U_jj) belong together by D = E U, so E = D R. When the columns
before a block are done, the block B is W_B + D_before R_before,B U_BB: one matrix product with R
itself and one with the inverse of a small triangle. So R costs one Cholesky factorisation, of H
with its axes reversed, and what a block does to later ones is never written but read once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseworks.core.errors import ModelError, PatternError
from sparseworks.core.patterns import NM, Block, Pattern, Unstructured
from sparseworks.core.selection import keep_top
from sparseworks.kernels.elimination import eliminate, eliminate_reference
from sparseworks.kernels.selection import keep_largest, keep_largest_per_row

__all__ = ["column_solve", "energy", "prepare_hessian", "row_grid", "upper_factor"]

_PIECE = 1 << 20  # numbers that are moved at once
_WIDE = 512  # columns for which those before are multiplied at once: narrower products are slower
_BAND = 512  # columns of which `energy` multiplies at once
Quantize = Callable[[Tensor], Tensor]


def prepare_hessian(
    hessian: Tensor, damping: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """The damped Hessian and the dead columns (inputs that are always zero).

    H_jj = 0 is set to 1 first; then damping * mean(diag H) is added to the diagonal, in place where
    `overwrite`.
    """
    damped = hessian if overwrite else hessian.clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damping * diagonal.mean()
    return damped, dead


def energy(weight: Tensor, hessian: Tensor) -> float:
    """1/2 tr(W H W^T), the loss of a matrix whose weights are all removed.

    H is symmetric, so one side of its diagonal is enough: half of the multiply-adds of W H.

    Args:
        weight: `[out, in]` fp32.
        hessian: `[in, in]`.
    """
    total = 0.0
    for start in range(0, weight.shape[1], _BAND):
        end = min(start + _BAND, weight.shape[1])
        band = weight[:, start:end]
        product = (band @ hessian[start:end, start:end]).mul_(0.5)
        if start:
            product.addmm_(weight[:, :start], hessian[:start, start:end])
        total += float(torch.sum(product.mul_(band)))
    return total


def upper_factor(hessian: Tensor, *, overwrite: bool = False) -> Tensor:
    """R, upper triangular, with H = R R^T.

    With J the reversal of the axes and J H J = L L^T, R = J L J. The result is stored by columns:
    its transpose is contiguous.

    Args:
        hessian: `[in, in]`, symmetric.
        overwrite: it may be destroyed: the result, and all on the way, then takes its place, and
            memory holds one matrix instead of two.

    Raises:
        ModelError: H is not positive definite even after damping.
    """
    work = hessian if overwrite and hessian.is_contiguous() else hessian.clone(
        memory_format=torch.contiguous_format
    )  # fmt: skip
    _reverse(work)
    info = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(work.mT, out=(work.mT, info))  # work: L^T, by rows
    if int(info):
        raise ModelError(
            "the Hessian of the calibration inputs is not positive definite; "
            "give more calibration data or a larger `damping`"
        )
    _reverse(work)  # R^T
    return work.mT


def _reverse(matrix: Tensor) -> None:
    """J M J in place: the numbers of a contiguous matrix from last to first."""
    flat = matrix.view(-1)
    half, size = flat.numel() // 2, flat.numel()
    for start in range(0, half, _PIECE):
        end = min(start + _PIECE, half)
        front, back = flat[start:end], flat[size - end : size - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def column_solve(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    keep: int,
    *,
    allowed: Tensor | None = None,
    block: int = 128,
    quantize: Quantize | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Prune and compensate one matrix.

    Args:
        weight: `[out, in]` fp32; columns of dead inputs already zero.
        factor: R of `upper_factor`, `[in, in]`.
        pattern: unstructured, row, N:M, or blocks.
        keep: units to keep.
        allowed: bool `[out, in]`; False = masked before, stays masked.
        block: columns whose mask is chosen together from their current values.
        quantize: maps kept values `[out]` onto a grid, whose error is compensated too.
        overwrite: the weight may be destroyed: the change takes its place.

    Returns:
        (weight, mask, loss): new weights, bool mask, and the loss 1/2 tr(D H D^T), D the change.
    """
    rows, columns = weight.shape
    chooser = _Chooser(pattern, keep, rows, columns)
    block = chooser.align(min(block, columns))
    wide = block * max(1, _WIDE // block)
    change = weight if overwrite else weight.clone()  # of the columns that are done, W of others
    new = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    loss = 0.0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        own = factor[start:end, start:end]
        eye = torch.eye(end - start, dtype=own.dtype, device=own.device)
        inverse = torch.linalg.solve_triangular(own, eye, upper=True)
        values = change[:, start:end].clone(memory_format=torch.contiguous_format)
        first = start - start % wide
        if start == first:
            carried = change[:, :start] @ factor[:start, start : start + wide]
        part = carried[:, start - first : end - first]
        if start > first:
            part = torch.addmm(part, change[:, first:start], factor[first:start, start:end])
        values.addmm_(part, inverse)
        free = None if allowed is None else allowed[:, start:end]
        diagonal = inverse.diagonal()
        if chooser.up_front:
            kept = chooser.block((values / diagonal).square_(), start, end, free)
        else:
            kept = torch.empty(values.shape, dtype=torch.bool, device=values.device)
        if chooser.up_front and quantize is None:
            loss += eliminate(values, kept, inverse) / 2
        else:
            choose = None if chooser.up_front else chooser.strips(diagonal, start, free)
            loss += eliminate_reference(
                values, kept, inverse, quantize=quantize, choose=choose, width=chooser.width
            ) / 2  # fmt: skip
        new[:, start:end] = values
        mask[:, start:end] = kept
        change[:, start:end] -= values
    return new, mask, loss


class _Chooser:
    """Which weights of the next columns go.

    The number kept after each block follows the overall share exactly: after column c,
    dropped = floor(all dropped * c / in).
    """

    def __init__(self, pattern: Pattern, keep: int, rows: int, columns: int) -> None:
        self.pattern, self.rows, self.columns = pattern, rows, columns
        self.up_front = isinstance(pattern, Unstructured)
        if isinstance(pattern, NM):
            self.width = pattern.m
        elif isinstance(pattern, Block):
            self.width = pattern.w
        elif self.up_front:
            self.width = 1
        else:
            raise PatternError(
                f"sparsegpt compensates column by column and cannot take pattern {pattern}; "
                "use unstructured, row, N:M or blockHxW"
            )
        pattern.check((rows, columns))
        self.drop = pattern.units((rows, columns)) - keep

    def align(self, size: int) -> int:
        """The size as a multiple of the pattern's width."""
        return self.width * max(1, size // self.width)

    def _drop_between(self, start: int, end: int, drop: int) -> int:
        return drop * end // self.columns - drop * start // self.columns

    def block(self, scores: Tensor, start: int, end: int, free: Tensor | None) -> Tensor:
        """Mask `[out, columns]` of a block of columns, unstructured or per row."""
        if free is not None:
            scores = scores.masked_fill(~free, -1.0)
        assert isinstance(self.pattern, Unstructured)
        if self.pattern.scope == "tensor":
            dropped = self._drop_between(start, end, self.drop)
            mask = keep_largest(scores, scores.numel() - dropped)
        else:
            dropped = self._drop_between(start, end, self.drop // self.rows)
            mask = keep_largest_per_row(scores, scores.shape[1] - dropped)
        return mask if free is None else mask & free

    def strips(
        self, diagonal: Tensor, start: int, free: Tensor | None
    ) -> Callable[[Tensor, int], Tensor]:
        """Chooses the masks of the next `width` columns of the block at `start` from their current
        values, both `[width, out]`: N:M or blocks."""

        def choose(values: Tensor, first: int) -> Tensor:
            scores = (values / diagonal[first : first + self.width, None]).square_()
            own = None if free is None else free[:, first : first + self.width].t()
            if own is not None:
                scores = scores.masked_fill(~own, -1.0)
            mask = self._strip(scores, start + first)
            return mask if own is None else mask & own

        return choose

    def _strip(self, scores: Tensor, start: int) -> Tensor:
        if isinstance(self.pattern, NM):
            return self.pattern.select_columns(scores)
        assert isinstance(self.pattern, Block)
        height = self.pattern.h
        pooled = scores.clamp_min(0).view(self.width, -1, height).sum(dim=(0, 2))
        dropped = self._drop_between(start, start + self.width, self.drop)
        kept = keep_top(pooled, pooled.numel() - dropped)
        return kept.repeat_interleave(height)[None, :].expand(self.width, -1)


def row_grid(weight: Tensor, bits: int) -> Quantize:
    """Round-to-nearest on a uniform grid per row that contains 0.

    lo = min(0, min w), hi = max(0, max w), scale = (hi - lo) / (2^bits - 1),
    zero = round(-lo / scale), q = scale * (clamp(round(w / scale) + zero) - zero).
    """
    levels = (1 << bits) - 1
    low = weight.amin(1).clamp_max(0.0)
    high = weight.amax(1).clamp_min(0.0)
    scale = ((high - low) / levels).clamp_min(2.0**-24).half().float()  # as formats store it
    zero = torch.round(-low / scale)

    def quantize(column: Tensor) -> Tensor:
        return scale * (torch.clamp(torch.round(column / scale) + zero, 0, levels) - zero)

    return quantize
