"""MLPs of experts over tokens that are sorted by expert.

On CPUs, and where the GPU has no grouped product, one expert after the other on a contiguous
segment, with a backward of its own: slices of one large tensor would each make a gradient of its
full size. On GPUs with bfloat16 `torch._grouped_mm` multiplies all experts at once. `reference`
is the plain loop that both are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Activation", "Weights", "grouped", "reference", "segments", "whole"]

Activation = Callable[[Tensor], Tensor]
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""First matrices `[N, e or 2e, d]`, second `[N, d, e]`, and their biases `[N, ...]` or None."""


def reference(x: Tensor, counts: Sequence[int], w: Weights, act: Activation, gated: bool) -> Tensor:
    """E_i of every row, expert by expert."""
    rows = []
    for i, part in enumerate(torch.split(x, list(counts))):
        hidden = F.linear(part, w[0][i], None if w[2] is None else w[2][i])
        inner = _inner(hidden, act, gated)
        rows.append(F.linear(inner, w[1][i], None if w[3] is None else w[3][i]))
    return torch.cat(rows) if rows else x.new_zeros(0, w[1].shape[1])


def _inner(hidden: Tensor, act: Activation, gated: bool) -> Tensor:
    if not gated:
        return act(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return act(gate) * up


class _Segments(torch.autograd.Function):
    """The loop over segments, with weights' gradients written in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
        counts: Sequence[int], act: Activation, gated: bool,
    ) -> Tensor:  # fmt: skip
        out = x.new_empty(len(x), w2.shape[1])
        hidden = []  # a tensor each: blocks of memory that the allocator uses again
        for i, rows in _used(counts):
            hidden.append(F.linear(x[rows], w1[i], None if b1 is None else b1[i]))
            inner = _inner(hidden[-1], act, gated)
            if b2 is None:
                torch.mm(inner, w2[i].t(), out=out[rows])
            else:
                torch.addmm(b2[i], inner, w2[i].t(), out=out[rows])
        ctx.save_for_backward(x, w1, w2, *hidden)
        ctx.counts, ctx.act, ctx.gated = counts, act, gated
        ctx.biases = b1 is not None, b2 is not None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, w1, w2, *hidden = ctx.saved_tensors
        gx, g1, g2 = torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2)
        gb1 = w1.new_zeros(w1.shape[:2]) if ctx.biases[0] else None
        gb2 = w2.new_zeros(w2.shape[:2]) if ctx.biases[1] else None
        half = w1.shape[1] // 2 if ctx.gated else w1.shape[1]
        for i, count in enumerate(ctx.counts):
            if not count:
                g1[i], g2[i] = 0, 0
        for (i, rows), h in zip(_used(ctx.counts), hidden, strict=True):
            dy, part = g[rows], x[rows]
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in h.split(half, dim=1)]
                inner = ctx.act(leaves[0])
                inner = inner * leaves[1] if ctx.gated else inner
            torch.mm(dy.t(), inner.detach(), out=g2[i])
            grads = torch.autograd.grad(inner, leaves, dy @ w2[i])
            for place, dh in enumerate(grads):
                own = slice(place * half, (place + 1) * half)
                torch.mm(dh.t(), part, out=g1[i, own])
                if place == 0:
                    torch.mm(dh, w1[i, own], out=gx[rows])
                else:
                    gx[rows].addmm_(dh, w1[i, own])
                if gb1 is not None:
                    torch.sum(dh, 0, out=gb1[i, own])
            if gb2 is not None:
                torch.sum(dy, 0, out=gb2[i])
        return gx, g1, g2, gb1, gb2, None, None, None


def _used(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of those that have rows."""
    found, start = [], 0
    for i, count in enumerate(counts):
        if count:
            found.append((i, slice(start, start + count)))
        start += count
    return found


def segments(x: Tensor, counts: Sequence[int], w: Weights, act: Activation, gated: bool) -> Tensor:
    """E_i of every row; rows of expert i follow those of expert i - 1.

    Args:
        x: `[rows, d]`.
        counts: rows of each expert.
        w: the banks.
        act: of the hidden units, without state.
        gated: the first matrices hold gates above values.
    """
    found: Tensor = _Segments.apply(x.contiguous(), *w, list(counts), act, gated)  # type: ignore[no-untyped-call]
    return found


def grouped(x: Tensor, counts: Tensor, w: Weights, act: Activation, gated: bool) -> Tensor:
    """The same by the fastest way there is here.

    Args:
        counts: rows of each expert, on the device of x.
    """
    if not _grouped_mm(x, w):
        return segments(x, counts.tolist(), w, act, gated)
    ends = counts.cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(counts, output_size=len(x))
    hidden = torch._grouped_mm(x, w[0].transpose(1, 2), offs=ends)
    hidden = hidden if w[2] is None else hidden + w[2][expert]
    out = torch._grouped_mm(_inner(hidden, act, gated), w[1].transpose(1, 2), offs=ends)
    return out if w[3] is None else out + w[3][expert]


def _grouped_mm(x: Tensor, w: Weights) -> bool:
    """Is there a grouped product of all experts for these?"""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return False
    aligned = all(t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0 for t in w[:2])
    return len(x) > 0 and aligned and torch.cuda.get_device_capability(x.device) >= (8, 0)


def whole(x: Tensor, weights: Tensor, w: Weights, act: Activation, gated: bool) -> Tensor:
    """sum_i w_ti E_i(x_t) with every expert computed for every token, as one wide MLP.

    Args:
        weights: `[rows, N]`.
    """
    n, _, e = w[1].shape
    hidden = F.linear(x, w[0].flatten(0, 1), None if w[2] is None else w[2].flatten())
    inner = _inner(hidden.view(*hidden.shape[:-1], n, -1), act, gated) * weights[..., None]
    out = inner.flatten(-2) @ w[1].permute(0, 2, 1).reshape(n * e, -1)
    return out if w[3] is None else out + weights @ w[3]
