"""x (B A + S)^T for a sparse S, without the dense weight of a large layer.

The weight is built, used and dropped in blocks of rows. With x `[tokens, in]`, dy `[tokens, out]`:

    y  = x W^T                      dx = dy W
    G  = dy^T x                     dS = G at the support of S
    dB = G A^T = dy^T (x A^T)       dA = B^T G = (dy B)^T x

A layer that fits into one block is one dense product each. B A goes into the block, and dB, dA come
out of G, where that is less arithmetic than products with x of their own: tokens (out + in) above
out in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["BLOCK_BYTES", "blocks_of", "sparse_low_rank"]

BLOCK_BYTES = 8 << 20
"""What a block of rows of the weight may take, forward or backward."""


def sparse_low_rank(
    x: Tensor, up: Tensor, down: Tensor, values: Tensor, indices: Tensor, limit: int = BLOCK_BYTES
) -> Tensor:
    """x (up down + S)^T, differentiable once in x, up, down and values.

    Args:
        x: `[..., in]`.
        up: B `[out, rank]`.
        down: A `[rank, in]`.
        values: `[n]`, the entries of S.
        indices: `[n]`, their places in the flat `[out, in]`, rising.
        limit: bytes that a block of rows may take.
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Product.apply(flat, up, down, values, indices, limit)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], up.shape[0])


def blocks_of(
    shape: tuple[int, int], indices: Tensor, itemsize: int, limit: int = BLOCK_BYTES
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, their part of the values, places in the flat block) of one block after another."""
    out, width = shape
    rows = max(1, min(out, limit // max(1, width * itemsize)))
    if rows == out:
        yield slice(0, out), slice(0, len(indices)), indices.long()
        return
    starts = list(range(0, out, rows))
    edges = torch.tensor([*(s * width for s in starts), out * width], device=indices.device)
    bounds = torch.searchsorted(indices, edges.to(indices.dtype)).tolist()
    for i, start in enumerate(starts):
        part = slice(bounds[i], bounds[i + 1])
        yield slice(start, min(out, start + rows)), part, indices[part].long() - start * width


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, down: Tensor, values: Tensor, indices: Tensor, limit: int
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, values, indices)
        ctx.limit = limit
        merged = _merges(x, up, down)
        y = x.new_empty(len(x), len(up)) if merged else x @ down.t() @ up.t()
        for rows, part, places in blocks_of((len(up), x.shape[1]), indices, x.itemsize, limit):
            weight = _block(up[rows], down, values[part], places, merged)
            if merged:
                torch.mm(x, weight.t(), out=y[:, rows])
            else:
                y[:, rows].addmm_(x, weight.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, indices = ctx.saved_tensors
        to_x, to_up, to_down, to_values = ctx.needs_input_grad[:4]
        merged = _merges(x, up, down)
        dx = dup = ddown = dvalues = None
        if to_x:
            dx = torch.zeros_like(x) if merged else dy @ up @ down
        if not merged:
            dup = dy.t() @ (x @ down.t()) if to_up else None
            ddown = (dy @ up).t() @ x if to_down else None
        elif to_up or to_down:
            dup, ddown = torch.empty_like(up), torch.zeros_like(down)
        if to_values:
            dvalues = torch.empty_like(values)
        if to_x or to_values or (merged and dup is not None):
            for rows, part, places in blocks_of((len(up), x.shape[1]), indices, x.itemsize,
                                                ctx.limit):  # fmt: skip
                if dx is not None:
                    dx.addmm_(dy[:, rows], _block(up[rows], down, values[part], places, merged))
                if dvalues is None and not merged:
                    continue
                gradient = dy[:, rows].t() @ x
                if dvalues is not None:
                    dvalues[part] = gradient.view(-1)[places]
                if merged and dup is not None and ddown is not None:
                    torch.mm(gradient, down.t(), out=dup[rows])
                    ddown.addmm_(up[rows].t(), gradient)
        return dx, dup if to_up else None, ddown if to_down else None, dvalues, None, None


def _merges(x: Tensor, up: Tensor, down: Tensor) -> bool:
    out, width = len(up), down.shape[1]
    return len(x) * (out + width) > out * width


def _block(up: Tensor, down: Tensor, values: Tensor, places: Tensor, merged: bool) -> Tensor:
    """These rows of B A + S, or of S alone."""
    weight = up @ down if merged else up.new_zeros(len(up), down.shape[1])
    weight.view(-1).index_add_(0, places, values)
    return weight
