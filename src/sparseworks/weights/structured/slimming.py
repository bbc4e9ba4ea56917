"""`sparseworks.slim`: a smaller dense model, by cutting coupled groups of channels and heads."""

from __future__ import annotations

import copy as copying
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.coupling import Coupling, trace
from sparseworks.weights.structured.applying import apply_cut
from sparseworks.weights.structured.configs import has_config
from sparseworks.weights.structured.cutting import Backup, Change, cut
from sparseworks.weights.structured.depth import drop_least, renamed
from sparseworks.weights.structured.measure import latency as measure_latency
from sparseworks.weights.structured.planning import Keep, Plan, choose, shapes_of
from sparseworks.weights.structured.result import SlimResult, Width
from sparseworks.weights.structured.selection import OutOfReach

__all__ = ["slim"]

Progress = Callable[[int, int, str], None]
Patterns = str | Iterable[str] | None


def slim(
    model: nn.Module,
    example: Batch,
    *,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    method: Any = "group-norm",
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    round_to: int | None = None,
    floor: float = 0.1,
    uniform: bool | None = None,
    streams: bool = False,
    blocks: bool = False,
    fold: Literal["mean", "exact", "none"] | None = None,
    iterations: int = 1,
    recover: Callable[[nn.Module, int], Any] | None = None,
    verify: bool = True,
    copy: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> SlimResult:
    """Cut channels, hidden units and heads until a share of the cost is left.

    Which channels go together is found from the model's graph (`sparseworks.models.coupling`).
    The result is a model of ordinary modules with new shapes. A failing call changes nothing.

    Args:
        model: changed in place, unless `copy`.
        example: one batch; operations and latency are counted on it.
        flops: share of the floating-point operations to keep, in (0, 1).
        params: share of the parameters to keep.
        latency: share of the time per call to keep, measured on this machine.
        method: registered name of a structured score ("group-norm", "group-taylor", ...), or an
            object of one.
        data: calibration batches for scores that need them and for folding.
        loss: `(model, batch) -> scalar` for gradient scores; cross-entropy when None.
        include: name patterns; only groups that touch one of these parameters.
        exclude: name patterns; no group that touches one of these parameters.
        round_to: every width that changes becomes a multiple of this.
        floor: share of every width that stays at least.
        uniform: equal layers of all blocks keep equal widths, and only widths that a Hugging Face
            config can tell are cut, so that plain from_pretrained loads the result. None: for
            Hugging Face models.
        streams: also cut groups that a statistic runs over (a residual stream under layer norm),
            where cutting is not the same as zeroing.
        blocks: where widths at their floor leave more than the target, drop whole residual blocks,
            the one that the output misses least first.
        fold: what cut channels say on average goes into the next bias or batch-norm mean: "mean"
            (over `data`), "exact" (constant channels only), "none". None: "mean" with data, else
            "none".
        iterations: rounds of equal relative size, scored anew.
        recover: called with (model, round) after each round but the last, to train in between.
        verify: check that the cut model computes what the model with zeroed groups computes.
        copy: slim a copy; the model given stays as it is.
        progress: called with (done, total, what).
        options: fields of the method.

    Returns:
        what was done; `.model` is the slimmed model.

    Raises:
        InvalidArgument: an option that cannot be used, or a target that cannot be reached.
        CouplingError: the graph holds an operation that is not known.
        ModelError: the model cannot be exported, or does not run with its new shapes.
    """
    start = time.perf_counter()
    targets = {"flops": flops, "params": params, "latency": latency}
    what, share = _target(targets, floor, iterations, round_to)
    scorer = registry.build(method, **options)
    if getattr(getattr(scorer, "info", None), "kind", "") != "structured":
        raise InvalidArgument(f"method {method!r} does not score groups; see `sparseworks methods`")
    batches = None if data is None else list(data)
    calibrates = getattr(scorer, "calibrates", True)  # is data= made of the model's own batches?
    plan = Plan(
        scorer,
        batches,
        loss,
        _listed(include),
        _listed(exclude),
        round_to,
        floor,
        has_config(model) if uniform is None else uniform,
        streams,
        fold or ("mean" if batches is not None and calibrates else "none"),
        verify,
    )
    if copy:
        model = copying.deepcopy(model)
    shapes = shapes_of(model)
    report, undo = progress or (lambda *_: None), []
    first: Coupling | None = None
    widths: dict[str, Width] = {}
    changes: list[Change] = []
    config: dict[str, Any] = {}
    gone: list[str] = []
    base = 0.0
    try:
        for i in range(iterations):
            report(i, iterations, "cutting groups")
            backup = Backup()
            undo.append(backup)
            while True:
                coupling = trace(model, example)
                measure = _measure(model, example, coupling, what)
                if first is None:
                    first, base = coupling, measure(coupling.keep_all())
                goal = base * share ** ((i + 1) / iterations)
                try:
                    keep = choose(model, coupling, plan, measure, goal, what)
                    break
                except OutOfReach:
                    if not blocks:
                        raise
                container, index, told = drop_least(model, example, backup)
                gone.append(f"{container}.{index}")
                config |= told
                widths = _after_drop(widths, container, index)
                changes = [
                    replace(c, module=name)
                    for c in changes
                    if (name := renamed(c.module, container, index)) is not None
                ]
            made, fields = apply_cut(model, example, coupling, keep, plan, backup)
            changes, config = changes + made, {**config, **(fields or {})}
            _note(widths, coupling, keep)
            if recover is not None and i + 1 < iterations:
                recover(model, i)
    except BaseException:
        for backup in reversed(undo):
            backup.restore()
        raise
    report(iterations, iterations, "cutting groups")
    assert first is not None
    after = shapes_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    return SlimResult(
        scorer.info.name,
        {**targets, **_plain(plan), "blocks": blocks, "iterations": iterations, **_fields(scorer)},
        tuple(widths.values()),
        {n: (shapes[n], after[n]) for n in after if shapes.get(n) != after[n]},
        tuple(changes),
        (config if plan.uniform and has_config(model) else None),
        (sum(2.0 * c.macs for c in first.costs), trace(model, example).flops()),
        (sum(int(np.prod(s)) for s in shapes.values()), parameters),
        None,
        model,
        time.perf_counter() - start,
        tuple(f"not reached by the example, left whole: {n}" for n in first.unreached),
        tuple(gone),
    )


def _target(
    targets: Mapping[str, float | None], floor: float, iterations: int, round_to: int | None
) -> tuple[str, float]:
    given = [(k, v) for k, v in targets.items() if v is not None]
    if len(given) != 1:
        raise InvalidArgument("give exactly one of flops=, params=, latency=: the share to keep")
    what, share = given[0]
    if not 0 < share < 1:
        raise InvalidArgument(f"{what}={share}: the share to keep lies between 0 and 1")
    if not 0 <= floor < 1:
        raise InvalidArgument(f"floor={floor}: a share in [0, 1)")
    if iterations < 1 or (round_to is not None and round_to < 1):
        raise InvalidArgument("iterations= and round_to= are at least 1")
    return what, share


def _listed(given: Patterns) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _measure(
    model: nn.Module, example: Batch, coupling: Coupling, what: str
) -> Callable[[Keep], float]:
    if what == "flops":
        return coupling.flops
    if what == "params":
        sizes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        return lambda keep: float(_count(coupling, sizes, keep))

    def timed(keep: Keep) -> float:
        trial = copying.deepcopy(model)
        if not keep.all():
            cut(trial, coupling, keep)
        return measure_latency(trial, example)

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


def _note(widths: dict[str, Width], coupling: Coupling, keep: Keep) -> None:
    for family in coupling.families:
        name, axis = family.axes[0]
        per = int((coupling.axes[name, axis] == family.roots[0]).sum())
        label = f"{name} axis {axis}"
        before = widths[label].before if label in widths else len(family)
        after = int(keep[family.roots].sum())
        if after < before:
            widths[label] = Width(label, before, after, per)


def _after_drop(widths: Mapping[str, Width], container: str, index: int) -> dict[str, Width]:
    found = {}
    for label, width in widths.items():
        if (name := renamed(label, container, index)) is not None:
            found[name] = replace(width, name=name)
    return found


def _plain(plan: Plan) -> dict[str, Any]:
    skip = ("method", "data", "loss")
    return {k: v for k, v in vars(plan).items() if k not in skip}


def _fields(scorer: Any) -> dict[str, Any]:
    return asdict(scorer) if is_dataclass(scorer) and not isinstance(scorer, type) else {}
