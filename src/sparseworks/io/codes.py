"""N:M masks as numbers: which n of m weights are kept, in ceil(log2 C(m, n)) bits a run.

The code of a run is the rank of its m-bit pattern among all patterns with n bits set, in
ascending order (bit i = weight i is kept). 2:4 takes 3 bits instead of the 4 of a bitmask. Codes
follow one another without gaps, lowest bit first.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseworks.core.masks import pack_bits

__all__ = ["LARGEST_RUN", "code_bits", "codes_to_mask", "mask_to_codes", "n_of_m"]

LARGEST_RUN = 16  # tables of 2^m entries


def n_of_m(pattern: str) -> tuple[int, int]:
    """(n, m) of a mask's pattern that codes can stand for; (0, 0) of any other."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    return (n, m) if 0 < n < m <= LARGEST_RUN else (0, 0)


def code_bits(n: int, m: int) -> int:
    """Bits of one code."""
    return math.ceil(math.log2(math.comb(m, n))) if 0 < n < m else 0


@functools.lru_cache(maxsize=8)
def _tables(n: int, m: int) -> tuple[NDArray[np.int32], Tensor]:
    """(rank of each m-bit pattern or -1, bool `[C(m, n), m]` of each rank)."""
    patterns = np.arange(1 << m)
    bits = (patterns[:, None] >> np.arange(m) & 1).astype(bool)
    legal = bits.sum(1) == n
    ranks = np.full(1 << m, -1, dtype=np.int32)
    ranks[legal] = np.arange(legal.sum())
    return ranks, torch.from_numpy(bits[legal])


def _patterns(mask: Tensor, m: int) -> NDArray[np.integer]:
    """Each run of m as an m-bit number."""
    if m in (2, 4, 8, 16):  # whole runs in the bytes of the packed mask
        packed = pack_bits(mask).numpy()
        if m == 16:
            padded = packed if packed.size % 2 == 0 else np.append(packed, np.uint8(0))
            return padded.view("<u2")[: mask.numel() // 16]
        shifts = np.arange(0, 8, m, dtype=np.uint8)
        parts = (packed[:, None] >> shifts) & np.uint8((1 << m) - 1)
        return parts.reshape(-1)[: mask.numel() // m]
    runs = mask.view(-1, m).numpy()
    return sum(runs[:, i].astype(np.uint16) << np.uint16(i) for i in range(m))  # type: ignore[return-value]


def mask_to_codes(mask: Tensor, n: int, m: int) -> Tensor | None:
    """Packed uint8 codes of a flat bool mask of whole runs; None when a run does not keep n.

    The number of runs must be a multiple of 8, or these the last of a tensor, so that the bytes
    of consecutive slices can be joined.
    """
    codes = _tables(n, m)[0][_patterns(mask, m)]
    if codes.size and int(codes.min()) < 0:
        return None
    bits = code_bits(n, m)
    size = (codes.size * bits + 7) // 8
    groups = np.zeros((-(-codes.size // 8), 8), dtype=np.uint64)
    groups.reshape(-1)[: codes.size] = codes
    low = np.zeros(groups.shape[0], dtype=np.uint64)  # 8 codes take `bits` whole bytes
    high = np.zeros_like(low)
    for i in range(8):
        start = i * bits
        if start < 64:
            low |= groups[:, i] << np.uint64(start)
            if start + bits > 64:
                high |= groups[:, i] >> np.uint64(64 - start)
        else:
            high |= groups[:, i] << np.uint64(start - 64)
    both = np.stack([low, high], axis=1).view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(both[:, :bits]).reshape(-1)[:size].copy())


def codes_to_mask(packed: Tensor, runs: int, n: int, m: int) -> Tensor | None:
    """The flat bool mask of `runs` runs; None when a code is out of range."""
    bits = code_bits(n, m)
    groups = -(-runs // 8)
    raw = np.zeros(groups * bits, dtype=np.uint8)
    raw[: packed.numel()] = packed.numpy()
    both = np.zeros((groups, 16), dtype=np.uint8)
    both[:, :bits] = raw.reshape(groups, bits)
    low, high = both.view("<u8").T.copy()
    codes = np.empty((groups, 8), dtype=np.int32)
    for i in range(8):
        start = i * bits
        if start < 64:
            part = low >> np.uint64(start)
            if start + bits > 64:
                part |= high << np.uint64(64 - start)
        else:
            part = high >> np.uint64(start - 64)
        codes[:, i] = part & np.uint64((1 << bits) - 1)
    flat = codes.reshape(-1)[:runs]
    legal = _tables(n, m)[1]
    if flat.size and int(flat.max()) >= legal.shape[0]:
        return None
    return legal.index_select(0, torch.from_numpy(flat)).view(-1)
