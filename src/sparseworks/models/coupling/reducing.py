"""Operations that run over axes: sums and statistics, softmax, order, space."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseworks.models.coupling import shapes
from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.provenance import Block, Provenance

__all__ = ["ordered", "reduction", "softmax", "spatial"]


def reduction(call: Call) -> Any:
    tensor = call.first("self", "input")
    dims = call["dim"]
    dims = [] if dims is None else [dims] if isinstance(dims, int) else list(dims)
    keep = bool(call.arguments.get("keepdim", False))
    reason = "" if call.name.startswith("sum") else f"{call.name} over channels"
    out = shapes.reduce(call.atoms, tensor, dims, keep, reason)
    return [out] * len(call.shapes) if len(call.shapes) > 1 else out


def softmax(call: Call) -> Provenance:
    tensor = call["self"]
    if (block := tensor.block(call["dim"])) is not None:
        call.atoms.statistic(block.labels, "softmax over channels")
    return call.atoms.elementwise([tensor], call.shape)


def ordered(call: Call) -> Provenance:
    """roll, flip, cumsum: the order of these axes matters, so they stay."""
    tensor, dims = call["self"], call.first("dims", "dim")
    for dim in [dims] if isinstance(dims, int) else dims:
        call.atoms.freeze(call.atoms.axis(tensor, dim))
    return call.atoms.elementwise([tensor], call.shape)


def spatial(call: Call) -> Any:
    """Pooling and interpolation: batch and channels pass, space stays."""
    tensor = call.first("self", "input")
    rank = len(tensor.shape)
    spatial = [d for d, n in enumerate(call.shape) if d >= 2 or (rank == 3 and d >= 1 and n == 0)]
    out = call.atoms.collapsed(tensor, [d for d in range(rank) if d not in spatial])
    blocks = [b for b in out.blocks if not set(b.dims) & set(spatial)]
    for dim in spatial:
        call.atoms.freeze(call.atoms.axis(out, dim))
    fixed = [Block((d,), np.zeros(call.shape[d], np.int64)) for d in spatial]
    result = Provenance(call.shape, (*blocks, *fixed))
    return [result] * len(call.shapes) if len(call.shapes) > 1 else result
