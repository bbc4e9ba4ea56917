"""Zeros where a mask says so, bit by bit: exact for infinities and NaN too, without a branch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseworks.kernels.native import module

__all__ = ["keep_only", "keep_only_reference"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_only_reference(mask: Tensor, *tensors: Tensor) -> None:
    """The same in torch: eight times as fast on CPUs as `masked_fill_`, which branches."""
    ones: Tensor | None = None
    for tensor in tensors:
        kind = _BITS.get(tensor.element_size())
        if kind is None or tensor.device.type != "cpu":
            tensor.masked_fill_(~mask, 0)
            continue
        bits = tensor.detach().view(kind)
        if ones is None or ones.dtype != kind or ones.stride() != bits.stride():
            ones = torch.empty_like(bits).copy_(mask).neg_()
        bits.bitwise_and_(ones)


def keep_only(mask: Tensor, *tensors: Tensor) -> None:
    """Set what the mask does not keep to exactly +0 in place, infinities and NaN too.

    Args:
        mask: bool, True = kept.
        tensors: of the mask's shape and device, any dtype.
    """
    native = module()
    if native is not None and mask.device.type == "cpu" and mask.is_contiguous():
        n = mask.numel()
        direct: list[Tensor] = []
        rest: list[Tensor] = []
        for t in tensors:
            fits = t.shape == mask.shape and t.is_contiguous() and t.element_size() in _BITS
            (direct if fits and t.device.type == "cpu" else rest).append(t)
        if direct:
            places = [(t.data_ptr(), t.element_size()) for t in direct]
            native.keep_only(mask.data_ptr(), places, n, torch.get_num_threads())
            torch.autograd.graph.increment_version(direct)
        tensors = tuple(rest)
    if tensors:
        keep_only_reference(mask, *tensors)
