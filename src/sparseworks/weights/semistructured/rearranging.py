"""Reorder the output channels of a model, function unchanged, so that groups of them fit together.

Which channels move together is the coupling that `slim` cuts by: layers that meet in a sum share
one permutation, depthwise convolutions and norms follow, what the model returns stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget, get_budget
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.patterns import Block, Pattern, SharedInputs, check_sparsity, parse_pattern
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, trace
from sparseworks.models.hooks import with_torch_masks
from sparseworks.models.views import View, find_prunable
from sparseworks.weights.semistructured.grouping import Table, find_order, moved, retained
from sparseworks.weights.semistructured.permuting import (
    Permutation,
    permutable,
    permute,
    places_of,
)

__all__ = ["Rearrangement", "groups_of", "rearrange", "rearrange_views"]


@dataclass(frozen=True)
class Rearrangement:
    """What was moved.

    Args:
        permutations: that were applied, one for each family of coupled channels that gained.
        before: tensor name -> share of its score that the pattern retained.
        after: the same with the channels as they are now.
        fixed: tensor name -> why its rows stay where they are.
    """

    permutations: tuple[Permutation, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]
    fixed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.permutations)} permutations"]
        for name, share in self.before.items():
            note = f"  (stays: {self.fixed[name]})" if name in self.fixed else ""
            lines.append(f"  {name}: retains {share:.2%} -> {self.after[name]:.2%}{note}")
        return "\n".join(lines)


def rearrange(
    model: nn.Module,
    example: Batch,
    *,
    sparsity: float,
    pattern: str | Pattern = "shared4",
    budget: str | Mapping[str, float] | Budget = "uniform",
    power: float = 1.0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Rearrangement:
    """Permute the output channels of a model in place; its function stays the same.

    Call it before the optimizer exists, then train with the same pattern (`sparsify(model,
    optimizer, "gradual", pattern=...)`): from here on the order is fixed.

    Args:
        model: any module that torch.export can follow.
        example: one batch; its values matter only for the check that the function is unchanged.
        sparsity: that the model will have.
        pattern: "sharedG", "sharedG-balanced" or "blockGx1".
        budget: who pays.
        power: |w|^power is the score of a weight, and what a unit adds up.
        include: name patterns of the only weights that will be sparse.
        exclude: name patterns of weights that stay dense.

    Returns:
        What was moved, and what that retains; printable.

    Raises:
        InvalidArgument: a pattern without groups of outputs, or a sparsity outside [0, 1).
        ModelError: the model has masks already (they were chosen for the present order), or
            torch.export cannot follow it. Nothing was changed.
    """
    check_sparsity(sparsity)
    groups = groups_of(parse_pattern(pattern))
    record = with_torch_masks(model, masks(model))
    if record is not None and len(record):
        raise ModelError("the model has masks already; rearrange it before it is pruned")
    views = find_prunable(model, include, exclude).views
    scores = {v.name: v.matrix().float().abs().pow(power) for v in views}
    keep = get_budget(budget)([v.spec(groups) for v in views], sparsity, scores)
    return rearrange_views(model, example, views, scores, keep, groups)


def groups_of(pattern: Pattern) -> SharedInputs:
    """The pattern as groups of outputs.

    Raises:
        InvalidArgument: it is another one.
    """
    if isinstance(pattern, SharedInputs):
        return pattern
    if isinstance(pattern, Block) and pattern.w == 1:
        return SharedInputs(pattern.h)
    raise InvalidArgument(
        f"pattern {pattern} has no groups of outputs that share their inputs; use 'shared4', "
        "'shared8-balanced' or 'block4x1'"
    )


def rearrange_views(
    model: nn.Module,
    example: Batch,
    views: Sequence[View],
    scores: Mapping[str, Tensor],
    keep: Mapping[str, int],
    pattern: SharedInputs,
) -> Rearrangement:
    """Find permutations, leave out those that would change the function, and apply the others.

    Args:
        scores: name -> matrix of each view, at least 0.
        keep: name -> units that each view will keep.
    """
    coupling = trace(model, example)
    rows = _row_axes(model, views)
    none = torch.zeros(0, 1, dtype=torch.int64)
    given = {v.name: Table(scores[v.name].detach().cpu(), none, keep[v.name]) for v in views}
    fixed = {v.name: _reason(coupling, rows, v) for v in views}
    barred: set[int] = set()
    while True:
        tables, found = _orders(coupling, rows, given, pattern, barred)
        held = {id(p) for p in permutable(model, example, list(found.values()))}
        wrong = {i for i, p in found.items() if id(p) not in held}
        if not wrong:
            break
        barred |= wrong  # what is moved with them has to be found again without them
    for index, family in enumerate(coupling.families):
        for axis in family.axes:
            if axis in rows and index in barred:
                fixed[rows[axis]] = "an exchange of its channels would change the function"
            elif axis in rows and index in found:
                fixed.pop(rows[axis], None)
    permute(model, found.values())
    return Rearrangement(
        tuple(found.values()),
        {n: _share(t, pattern) for n, t in given.items()},
        {n: _share(t, pattern) for n, t in tables.items()},
        fixed,
    )


def _row_axes(model: nn.Module, views: Sequence[View]) -> dict[tuple[str, int], str]:
    """(tensor name in the coupling, axis of the matrix's rows) -> view name."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    return {
        (first[id(v.parameter)], 1 if v.layout == "transposed" else 0): v.name
        for v in views
        if not v.layout.startswith("experts")
    }


def _orders(
    coupling: Coupling,
    rows: Mapping[tuple[str, int], str],
    given: Mapping[str, Table],
    pattern: SharedInputs,
    barred: set[int],
) -> tuple[dict[str, Table], dict[int, Permutation]]:
    """Family by family, each with the rows as the families before it left them."""
    tables, found = dict(given), {}
    for index, family in enumerate(coupling.families):
        touched = [axis for axis in family.axes if axis in rows]
        if not touched or index in barred:
            continue
        places = places_of(coupling, family)
        mine = {
            rows[axis]: replace(tables[rows[axis]], places=torch.from_numpy(places[axis]))
            for axis in touched
        }
        order = find_order(list(mine.values()), pattern)
        if order is not None:
            found[index] = Permutation(places, order.numpy())
            tables |= {name: moved(table, order) for name, table in mine.items()}
    return tables, found


def _reason(coupling: Coupling, rows: Mapping[tuple[str, int], str], view: View) -> str:
    axis = next((a for a, name in rows.items() if name == view.name), None)
    if axis is None:
        return "banks of experts are not followed"
    if axis not in coupling.axes:
        return "the example does not reach it"
    if not coupling.axes[axis].any():
        return "its channels are what the model returns, or are bound by their places"
    return "no better order was found"


def _share(table: Table, pattern: SharedInputs) -> float:
    return retained(table, pattern) / max(float(table.scores.sum(dtype=torch.float64)), 1e-30)
