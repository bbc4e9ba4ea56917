"""Operations that take or put entries by tensors of indices."""

from __future__ import annotations

import numpy as np

from sparseworks.models.coupling import shapes
from sparseworks.models.coupling.calls import Call
from sparseworks.models.coupling.provenance import Block, Provenance

__all__ = ["embedding", "index_add", "index_put", "index_select", "indexed"]


def indexed(call: Call) -> Provenance:
    """x[i, j, :] with tensors of indices: their axes are fixed, the others pass."""
    tensor, indices = call["self"], list(call["indices"])
    rank = len(tensor.shape)
    indices += [None] * (rank - len(indices))
    used = [d for d, i in enumerate(indices) if i is not None]
    tensor = call.atoms.collapsed(tensor, [d for d in range(rank) if d not in used])
    for dim in used:
        call.atoms.freeze(call.atoms.axis(tensor, dim))
    for index in indices:
        if index is not None:
            call.atoms.freeze_all(index)
    extra = len(call.shape) - (rank - len(used))
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    kept = [d for d in range(rank) if d not in used]
    names = {d: i if i < at else i + extra for i, d in enumerate(kept)}
    blocks = [b.renamed(names) for b in tensor.blocks if not set(b.dims) & set(used)]
    fixed = [Block((at + i,), np.zeros(call.shape[at + i], np.int64)) for i in range(extra)]
    return Provenance(call.shape, (*blocks, *fixed))


def index_put(call: Call) -> Provenance:
    tensor, values = call["self"], call["values"]
    for dim, index in enumerate(call["indices"]):
        if index is not None:
            call.atoms.freeze(call.atoms.axis(tensor, dim))
    return call.atoms.elementwise(
        [tensor, Provenance(values.shape, values.blocks)]
        if len(values.shape) <= len(tensor.shape)
        else [tensor],
        call.shape,
    )


def index_add(call: Call) -> Provenance:
    tensor, source, dim = call["self"], call["source"], call["dim"] % len(call.shape)
    for t in (tensor, source):
        call.atoms.freeze(call.atoms.axis(t, dim))
    fixed = Provenance((*source.shape[:dim], 1, *source.shape[dim + 1 :]))
    others = tuple(b for b in source.blocks if dim not in b.dims)
    return call.atoms.elementwise([tensor, Provenance(fixed.shape, others)], call.shape)


def index_select(call: Call) -> Provenance:
    tensor, dim = call["self"], call["dim"]
    call.atoms.freeze(call.atoms.axis(tensor, dim))
    out = call.atoms.collapsed(tensor, [d for d in range(len(tensor.shape)) if d != dim])
    return shapes.take(out, dim, np.zeros(call.shape[dim], np.int64))


def embedding(call: Call) -> Provenance:
    weight, ids = call["weight"], call["indices"]
    call.atoms.freeze(call.atoms.axis(weight, 0))
    call.atoms.freeze_all(ids)
    last = len(call.shape) - 1
    fixed = [Block((d,), np.zeros(n, np.int64)) for d, n in enumerate(call.shape[:-1])]
    return Provenance(call.shape, (*fixed, Block((last,), call.atoms.axis(weight, 1))))
