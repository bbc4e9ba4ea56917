"""Axes whose length a number of the model tells: kept such that the number can follow every cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparseworks.models.coupling.numbers import Attribute, Formula, attributes, solved
from sparseworks.models.coupling.provenance import FROZEN, Labels

__all__ = ["Told", "along", "demands"]

Told = tuple[Formula, Labels]
_DRAWS = 8


def along(rows: Labels) -> Labels:
    """What each entry `[n]` of an axis goes with, from joint labels `[n, others]`.

    Where every entry holds the same labels the other axes are what is cut, and this one stays.
    """
    if rows.shape[1] == 0 or (rows.shape[1] > 1 and bool((rows == rows[:1]).all())):
        return np.full(len(rows), FROZEN, np.int64)
    return rows[:, 0]


def demands(parent: Labels, told: Sequence[Told]) -> tuple[Labels, Labels] | None:
    """Further links, so that every number has one value whatever is cut; None when it has.

    One formula at several axes makes their entries one, in order. Numbers that several formulas
    read, or that are divided, stay as they are where some cut of their axes would contradict them.
    """
    axes: list[Told] = []
    pairs: list[tuple[Labels, Labels]] = []
    first: dict[Formula, Labels] = {}
    for formula, labels in told:
        rows = np.where(labels < 0, FROZEN, parent[np.maximum(labels, 0)])
        roots = along(rows)
        axes.append((formula, roots))
        pairs.append((first.setdefault(formula, roots), roots))
        if not (rows == rows[:1]).all():
            pairs.append((np.broadcast_to(roots[:, None], rows.shape).ravel(), rows.ravel()))
    pairs = [(a, b) for a, b in pairs if not np.array_equal(a, b)]
    if not pairs:
        refused = _contradicted(parent, axes)
        pairs = [
            (roots, np.zeros_like(roots))
            for formula, roots in axes
            if roots.any() and attributes(formula) & refused
        ]
    if not pairs:
        return None
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def _contradicted(parent: Labels, axes: Sequence[Told]) -> set[Attribute]:
    """Numbers that no value fits after some of a few random cuts."""
    if not any(roots.any() for _, roots in axes):
        return set()
    rng = np.random.default_rng(0)
    refused: set[Attribute] = set()
    for _ in range(_DRAWS):
        keep = rng.random(len(parent)) < rng.uniform(0.4, 0.9)
        keep[FROZEN] = True
        sizes = [(formula, int(keep[roots].sum())) for formula, roots in axes]
        if all(size for _, size in sizes):
            refused |= solved(sizes)[1]
    return refused
