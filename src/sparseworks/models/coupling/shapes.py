"""How reshapes, slices and concatenations move atoms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparseworks.models.coupling.provenance import FROZEN, Atoms, Block, Labels, Provenance

__all__ = ["concatenate", "expand", "pieces", "reduce", "reshape", "take"]


def _chunks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of old and new axes that hold the same elements, in order."""
    chunks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, a, b = [], [], 1, 1
        if i < len(old):
            a *= old[i]
            left.append(i)
            i += 1
        if j < len(new):
            b *= new[j]
            right.append(j)
            j += 1
        while a != b:
            if a < b:
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        chunks.append((left, right))
    return chunks


def reshape(atoms: Atoms, tensor: Provenance, shape: Sequence[int]) -> Provenance:
    """view, flatten, unflatten, squeeze, unsqueeze: the same elements in another shape."""
    new_shape = tuple(shape)
    if 0 in new_shape or 0 in tensor.shape:
        return Provenance(new_shape)
    chunks = [list(c) for c in _chunks(tensor.shape, new_shape)]
    live = [b for b in tensor.blocks if b.live]
    blocks: list[Block] = []
    pending = [(set(left), left, right) for left, right in chunks]
    while pending:
        dims, left, right = pending.pop(0)
        inside = [b for b in live if dims & set(b.dims)]
        while more := [p for p in pending if any(p[0] & set(b.dims) for b in inside)]:
            for part in more:
                dims = dims | part[0]
                left, right = left + part[1], right + part[2]
            pending = [p for p in pending if not any(p is m for m in more)]
            inside = [b for b in live if dims & set(b.dims)]
        blocks += _moved(atoms, tensor, sorted(left), sorted(right), inside, new_shape)
    return Provenance(new_shape, tuple(blocks))


def _moved(
    atoms: Atoms,
    tensor: Provenance,
    left: list[int],
    right: list[int],
    live: list[Block],
    shape: tuple[int, ...],
) -> list[Block]:
    touched = [b for b in tensor.blocks if any(d in left for d in b.dims)]
    if len(live) > 1:
        keep = max(live, key=lambda b: b.labels.size)
        merged = [d for d in right if shape[d] > 1]
        if len(merged) != len([d for d in left if tensor.shape[d] > 1]):
            for block in live:
                if block is not keep:
                    atoms.freeze(block.labels)
            live = [keep]
        else:
            names = dict(zip((d for d in left if tensor.shape[d] > 1), merged))
            return [b.renamed(names) for b in live if all(d in names for d in b.dims)]
    if not live:
        if not touched:
            return []
        return [Block((d,), np.zeros(shape[d], np.int64)) for d in right if shape[d] > 1]
    block = live[0]
    table = block.ordered(sorted(block.dims))
    full = table.reshape([tensor.shape[d] if d in block.dims else 1 for d in left])
    full = np.broadcast_to(full, [tensor.shape[d] for d in left])
    return _normal(atoms, full.reshape([shape[d] for d in right]), right)


def _normal(atoms: Atoms, labels: Labels, dims: Sequence[int]) -> list[Block]:
    """Axes along which nothing changes leave the block; more than one left is a split."""
    kept: list[int] = []
    rest: list[tuple[int, bool]] = []
    full = labels.shape
    for position, dim in enumerate(dims):
        first = labels.take([0], axis=position)
        constant = labels.shape[position] > 1 and bool((labels == first).all())
        if constant or (labels.shape[position] == 1 and len(dims) > 1):
            labels = first
            rest.append((dim, constant))
        else:
            kept.append(dim)
    if not kept:
        long = [d for d, constant in rest if constant]
        if not long:
            return [Block((dims[0],), labels.reshape(1))] if len(dims) else []
        kept, rest = [long[0]], [r for r in rest if r[0] != long[0]]
        labels = np.full(full[dims.index(long[0])], labels.flat[0], np.int64)
        return [Block((long[0],), labels), *_fixed(rest, dims, full)]
    labels = labels.reshape([n for n, d in zip(labels.shape, dims) if d in kept])
    if len(kept) > 1:
        atoms.split(labels)
    return [Block(tuple(kept), labels), *_fixed(rest, dims, full)]


def _fixed(rest: list[tuple[int, bool]], dims: Sequence[int], shape: Sequence[int]) -> list[Block]:
    """Axes that the labels do not depend on cannot change."""
    sizes = dict(zip(dims, shape))
    return [Block((d,), np.zeros(sizes[d], np.int64)) for d, constant in rest if constant]


