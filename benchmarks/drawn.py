"""Random matrices of the patterns that kernels take."""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["FULL", "HALF", "blocked", "generator", "grouped", "inputs", "matrix"]

HALF, FULL = torch.bfloat16, torch.float32


def generator(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.getrandbits(31))


def matrix(draw: random.Random, dtype: torch.dtype = FULL, most: int = 300) -> Tensor:
    """`[rows, columns]`, some of it zero, at times all or nothing, with an empty row at times."""
    g, shape = generator(draw), (draw.randint(1, 80), draw.randint(1, most))
    weight = torch.randn(shape, generator=g) * 10.0 ** draw.randint(-3, 3)
    weight *= torch.rand(shape, generator=g) < draw.choice((0.0, 0.05, 0.3, 0.5, 0.9, 1.0))
    if draw.random() < 0.3:
        weight[draw.randrange(shape[0])] = 0
    return weight.to(dtype)


def _by_mask(draw: random.Random, mask: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.randn(mask.shape, generator=generator(draw)) * mask).to(dtype)


def grouped(draw: random.Random, dtype: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
    """An N:M matrix, some groups with less."""
    m = draw.choice((2, 4, 8, 16))
    n = draw.randint(1, m)
    rows, columns = draw.randint(1, 80), draw.randint(1, 200)
    score = torch.rand(rows, -(-columns // m), m, generator=generator(draw))
    mask = torch.zeros(score.shape, dtype=torch.bool).scatter_(2, score.topk(n, 2).indices, True)
    mask &= score > draw.choice((0.0, 0.2))
    return _by_mask(draw, mask.view(rows, -1)[:, :columns], dtype), (n, m)


def blocked(draw: random.Random) -> tuple[Tensor, tuple[int, int]]:
    block = draw.choice(((16, 16), (16, 32), (32, 16), (32, 32), (48, 32), (64, 64)))
    rows, columns = draw.randint(1, 150), draw.randint(1, 150)
    grid = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator(draw))
    mask = (grid < draw.choice((0.0, 0.1, 0.5, 1.0))).repeat_interleave(block[0], 0)
    return _by_mask(draw, mask.repeat_interleave(block[1], 1)[:rows, :columns], HALF), block


def inputs(draw: random.Random, columns: int, dtype: torch.dtype, most: int = 40) -> Tensor:
    shape = draw.randint(1, most), columns
    return torch.randn(shape, generator=generator(draw)).to(dtype)
