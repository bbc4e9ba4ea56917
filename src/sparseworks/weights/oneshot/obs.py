"""The optimal-brain-surgeon column solver under SparseGPT.

For min ||W X - W' X||^2 with H = X X^T, eliminating columns left to right needs only U, the upper
Cholesky factor of H^-1 (H^-1 = U^T U): removing w_j costs w_j^2 / U_jj^2 and is compensated by
W[:, j:] -= (w_j / U_jj) U[j, j:].

Three things make it fast on a CPU: U comes from one Cholesky factorisation of H with its axes
reversed and one blocked triangular inverse (instead of factorise, invert, factorise again); weights
are kept transposed, so that a column is contiguous; and compensation is lazy at two levels, inside
sub-blocks of 32 columns and of blocks of 128, so that nearly all work is matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparseworks.core.errors import ModelError, PatternError
from sparseworks.core.patterns import NM, Block, Pattern, Unstructured
from sparseworks.core.selection import keep_top, keep_top_per_row

__all__ = ["column_solve", "energy", "inverse_factor", "prepare_hessian"]

_SUB = 32
_PIECE = 1 << 20  # numbers that are moved at once
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


def inverse_factor(hessian: Tensor, *, overwrite: bool = False) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U.

    With J the reversal of the axes and J H J = L L^T, R = J L J is upper and H = R R^T; U = R^-1.
    The result is stored by columns: its transpose is contiguous.

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
    _invert_lower(work)
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


def _invert_lower(lower: Tensor) -> None:
    """Inverse of a lower triangular matrix in its place, by halves: n^3 / 3 multiply-adds, mostly
    products."""
    size = lower.shape[0]
    if size <= 256:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = (size // 2 + 63) // 64 * 64
    _invert_lower(lower[:half, :half])
    _invert_lower(lower[half:, half:])
    product = lower[half:, half:] @ lower[half:, :half]
    lower[half:, :half].addmm_(product, lower[:half, :half], beta=0.0, alpha=-1.0)


def column_solve(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    keep: int,
    *,
    allowed: Tensor | None = None,
    block: int = 128,
    quantize: Quantize | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Prune and compensate one matrix.

    Args:
        weight: `[out, in]` fp32; columns of dead inputs already zero.
        factor: U of `inverse_factor`, `[in, in]`.
        pattern: unstructured, row, N:M, or blocks.
        keep: units to keep.
        allowed: bool `[out, in]`; False = masked before, stays masked.
        block: columns whose mask is chosen together from their current values.
        quantize: maps kept values `[out]` onto a grid, whose error is compensated too.

    Returns:
        (weight, mask, loss): new weights, bool mask, and the loss 1/2 tr(D H D^T), D the change.
    """
    rows, columns = weight.shape
    chooser = _Chooser(pattern, keep, rows, columns)
    block = chooser.align(min(block, columns))
    sub = chooser.align(min(_SUB, block))
    work = torch.empty(columns, rows, dtype=weight.dtype, device=weight.device)
    work.copy_(weight.t())  # [in, out]: a column of W is a contiguous row
    mask = torch.ones(work.shape, dtype=torch.bool, device=work.device)
    free = None if allowed is None else allowed.t().contiguous()
    diagonal = factor.diagonal()
    loss = 0.0
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty(end - start, rows, dtype=work.dtype, device=work.device)
        if chooser.up_front:
            scores = (work[start:end] / diagonal[start:end, None]).square_()
            mask[start:end] = chooser.block(scores, start, end, _part(free, start, end))
        for first in range(start, end, sub):
            last = min(first + sub, end)
            for j in range(first, last):
                if not chooser.up_front and j % chooser.width == 0:
                    stop = j + chooser.width
                    scores = (work[j:stop] / diagonal[j:stop, None]).square_()
                    mask[j:stop] = chooser.strip(scores, j, _part(free, j, stop))
                kept = work[j] * mask[j]
                if quantize is not None:
                    kept = quantize(kept) * mask[j]
                error = torch.sub(work[j], kept, out=errors[j - start]).div_(diagonal[j])
                work[j] = kept
                if j + 1 < last:
                    work[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1.0)
            if last < end:
                part = factor[first:last, last:end].t()
                work[last:end].addmm_(part, errors[first - start : last - start], alpha=-1.0)
        flat = errors.view(-1)
        loss += float(torch.dot(flat, flat)) / 2
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    return work.t(), mask.t(), loss


def _part(matrix: Tensor | None, start: int, end: int) -> Tensor | None:
    return None if matrix is None else matrix[start:end]


class _Chooser:
    """Which weights of the next columns go, on transposed scores `[columns, out]`.

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
        """Mask of a block of columns, unstructured or per row."""
        if free is not None:
            scores = scores.masked_fill(~free, -1.0)
        assert isinstance(self.pattern, Unstructured)
        if self.pattern.scope == "tensor":
            dropped = self._drop_between(start, end, self.drop)
            mask = keep_top(scores.t().contiguous(), scores.numel() - dropped).t()
        else:
            dropped = self._drop_between(start, end, self.drop // self.rows)
            mask = keep_top_per_row(scores.t().contiguous(), scores.shape[0] - dropped).t()
        return mask if free is None else mask & free

    def strip(self, scores: Tensor, start: int, free: Tensor | None) -> Tensor:
        """Mask of the next `width` columns from their current values, N:M or blocks."""
        if free is not None:
            scores = scores.masked_fill(~free, -1.0)
        if isinstance(self.pattern, NM):
            mask = self.pattern.select_columns(scores)
        else:
            assert isinstance(self.pattern, Block)
            height = self.pattern.h
            pooled = scores.clamp_min(0).view(self.width, -1, height).sum(dim=(0, 2))
            dropped = self._drop_between(start, start + self.width, self.drop)
            kept = keep_top(pooled, pooled.numel() - dropped)
            mask = kept.repeat_interleave(height)[None, :].expand(self.width, -1)
        return mask if free is None else mask & free


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
