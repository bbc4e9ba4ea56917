"""The bits of weights: as integers, counted, and with or without the signs of zeros."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["WORDS", "count_true", "has_signed_zero", "top_bit", "without_signed_zeros", "words"]

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# their bits with only the top one set are NaN or 2
_ONE_ZERO = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)


def words(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor as integers of its width."""
    return tensor.view(WORDS[tensor.dtype.itemsize])


def top_bit(dtype: torch.dtype) -> int:
    """The integer in which only the top bit is set: -0.0 where `has_signed_zero`."""
    return -(1 << (8 * dtype.itemsize - 1))


def count_true(mask: Tensor) -> int:
    """How many are True; numpy counts bytes many times faster than torch sums them."""
    return int(np.count_nonzero(mask.numpy()))


def has_signed_zero(dtype: torch.dtype) -> bool:
    """Whether a number of this type can be -0.0."""
    return dtype.is_complex or (dtype.is_floating_point and dtype not in _ONE_ZERO)


def without_signed_zeros(values: Tensor) -> Tensor:
    """+0.0 for every -0.0 of a flat contiguous tensor, all other bits as they are.

    Real and imaginary parts count alone. What holds no -0.0 is returned as it is, not copied.
    """
    dtype = values.dtype
    if not has_signed_zero(dtype):
        return values
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    bits = values.view(WORDS[width])
    negative = bits == -(1 << (8 * width - 1))
    return bits.masked_fill(negative, 0).view(dtype) if count_true(negative) else values
