"""Solved coupling: groups of parameter slices that can only be cut together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.models.coupling.calls import Cost
from sparseworks.models.coupling.functions import Function
from sparseworks.models.coupling.numbers import Attribute, solved
from sparseworks.models.coupling.provenance import FROZEN, Atoms, Labels, Provenance
from sparseworks.models.coupling.sizes import Told, along, demands

__all__ = ["Coupling", "Family", "Group", "Slice", "solve"]

Axis = tuple[str, int]


@dataclass(frozen=True)
class Slice:
    """Entries of one axis of one parameter or buffer."""

    name: str
    axis: int
    indices: tuple[int, ...]

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.indices[:4])) + (", ..." if len(self.indices) > 4 else "")
        return f"{self.name}[{':, ' * self.axis}[{shown}]]"


@dataclass(frozen=True)
class Group:
    """Slices that are cut together or not at all.

    Args:
        root: number of the group in its coupling.
        slices: what goes with it.
        exact: cutting it equals zeroing it; False where a statistic runs over its channels.
        reason: why it is not exact.
    """

    root: int
    slices: tuple[Slice, ...]
    exact: bool = True
    reason: str = ""

    def __str__(self) -> str:
        note = "" if self.exact else f"  ({self.reason})"
        return f"group {self.root}{note}\n" + "\n".join(f"  {s}" for s in self.slices)


@dataclass(frozen=True)
class Family:
    """Groups that differ only in their indices: the channels of one layer, or of one stream.

    Args:
        index: its place in the coupling.
        roots: group numbers.
        axes: what every group touches.
        exact: cutting equals zeroing; `reason` says why not.
        multiple: the width must stay a multiple of this (kernels of the traced operations).
        least: groups that must stay (operations that compare widths).
    """

    index: int
    roots: NDArray[np.int64]
    axes: tuple[Axis, ...]
    exact: bool
    reason: str = ""
    multiple: int = 1
    least: int = 1

    def __len__(self) -> int:
        return len(self.roots)


@dataclass(frozen=True)
class Coupling:
    """Everything that can be cut from a model, before anything is cut.

    Args:
        model: the traced model.
        axes: (parameter, axis) -> group number of every index; 0 stays.
        families: the groups, gathered by what they touch.
        costs: multiply-adds of the traced operations, as label arrays of group numbers.
        unreached: parameters that the example did not use; they are never changed.
        sizes: formulas of the model's own numbers -> group numbers of the axis each counts.
        functions: layers whose weight is computed from parameters; they stay whole.
    """

    model: nn.Module = field(repr=False)
    axes: Mapping[Axis, Labels]
    families: tuple[Family, ...]
    costs: tuple[Cost, ...]
    count: int
    unreached: tuple[str, ...] = ()
    sizes: tuple[Told, ...] = ()
    functions: tuple[Function, ...] = ()

    def groups(self, families: Sequence[Family] | None = None) -> Iterator[Group]:
        """The groups, one at a time."""
        for family in self.families if families is None else families:
            for root in family.roots:
                yield self.group(int(root), family)

    def group(self, root: int, family: Family) -> Group:
        slices = tuple(
            Slice(name, axis, tuple(np.flatnonzero(self.axes[name, axis] == root).tolist()))
            for name, axis in family.axes
        )
        return Group(root, slices, family.exact, family.reason)

    def numbers(self, keep: NDArray[Any]) -> dict[Attribute, int]:
        """What the numbers that the model holds become, of those that told a size when traced.

        Raises:
            ModelError: no value of a number fits all that it counts.
        """
        told = [(formula, int(keep[labels].sum())) for formula, labels in self.sizes]
        values, refused = solved(told)
        if refused:
            one = min(refused, key=str)
            raise ModelError(
                f"{type(self.model).__name__}: {one} is {one.value}, and no other value fits all "
                "the widths that it tells; exclude= the layers it belongs to"
            )
        return values

    def keep_all(self) -> NDArray[np.bool_]:
        """True for every group number: what `flops` and `parameters` take."""
        return np.ones(self.count, bool)

    def flops(self, keep: NDArray[np.bool_] | None = None) -> float:
        """Floating-point operations (2 per multiply-add) of products on the example."""
        keep = self.keep_all() if keep is None else keep
        total = 0.0
        for cost in self.costs:
            share = cost.macs
            for labels in cost.labels:
                share *= float(keep[labels].mean())
            total += 2.0 * share
        return total

    def parameters(self, keep: NDArray[np.bool_] | None = None) -> int:
        """Number of parameters (buffers are not counted)."""
        keep = self.keep_all() if keep is None else keep
        total = 0
        for name, tensor in self.model.named_parameters():
            size = 1
            for axis, length in enumerate(tensor.shape):
                labels = self.axes.get((name, axis))
                size *= length if labels is None else int(keep[labels].sum())
            total += size
        return total

    def __str__(self) -> str:
        lines = [
            f"{type(self.model).__name__}: {sum(map(len, self.families))} groups in "
            f"{len(self.families)} families, {self.flops() / 1e6:.2f} MFLOP"
        ]
        for family in self.families:
            note = "" if family.exact else f"  ({family.reason})"
            lines.append(f"family {family.index}: {len(family)} groups{note}")
            for name, axis in family.axes:
                per = int((self.axes[name, axis] == family.roots[0]).sum())
                lines.append(f"  {name} axis {axis}: {per} each")
        lines += [f"left whole: {function}" for function in self.functions]
        lines += [f"not reached by the example: {name}" for name in self.unreached]
        return "\n".join(lines)


def solve(
    model: nn.Module, atoms: Atoms, costs: list[Cost], sources: Mapping[str, Provenance]
) -> Coupling:
    """Join what the walk collected into groups."""
    parent = np.arange(atoms.count, dtype=np.int64)
    edges = _stacked(atoms.edges)
    while True:
        parent = _components(parent, edges)
        forced = [e for labels in atoms.splits if (e := _rectangle(parent, labels)) is not None]
        if not forced and (equal := demands(parent, atoms.sizes)) is not None:
            forced = [equal]
        if not forced:
            break
        edges = _stacked(forced)
    raw = {
        (name, axis): parent[source.block(axis).labels]  # type: ignore[union-attr]
        for name, source in sources.items()
        for axis in range(len(source.shape))
    }
    used = np.unique(np.concatenate([[FROZEN], *raw.values()]))
    number = np.zeros(atoms.count, np.int64)
    number[used] = np.arange(len(used))
    axes = {key: number[labels] for key, labels in raw.items()}
    reasons = {
        int(root): reason
        for labels, reason in atoms.statistics
        for root in np.unique(number[parent[labels]])
    }
    multiples, least = (
        {int(root): n for labels, n in told for root in np.unique(number[parent[labels]])}
        for told in (atoms.multiples, atoms.least)
    )
    final = tuple(
        Cost(c.name, c.macs, tuple(number[parent[np.maximum(x, 0)]] for x in c.labels))
        for c in costs
    )
    reached = {id(t) for n, t in _tensors(model) if n in sources}
    unreached = tuple(n for n, t in model.named_parameters() if id(t) not in reached)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    found = _families(axes, len(used), reasons, multiples, least)
    families = tuple(f for f in found if any(name in parameters for name, _ in f.axes))
    sizes = tuple((f, number[along(parent[np.maximum(x, 0)])]) for f, x in atoms.sizes)
    return Coupling(model, axes, families, final, len(used), unreached, sizes)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _stacked(edges: list[tuple[Labels, Labels]]) -> tuple[Labels, Labels]:
    if not edges:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([a for a, _ in edges]), np.concatenate([b for _, b in edges])


def _components(parent: Labels, edges: tuple[Labels, Labels]) -> Labels:
    """Lowest atom of every connected component, by hooking and pointer jumping."""
    a, b = edges
    parent = parent.copy()
    while True:
        low = np.minimum(parent[a], parent[b])
        before = parent.copy()
        for side in (parent[a], parent[b], a, b):
            np.minimum.at(parent, side, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
        if np.array_equal(parent, before):
            return parent


def _rectangle(parent: Labels, labels: Labels) -> tuple[Labels, Labels] | None:
    """Further links that a split axis needs: what stays must be a full table.

    It is one already where every entry depends on one axis only. Else the same entries of the last
    axis leave all the others (a fixed number of channel groups, each losing the same ones).
    """
    roots = np.where(labels < 0, FROZEN, parent[np.maximum(labels, 0)])
    for axis in range(roots.ndim):
        rows = np.moveaxis(roots, axis, 0).reshape(roots.shape[axis], -1)
        if bool((rows == rows[:, :1]).all()):
            return None
    last = np.moveaxis(roots, -1, 0).reshape(roots.shape[-1], -1)
    first = np.broadcast_to(last.min(1, keepdims=True), last.shape)
    return last.ravel(), first.ravel()


def _families(
    axes: Mapping[Axis, Labels],
    count: int,
    reasons: Mapping[int, str],
    multiples: Mapping[int, int],
    least: Mapping[int, int],
) -> tuple[Family, ...]:
    touched: dict[int, list[int]] = {root: [] for root in range(1, count)}
    keys = list(axes)
    sizes: dict[int, list[int]] = {root: [] for root in range(1, count)}
    for position, key in enumerate(keys):
        roots, counts = np.unique(axes[key], return_counts=True)
        for root, n in zip(roots.tolist(), counts.tolist()):
            if root != FROZEN:
                touched[root].append(position)
                sizes[root].append(n)
    gathered: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for root, positions in touched.items():
        gathered.setdefault((tuple(positions), tuple(sizes[root])), []).append(root)
    families: list[Family] = []
    for (places, _), members in gathered.items():
        reason = next((reasons[r] for r in members if r in reasons), "")
        families.append(
            Family(
                len(families),
                np.asarray(members, np.int64),
                tuple(keys[p] for p in places),
                not reason,
                reason,
                max(multiples.get(r, 1) for r in members),
                max(least.get(r, 1) for r in members),
            )
        )
    return tuple(families)
