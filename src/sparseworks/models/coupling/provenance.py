"""What every axis of a tensor is made of, and which of it must go together.

Every index of every axis of a parameter is an *atom*. A tensor in the graph says, for its axes,
which atom each index comes from: an elementwise operation makes the atoms of its operands one, a
reshape moves them, a contraction ends them. Axes that were split from one axis (heads and their
channels) keep one joint array over all of them, so that nothing is lost when they are merged again.

`FROZEN` marks indices that can never be cut (the model's inputs and outputs, space, kernels);
an axis without labels (computed from constants) fits whatever it meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sparseworks.models.coupling.numbers import Formula

__all__ = ["FREE", "FROZEN", "Atoms", "Block", "Provenance", "frozen"]

FROZEN, FREE = 0, -1
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Block:
    """Joint labels of some axes, the major axis first; `labels` has one dimension for each."""

    dims: tuple[int, ...]
    labels: Labels

    @property
    def live(self) -> bool:
        return bool((self.labels > FROZEN).any())

    def renamed(self, names: dict[int, int]) -> Block:
        return Block(tuple(names[d] for d in self.dims), self.labels)

    def ordered(self, dims: Sequence[int]) -> Labels:
        """The labels with the axes in this order."""
        return self.labels.transpose([self.dims.index(d) for d in dims])


@dataclass(frozen=True, eq=False)
class Provenance:
    """Blocks of disjoint axes of one tensor; axes in no block are free."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()

    def block(self, dim: int) -> Block | None:
        dim %= max(1, len(self.shape))
        return next((b for b in self.blocks if dim in b.dims), None)

    def without(self, gone: Iterable[Block]) -> list[Block]:
        ids = {id(b) for b in gone}
        return [b for b in self.blocks if id(b) not in ids]


def frozen(shape: Sequence[int]) -> Provenance:
    """A tensor of which nothing can be cut."""
    return Provenance(
        tuple(shape),
        tuple(Block((d,), np.zeros(n, np.int64)) for d, n in enumerate(shape)),
    )


