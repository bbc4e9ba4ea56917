"""Tensors that FSDP2 shards: reading them whole, writing the part that lives here.

A DTensor is recognized by its methods, so that `torch.distributed.tensor` is imported only where
it is in use. Masks are kept whole on every rank (one byte a weight): all ranks choose them from the
same whole tensors and need not agree afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["is_sharded", "local_mask", "local_part", "whole"]


_PLAIN = (Tensor, nn.Parameter)  # most are; this is asked for every tensor of every step


def is_sharded(tensor: Tensor) -> bool:
    """Is this a DTensor?"""
    return type(tensor) not in _PLAIN and hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks where it is sharded (every rank must call)."""
    if not is_sharded(tensor):
        return tensor
    found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return found


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lives on this rank; writing to it writes the tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return found


def local_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The part of a whole mask that belongs to the part of `like` on this rank, on its device."""
    if not is_sharded(like):
        return mask if mask.device == like.device else mask.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    with torch.no_grad():  # every rank holds the same mask and cuts its own part out
        held = distribute_tensor(mask.to(like.device), mesh, placements, src_data_rank=None)
        return held.to_local()
