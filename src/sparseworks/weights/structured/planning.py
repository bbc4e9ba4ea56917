"""Which groups one round of `slim` may cut, and which it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.coupling import Coupling, Family
from sparseworks.models.roles import ADAPTER, Adapters
from sparseworks.weights.structured.configs import describe, has_config
from sparseworks.weights.structured.cutting import kept_indices
from sparseworks.weights.structured.selection import Multiples, kind, ladders, search, under

__all__ = ["Keep", "Plan", "choose", "cut_shapes", "left_whole", "shapes_of"]

Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """The options of one call that every round needs."""

    method: Any
    data: list[Batch] | None
    loss: Loss | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    round_to: Multiples
    floor: float
    uniform: bool
    streams: bool
    fold: str
    verify: bool


def choose(
    model: nn.Module,
    coupling: Coupling,
    plan: Plan,
    measure: Callable[[Keep], float],
    goal: float,
    what: str,
) -> Keep:
    families = _allowed(coupling, plan)
    families = [f for f in families if plan.method.takes(coupling, f)]
    shared: dict[int, object] = {}
    if plan.uniform:
        shared = {f.index: kind(f) for f in families}
    if plan.uniform and has_config(model):
        shared = _described(model, coupling, families)
        families = [f for f in families if f.index in shared]
    if not families:
        raise ModelError(
            f"{type(model).__name__}: no group may be cut; widen include=/exclude=, allow streams "
            "under normalisation (streams=True), or widths per layer (uniform=False)"
            + "".join(f"; {f}" for f in coupling.functions[:1])
        )
    allowed = replace(coupling, families=tuple(families))
    scores = plan.method.score(model, allowed, plan.data, plan.loss)
    if np.shape(scores) != (coupling.count,):
        raise InvalidArgument(
            f"the method's score returned shape {list(np.shape(scores))}; one number for each of "
            f"the {coupling.count} groups is needed, [{coupling.count}]"
        )
    made = ladders(
        coupling,
        families,
        scores,
        normalise=plan.method.normalise,
        shared=shared,
        round_to=plan.round_to,
        floor=plan.floor,
    )
    return search(coupling, made, measure, goal, what)


def _allowed(coupling: Coupling, plan: Plan) -> list[Family]:
    touched = {n for f in coupling.families for n, _ in f.axes}
    widths = {f.axes[0][0] for f in coupling.families}
    multiples = plan.round_to if isinstance(plan.round_to, Mapping) else ()
    for patterns, names in (((*plan.include, *plan.exclude), touched), (multiples, widths)):
        for pattern in patterns:
            if not any(under(n, pattern) for n in names):
                raise InvalidArgument(
                    f"name pattern {pattern!r} matches no parameter that can be cut; they are "
                    f"named like {', '.join(sorted(names)[:3])}"
                )
    adapters = Adapters(coupling.model)
    return [f for f in coupling.families if not _barred(f, plan, adapters)]


def _barred(family: Family, plan: Plan, adapters: Adapters) -> str:
    """Why a family may not be cut, or ""."""
    names = {n for n, _ in family.axes}
    if any(under(n, p) for n in names for p in plan.exclude):
        return "excluded by name"
    if plan.include and not any(under(n, p) for n in names for p in plan.include):
        return "not included by name"
    if all(adapters.part(n) is not None for n in names) and not any(
        adapters.named(n, plan.include) for n in names
    ):
        return ADAPTER
    if not (family.exact or plan.streams):
        return family.reason
    return "" if len(family) > 1 else "it has one group, which must stay"


def left_whole(coupling: Coupling, plan: Plan, names: Iterable[str]) -> dict[str, str]:
    """Why these parameters kept their shape, of those with two or more axes."""
    adapters = Adapters(coupling.model)
    reasons: dict[str, list[str]] = {}
    for family in coupling.families:
        why = _barred(family, plan, adapters) or "its width was kept"
        for name, _ in family.axes:
            reasons.setdefault(name, []).append(why)
    found = {}
    for name, parameter in coupling.model.named_parameters():
        if parameter.ndim < 2 or name not in names:
            continue
        bound = "its sizes are bound: inputs, outputs, or what the model computes with them"
        whys = dict.fromkeys(reasons.get(name, [bound]))
        if adapters.part(name) is not None and ADAPTER in whys:
            whys = {ADAPTER: None}
        whys = dict.fromkeys(_computing(coupling, name)) or whys
        unreached = name in coupling.unreached
        found[name] = "not reached by the example" if unreached else "; ".join(whys)
    return found


def _computing(coupling: Coupling, name: str) -> list[str]:
    """That the parameter is of a layer whose weight is a function of its parameters."""
    owner, parametrized, _ = f".{name}".partition(".parametrizations.")
    path = owner if parametrized else owner.rpartition(".")[0]
    return [f.why for f in coupling.functions if f".{f.module}".rstrip(".") == path]


def _described(model: nn.Module, coupling: Coupling, families: list[Family]) -> dict[int, object]:
    """Families whose widths the config can tell, each with the key of what one field describes.

    Every kind is tried on one step of its own; kinds that no field tells alone are tried together
    with others of their size (encoder and decoder, stages of different width).
    """
    before = shapes_of(model)
    kinds: dict[object, list[Family]] = {}
    for family in families:
        kinds.setdefault(kind(family), []).append(family)
    found: dict[int, object] = {}
    rest: dict[object, list[Family]] = {}
    for key, group in kinds.items():
        if _tells(model, coupling, before, group):
            found.update({f.index: key for f in group})
        else:
            rest.setdefault(tuple(sorted({len(f) for f in group})), []).extend(group)
    for size, group in rest.items():
        if _tells(model, coupling, before, group):
            found.update({f.index: size for f in group})
    return found


def _tells(
    model: nn.Module,
    coupling: Coupling,
    before: Mapping[str, tuple[int, ...]],
    group: list[Family],
) -> bool:
    levels = int(np.gcd.reduce([len(f) for f in group]))
    if levels == 1:
        return False
    keep = coupling.keep_all()
    for family in group:
        keep[family.roots[: len(family) // levels]] = False
    return describe(model, before, cut_shapes(before, coupling, keep)) is not None


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def cut_shapes(
    before: Mapping[str, tuple[int, ...]], coupling: Coupling, keep: Keep
) -> dict[str, tuple[int, ...]]:
    kept = kept_indices(coupling, keep)
    return {
        n: tuple(len(kept[n][a]) if a in kept.get(n, {}) else s for a, s in enumerate(shape))
        for n, shape in before.items()
    }