@dataclass
class Atoms:
    """Hands out atoms and collects which of them are one."""

    count: int = 1
    edges: list[tuple[Labels, Labels]] = field(default_factory=list)
    splits: list[Labels] = field(default_factory=list)
    statistics: list[tuple[Labels, str]] = field(default_factory=list)
    multiples: list[tuple[Labels, int]] = field(default_factory=list)
    least: list[tuple[Labels, int]] = field(default_factory=list)
    sizes: list[tuple[Formula, Labels]] = field(default_factory=list)

    def fresh(self, size: int) -> Labels:
        labels = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return labels

    def source(self, shape: Sequence[int]) -> Provenance:
        """A parameter or buffer: fresh atoms on every axis."""
        return Provenance(
            tuple(shape), tuple(Block((d,), self.fresh(n)) for d, n in enumerate(shape))
        )

    def link(self, a: Labels, b: Labels) -> Labels:
        """Make equal positions one (after broadcasting); returns what stands for both."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self.edges.append((a[both].ravel(), b[both].ravel()))
        low: Labels = np.where(a < 0, b, np.where(b < 0, a, np.minimum(a, b)))
        return low

    def freeze(self, labels: Labels) -> None:
        self.link(labels, np.zeros_like(labels))

    def freeze_all(self, tensor: Provenance) -> None:
        for block in tensor.blocks:
            self.freeze(block.labels)

    def merge(self, rows: Labels) -> Labels:
        """Make every row `[n, m]` one atom; returns `[n]`."""
        if rows.shape[1] == 0:
            return np.zeros(rows.shape[0], np.int64)
        known = np.where(rows < 0, np.iinfo(np.int64).max, rows)
        first = known.min(1)
        first = np.where(first == np.iinfo(np.int64).max, FREE, first)
        self.link(rows, first[:, None])
        return first

    def collapse(self, block: Block, onto: Sequence[int]) -> list[Block]:
        """The block told by the axes `onto` alone; its other axes become frozen."""
        keep = [d for d in block.dims if d in onto]
        rest = [d for d in block.dims if d not in onto]
        if not rest:
            return [block]
        sizes = dict(zip(block.dims, block.labels.shape))
        if not keep:
            self.freeze(block.labels)
            return [Block((d,), np.zeros(sizes[d], np.int64)) for d in rest]
        table = block.ordered([*keep, *rest])
        shape = table.shape[: len(keep)]
        merged = self.merge(table.reshape(int(np.prod(shape)), -1)).reshape(shape)
        return [
            Block(tuple(keep), merged),
            *(Block((d,), np.zeros(sizes[d], np.int64)) for d in rest),
        ]

    def collapsed(self, tensor: Provenance, onto: Sequence[int]) -> Provenance:
        """Every block that touches `onto` told by those axes alone."""
        blocks: list[Block] = []
        for block in tensor.blocks:
            touches = any(d in onto for d in block.dims)
            blocks += self.collapse(block, onto) if touches else [block]
        return Provenance(tensor.shape, tuple(blocks))

    def axis(self, tensor: Provenance, dim: int) -> Labels:
        """Labels of one axis alone, `[size]`: joint ones collapsed onto it, free ones frozen."""
        dim %= len(tensor.shape)
        block = tensor.block(dim)
        if block is None:
            return np.zeros(tensor.shape[dim], np.int64)
        return self.collapse(block, [dim])[0].labels

    def statistic(self, labels: Labels, reason: str) -> None:
        """Remember that these atoms are mixed by a statistic: zero is not the same as absent."""
        if (labels > FROZEN).any():
            self.statistics.append((labels[labels > FROZEN].ravel(), reason))

    def split(self, labels: Labels) -> None:
        """Remember that what is kept of these labels must be a full table."""
        if (labels > FROZEN).any():
            self.splits.append(labels)

    def told(self, tensor: Provenance, dim: int, formula: Formula) -> None:
        """Remember that a number of the model counts this axis: joint labels `[size, others]`."""
        block = tensor.block(dim)
        assert block is not None
        axis = np.moveaxis(block.labels, block.dims.index(dim), 0)
        self.sizes.append((formula, axis.reshape(len(axis), -1)))

    def elementwise(self, operands: Sequence[Provenance], shape: Sequence[int]) -> Provenance:
        """The result of an elementwise operation: operands broadcast to `shape`."""
        blocks: list[Block] = []
        for operand in operands:
            shift = len(shape) - len(operand.shape)
            for block in operand.blocks:
                dims = tuple(d + shift for d in block.dims)
                blocks += self._broadcast(Block(dims, block.labels), shape)
        done: list[Block] = []
        while blocks:
            cluster = [blocks.pop(0)]
            seen = set(cluster[0].dims)
            while more := [b for b in blocks if seen & set(b.dims)]:
                cluster += more
                blocks = [b for b in blocks if not any(b is m for m in more)]
                seen |= {d for b in more for d in b.dims}
            done += self._combine(cluster)
        return Provenance(tuple(shape), tuple(done))

    def _broadcast(self, block: Block, shape: Sequence[int]) -> list[Block]:
        stretched = [d for d, n in zip(block.dims, block.labels.shape) if n == 1 and shape[d] != 1]
        if not stretched:
            return [block]
        rest = tuple(d for d in block.dims if d not in stretched)
        if not rest:
            self.freeze(block.labels)
            return []
        return [Block(rest, block.labels.squeeze(tuple(block.dims.index(d) for d in stretched)))]

    def _combine(self, cluster: list[Block]) -> list[Block]:
        largest = max(cluster, key=lambda b: len(b.dims))
        if all(set(b.dims) == set(largest.dims) for b in cluster):
            labels = largest.labels
            for block in cluster:
                if block is not largest:
                    labels = self.link(labels, block.ordered(largest.dims))
            return [Block(largest.dims, labels)]
        major = largest.dims[0]
        parts = [p for b in cluster for p in self.collapse(b, [major])]
        found: dict[int, Labels] = {}
        for part in parts:
            for dim in part.dims:
                known = found.get(dim)
                found[dim] = part.labels if known is None else self.link(known, part.labels)
        return [Block((d,), labels) for d, labels in found.items()]
