"""N:M masks as numbers: which n of m weights are kept, in ceil(log2 C(m, n)) bits a run.

The code of a run is the rank of its m-bit pattern among all patterns with n bits set, in
ascending order (bit i = weight i is kept). 2:4 takes 3 bits instead of the 4 of a bitmask.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sparseworks.core.masks import pack_bits, unpack_bits

__all__ = ["LARGEST_RUN", "code_bits", "codes_to_mask", "mask_to_codes"]

LARGEST_RUN = 16  # tables of 2^m entries


def code_bits(n: int, m: int) -> int:
    """Bits of one code."""
    return math.ceil(math.log2(math.comb(m, n))) if 0 < n < m else 0


@functools.lru_cache(maxsize=8)
def _tables(n: int, m: int) -> tuple[Tensor, Tensor]:
    """(rank of each pattern or -1, pattern of each rank), int32."""
    patterns = torch.arange(1 << m, dtype=torch.int32)
    bits = sum((patterns >> i) & 1 for i in range(m))
    legal = patterns[bits == n]
    ranks = torch.full((1 << m,), -1, dtype=torch.int32)
    ranks[legal.long()] = torch.arange(legal.numel(), dtype=torch.int32)
    return ranks, legal


def mask_to_codes(mask: Tensor, n: int, m: int) -> Tensor | None:
    """Packed uint8 codes of a flat bool mask of whole runs; None when a run does not keep n.

    The number of runs must be a multiple of 8, or these the last of a tensor, so that the bytes
    of consecutive slices can be joined.
    """
    runs = mask.view(-1, m)
    patterns = torch.zeros(runs.shape[0], dtype=torch.int32)
    for i in range(m):
        patterns += runs[:, i].int() << i
    codes = _tables(n, m)[0][patterns]
    if bool((codes < 0).any()):
        return None
    bits = code_bits(n, m)
    return pack_bits((codes[:, None] >> torch.arange(bits, dtype=torch.int32) & 1).bool())


def codes_to_mask(packed: Tensor, runs: int, n: int, m: int) -> Tensor | None:
    """The flat bool mask of `runs` runs; None when a code is out of range."""
    bits = code_bits(n, m)
    digits = unpack_bits(packed, (runs, bits))
    codes = torch.zeros(runs, dtype=torch.int32)
    for i in range(bits):
        codes += digits[:, i].int() << i
    legal = _tables(n, m)[1]
    if bool((codes >= legal.numel()).any()):
        return None
    patterns = legal[codes]
    return (patterns[:, None] >> torch.arange(m, dtype=torch.int32) & 1).bool().reshape(-1)
