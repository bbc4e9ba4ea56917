"""Cut what was chosen: checked against zeroing first, means folded, the config brought along."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparseworks.core.errors import ModelError
from sparseworks.models.calls import Batch
from sparseworks.models.coupling import Coupling, Family
from sparseworks.weights.structured.backup import Backup, Change
from sparseworks.weights.structured.checking import check
from sparseworks.weights.structured.configs import contradictions, describe, has_config
from sparseworks.weights.structured.cutting import cut
from sparseworks.weights.structured.folding import fold as fold_means
from sparseworks.weights.structured.folding import fold_linear
from sparseworks.weights.structured.planning import Keep, Plan, cut_shapes, shapes_of

__all__ = ["apply_cut", "cut_families", "free_families"]


def apply_cut(
    model: nn.Module, example: Batch, coupling: Coupling, keep: Keep, plan: Plan, backup: Backup
) -> tuple[list[Change], dict[str, Any] | None]:
    before = shapes_of(model)
    after = cut_shapes(before, coupling, keep)
    fields = None
    if plan.uniform and has_config(model):
        fields = describe(model, before, after)
        if fields is None:
            raise ModelError(
                f"no config of {type(model).__name__} describes these widths; use uniform=False"
            )
    if plan.verify:
        check(model, example, coupling, keep)
    if plan.fold != "none":
        data = plan.data if plan.data is not None else [example]
        if plan.fold == "linear":
            fold_linear(model, coupling, keep, data, backup)
        else:
            fold_means(model, coupling, keep, data, backup, plan.fold == "exact")
    changes, _ = cut(model, coupling, keep, backup)
    for path, value in (fields or {}).items():
        *parents, name = path.split(".")
        owner: Any = model.config
        for parent in parents:
            owner = getattr(owner, parent)
        backup.set(owner, name, value)
    if fields is not None and (wrong := contradictions(model, changes)):
        raise ModelError(
            f"the config of {type(model).__name__} would not rebuild this model ({wrong[0]}); "
            "use uniform=False"
        )
    return changes, fields


def free_families(coupling: Coupling, streams: bool = False) -> list[Family]:
    """Families of several groups that may be cut; with `streams`, those under a statistic too."""
    return [f for f in coupling.families if (f.exact or streams) and len(f) > 1]


def cut_families(
    model: nn.Module,
    example: Batch,
    coupling: Coupling,
    kept: Iterable[tuple[Family, NDArray[np.bool_]]],
) -> tuple[Keep, dict[str, tuple[int, int]]]:
    """Cut what a training has left unused, in place; checked against zeroing first.

    Args:
        kept: families, and which of their groups stay; where none would, the first does.

    Returns:
        True for group numbers that stayed; a parameter that makes a width -> groups before and
        after.
    """
    keep, widths = coupling.keep_all(), {}
    for family, stays in kept:
        stays = stays if stays.any() else np.arange(len(family)) == 0
        keep[family.roots[~stays]] = False
        widths[family.axes[0][0]] = (len(family), int(stays.sum()))
    check(model, example, coupling, keep)
    cut(model, coupling, keep)
    return keep, widths
