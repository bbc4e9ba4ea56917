"""Tensors of files of our own without their zeros: the rest, and a bit a number that says where.

Bits count, as in checkpoints: what is left out is +0.0 (0 of integers), so every bit comes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from sparseworks.core.masks import pack_bits, unpack_bits
from sparseworks.io.bits import WORDS, count_true, words

__all__ = ["thickened", "thinned"]

_OVERHEAD = 128  # bytes of header that one more tensor costs, about


def thinned(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Each tensor as it is, or, where that is less, its `name::values` and `name::bitmask`.

    Returns:
        (the tensors, the shapes of those that are in two)
    """
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        width, n = tensor.dtype.itemsize, tensor.numel()
        found[name] = tensor
        if width not in WORDS:
            continue
        flat = tensor.detach().cpu().contiguous().view(-1)
        stored = words(flat) != 0
        if count_true(stored) * width + n // 8 + _OVERHEAD < n * width:
            del found[name]
            found[f"{name}::values"], found[f"{name}::bitmask"] = flat[stored], pack_bits(stored)
            shapes[name] = list(tensor.shape)
    return found, shapes


def thickened(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The inverse of `thinned`.

    Raises:
        KeyError, ValueError, TypeError: these do not belong together.
    """
    found = dict(tensors)
    for name, shape in shapes.items():
        values, bitmask = found.pop(f"{name}::values"), found.pop(f"{name}::bitmask")
        stored = unpack_bits(bitmask, (math.prod(shape),))
        if count_true(stored) != values.numel() or min(shape, default=0) < 0:
            raise ValueError(f"{name}: its values, places and shape are not of one tensor")
        whole = values.new_zeros(stored.numel())
        words(whole)[stored] = words(values)
        found[name] = whole.view(shape)
    return found