def reduce(
    atoms: Atoms, tensor: Provenance, dims: Sequence[int], keepdim: bool, reason: str = ""
) -> Provenance:
    """Sum, mean, maximum over axes. With a `reason`, what is reduced counts as a statistic."""
    rank = len(tensor.shape)
    gone = sorted({d % rank for d in dims} if dims else set(range(rank)))
    left = [d for d in range(rank) if d not in gone]
    blocks: list[Block] = []
    for block in tensor.blocks:
        over = [d for d in block.dims if d in gone]
        if not over:
            blocks.append(block)
            continue
        if reason:
            atoms.statistic(block.labels, reason)
        kept = [d for d in block.dims if d not in gone]
        if kept:
            blocks += [b for b in atoms.collapse(block, kept) if not set(b.dims) & set(gone)]
    shape = tuple(
        1 if d in gone else n for d, n in enumerate(tensor.shape) if keepdim or d not in gone
    )
    names = {d: d if keepdim else left.index(d) for d in left}
    return Provenance(shape, tuple(b.renamed(names) for b in blocks))


def take(tensor: Provenance, dim: int, index: Labels | int) -> Provenance:
    """The entries `index` of one axis; a number removes the axis."""
    dim %= len(tensor.shape)
    blocks = []
    scalar = isinstance(index, int)
    where = np.asarray([index] if scalar else index, np.int64)
    for block in tensor.blocks:
        if dim not in block.dims:
            blocks.append(block)
            continue
        position = block.dims.index(dim)
        labels = block.labels.take(where, axis=position)
        dims = block.dims
        if scalar:
            labels = labels.squeeze(position)
            dims = tuple(d for d in dims if d != dim)
        if dims:
            blocks.append(Block(dims, labels))
    shape = list(tensor.shape)
    if not scalar:
        shape[dim] = len(where)
        return Provenance(tuple(shape), tuple(blocks))
    shape.pop(dim)
    names = {d: d - (d > dim) for d in range(len(tensor.shape))}
    return Provenance(tuple(shape), tuple(b.renamed(names) for b in blocks))


def pieces(atoms: Atoms, tensor: Provenance, dim: int, parts: list[tuple[int, int]]) -> None:
    """State what cutting an axis into `(start, stop)` parts demands.

    Equal parts that cover the axis stay equal when the same entries leave each of them. Any other
    partition is written into the model's code, so the axis cannot change.
    """
    dim %= len(tensor.shape)
    block = tensor.block(dim)
    if block is None or not block.live:
        return
    parts = sorted(set(parts))
    widths = {stop - start for start, stop in parts}
    ends = [0, *(stop for _, stop in parts)]
    covers = (
        all(a == start for a, (start, _) in zip(ends, parts)) and ends[-1] == (tensor.shape[dim])
    )
    if len(widths) != 1 or not covers:
        atoms.freeze(block.labels)
        return
    labels = np.moveaxis(block.labels, block.dims.index(dim), 0)
    table = labels.reshape(len(parts), -1)
    atoms.merge(table.T)


def expand(atoms: Atoms, tensor: Provenance, shape: Sequence[int]) -> Provenance:
    """Broadcast to a shape; the new axes are free to follow what they meet."""
    return atoms.elementwise([tensor], shape)


def concatenate(
    atoms: Atoms, tensors: Sequence[Provenance], dim: int, shape: Sequence[int]
) -> Provenance:
    """Join along one axis; the other axes become one."""
    dim %= len(shape)
    joint = {tuple(b.dims) for t in tensors if (b := t.block(dim)) is not None}
    if len(joint) > 1 or any(t.block(dim) is None for t in tensors):
        tensors = [atoms.collapsed(t, [dim]) for t in tensors]
        dims: tuple[int, ...] = (dim,)
    else:
        dims = next(iter(joint))
    parts, rest = [], []
    for tensor in tensors:
        block = tensor.block(dim)
        if block is None:
            labels = np.full(tensor.shape[dim], FROZEN, np.int64)
        else:
            labels = block.labels
        parts.append(labels)
        others = tuple(b for b in tensor.blocks if b is not block)
        rest.append(Provenance(tuple(tensor.shape), others))
    outer = [n if d != dim else 1 for d, n in enumerate(shape)]
    slim = [
        Provenance(tuple(n if d != dim else 1 for d, n in enumerate(t.shape)), t.blocks)
        for t in rest
    ]
    others = atoms.elementwise(slim, outer).blocks
    joined = Block(dims, np.concatenate(parts, axis=dims.index(dim)))
    if len(dims) == 1 or all(not set(b.dims) & set(dims) for b in others):
        others = tuple(b for b in others if not set(b.dims) & set(dims))
        return Provenance(tuple(shape), (joined, *others))
    blocks = [*atoms.collapse(joined, [dim]), *others]
    return atoms.elementwise([Provenance(tuple(shape), (b,)) for b in blocks], shape)
