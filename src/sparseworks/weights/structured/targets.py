"""What a call of `slim` is asked for, how it is measured, and which multiples of widths pay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Arguments
from sparseworks.models.coupling import Coupling
from sparseworks.models.hooks import duplicate
from sparseworks.weights.structured.cutting import cut
from sparseworks.weights.structured.measure import latency
from sparseworks.weights.structured.planning import Keep, Plan, choose
from sparseworks.weights.structured.selection import Multiples, OutOfReach

__all__ = ["MULTIPLES", "RoundTo", "measured", "pick", "target"]

RoundTo = Multiples | Literal["auto"]
MULTIPLES = (1, 8, 16)  # any width; tensor cores and AVX2; AVX-512


def target(
    targets: Mapping[str, float | None], floor: float, iterations: int, round_to: RoundTo
) -> tuple[str, float]:
    """Which cost, and the share of it to keep; refuses what cannot be used."""
    given = [(k, v) for k, v in targets.items() if v is not None]
    if len(given) != 1:
        raise InvalidArgument("give exactly one of flops=, params=, latency=: the share to keep")
    what, share = given[0]
    if not 0 < share < 1:
        raise InvalidArgument(f"{what}={share}: the share to keep lies between 0 and 1")
    if not 0 <= floor < 1:
        raise InvalidArgument(f"floor={floor}: a share in [0, 1)")
    multiples = [*round_to.values()] if isinstance(round_to, Mapping) else [round_to]
    whole = all(m is None or m == "auto" or m >= 1 for m in multiples)
    if iterations < 1 or not whole:
        raise InvalidArgument('iterations= is at least 1, round_to= at least 1 or "auto"')
    return what, share


def measured(
    model: nn.Module, example: Arguments, coupling: Coupling, what: str
) -> Callable[[Keep], float]:
    """The cost of a model with what `keep` keeps: FLOPs, parameters, or seconds on the example."""
    if what == "flops":
        return coupling.flops
    if what == "params":
        sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return lambda keep: float(_count(coupling, sizes, keep))

    def timed(keep: Keep) -> float:
        return latency(_trial(model, coupling, keep), example)

    return timed


def _count(coupling: Coupling, sizes: Mapping[str, tuple[int, ...]], keep: Keep) -> int:
    total = 0
    for name, shape in sizes.items():
        size = 1
        for axis, length in enumerate(shape):
            labels = coupling.axes.get((name, axis))
            size *= length if labels is None else int(keep[labels].sum())
        total += size
    return total


def _trial(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    trial = duplicate(model)
    if not keep.all():
        cut(trial, coupling, keep)
    return trial


class _Once:
    """A method whose scores are computed once, for several choices by them."""

    def __init__(self, method: Any) -> None:
        self.method, self.normalise = method, method.normalise
        self.takes = method.takes
        self.scores: Any = None

    def score(self, *given: Any) -> Any:
        if self.scores is None:
            self.scores = self.method.score(*given)
        return self.scores


def pick(
    model: nn.Module, example: Arguments, coupling: Coupling, plan: Plan,
    measure: Callable[[Keep], float], goal: float, what: str, auto: bool,
) -> tuple[Plan, Keep]:  # fmt: skip
    """What stays, and the plan with the multiple of widths that it was chosen with.

    With `auto`, of `MULTIPLES` the one that pays on this machine: for a latency to meet, the choice
    that keeps most operations; else the one whose model is fastest.

    Raises:
        OutOfReach: the target cannot be reached.
    """
    if not auto:
        return plan, choose(model, coupling, plan, measure, goal, what)
    once = replace(plan, method=_Once(plan.method))
    found: list[tuple[float, int, Keep]] = []
    refused: OutOfReach | None = None
    for n in MULTIPLES:
        try:
            keep = choose(model, coupling, replace(once, round_to=n), measure, goal, what)
        except OutOfReach as error:
            refused = refused or error
            continue
        if what == "latency":
            cost = -coupling.flops(keep)
        else:
            cost = latency(_trial(model, coupling, keep), example)
        found.append((cost, n, keep))
    if not found:
        assert refused is not None
        raise refused
    _, multiple, keep = min(found, key=lambda f: f[:2])
    return replace(plan, round_to=multiple), keep
