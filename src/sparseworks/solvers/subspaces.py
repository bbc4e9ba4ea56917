"""Subspaces of the columns of a gradient: chosen columns of a fixed orthogonal basis, or an SVD.

With A `[rows, n]` and an orthogonal Q `[n, n]`, S = A Q; what r columns of Q keep of A is those
columns of S, and ||A - S_I Q_I^T||_F^2 is the sum of the squared norms of the others, so that the
largest by l2 norm are the best r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["basis", "capture", "dct", "largest", "transform_columns"]


def dct(a: Tensor) -> Tensor:
    """The orthonormal DCT-II of every row of `[rows, n]`, in O(n log n) (Makhoul 1980).

    out_k = sqrt(2 / n) c_k sum_j a_j cos(pi k (2 j + 1) / (2 n)),   c_0 = sqrt(1/2), else 1

    Even places in order, odd ones backwards, one real FFT, one turn of the phase.
    """
    n = a.shape[1]
    wide = a if a.dtype in (torch.float32, torch.float64) else a.float()
    order = torch.cat([wide[:, ::2], wide[:, 1::2].flip(1)], 1)
    half = torch.fft.rfft(order)
    k = torch.arange(n // 2 + 1, device=a.device, dtype=wide.dtype)
    angle = -math.pi * k / (2 * n)
    turned = half * torch.complex(torch.cos(angle), torch.sin(angle))
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    out[:, : n // 2 + 1] = turned.real
    rest = n - n // 2 - 1  # a real input: the other half of the spectrum mirrors this one
    if rest:
        out[:, n // 2 + 1 :] = -turned.imag[:, 1 : rest + 1].flip(1)
    out *= math.sqrt(2 / n)
    out[:, 0] *= math.sqrt(0.5)
    return out.to(a.dtype)


def basis(kind: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Q `[n, n]`: "dct", whose columns are the cosines above, or "random", orthogonal."""
    made: Tensor
    if kind == "random":
        drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        made = torch.linalg.qr(drawn)[0]
    else:
        j = torch.arange(n, dtype=torch.float64)
        made = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * (2 * j[:, None] + 1) * j)
        made[:, 0] *= math.sqrt(0.5)
    return made.to(device, dtype)


def transform_columns(a: Tensor, q: Tensor, kind: str) -> Tensor:
    """S = A Q; through the FFT for wide DCTs."""
    return dct(a) if kind == "dct" and len(q) >= 256 else a @ q


def largest(s: Tensor, rank: int, norm: str) -> Tensor:
    """The `rank` columns of the largest l1 or l2 norm, rising; ties keep the first."""
    sizes = s.abs().sum(0) if norm == "l1" else s.square().sum(0)
    chosen: Tensor = sizes.argsort(descending=True, stable=True)[:rank].sort().values
    return chosen


def capture(a: Tensor, kind: str, rank: int, norm: str = "l2") -> float:
    """The share of ||A||_F^2 in the chosen subspace; "svd" is the best there is, "first" fixed."""
    total = float(a.square().sum())
    if kind == "svd":
        return float(torch.linalg.svdvals(a)[:rank].square().sum()) / total
    s = a @ basis("dct" if kind == "first" else kind, a.shape[1], a.dtype, a.device)
    chosen = torch.arange(rank) if kind == "first" else largest(s, rank, norm)
    return float(s[:, chosen].square().sum()) / total
