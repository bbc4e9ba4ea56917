"""`sparseworks.slim`: a smaller dense model, by cutting coupled groups of channels and heads."""

from __future__ import annotations

import copy as copying
import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, Loss, call, split
from sparseworks.models.coupling import Coupling, Family, trace
from sparseworks.weights.structured.configs import contradictions, describe, has_config
from sparseworks.weights.structured.cutting import Backup, Change, cut, kept_indices, zero
from sparseworks.weights.structured.folding import fold as fold_means
from sparseworks.weights.structured.measure import latency as measure_latency
from sparseworks.weights.structured.result import SlimResult, Width
from sparseworks.weights.structured.selection import kind, ladders, search

__all__ = ["slim"]

Progress = Callable[[int, int, str], None]
Patterns = str | Iterable[str] | None
Keep = NDArray[np.bool_]


@dataclass(frozen=True)
class _Plan:
    """The options of one call that every round needs."""

    method: Any
    data: list[Batch] | None
    loss: Loss | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    round_to: int | None
    floor: float
    uniform: bool
    streams: bool
    fold: str
    verify: bool


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
    if not hasattr(scorer, "score"):
        raise InvalidArgument(f"method {method!r} does not score groups; see `sparseworks methods`")
    batches = None if data is None else list(data)
    plan = _Plan(
        scorer,
        batches,
        loss,
        _listed(include),
        _listed(exclude),
        round_to,
        floor,
        has_config(model) if uniform is None else uniform,
        streams,
        fold or ("none" if batches is None else "mean"),
        verify,
    )
    if copy:
        model = copying.deepcopy(model)
    shapes = _shapes(model)
    report, undo = progress or (lambda *_: None), []
    first: Coupling | None = None
    widths: dict[str, Width] = {}
    changes: list[Change] = []
    config: dict[str, Any] = {}
    base = 0.0
    try:
        for i in range(iterations):
            report(i, iterations, "cutting groups")
            coupling = trace(model, example)
            measure = _measure(model, example, coupling, what)
            if first is None:
                first, base = coupling, measure(coupling.keep_all())
            whole = {"flops": coupling.flops(), "params": float(coupling.parameters())}
            goal = base * share ** ((i + 1) / iterations)
            backup = Backup()
            undo.append(backup)
            keep = _choose(model, coupling, plan, measure, goal, what)
            made, fields = _apply(model, example, coupling, keep, plan, backup)
            changes, config = changes + made, {**config, **(fields or {})}
            _note(widths, coupling, keep)
            if recover is not None and i + 1 < iterations:
                recover(model, i)
            del whole
    except BaseException:
        for backup in reversed(undo):
            backup.restore()
        raise
    report(iterations, iterations, "cutting groups")
    assert first is not None
    after = _shapes(model)
    parameters = sum(p.numel() for p in model.parameters())
    return SlimResult(
        scorer.info.name,
        {**targets, **_plain(plan), "iterations": iterations, **_fields(scorer)},
        tuple(widths.values()),
        {n: (shapes[n], after[n]) for n in after if shapes.get(n) != after[n]},
        tuple(changes),
        (config if plan.uniform and has_config(model) else None),
        (_flops_before(first, shapes), trace(model, example).flops()),
        (sum(int(np.prod(s)) for s in shapes.values()), parameters),
        None,
        model,
        time.perf_counter() - start,
        tuple(f"not reached by the example, left whole: {n}" for n in first.unreached),
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


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def _flops_before(coupling: Coupling, shapes: Mapping[str, Any]) -> float:
    return sum(2.0 * c.macs for c in coupling.costs)


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


def _choose(
    model: nn.Module,
    coupling: Coupling,
    plan: _Plan,
    measure: Callable[[Keep], float],
    goal: float,
    what: str,
) -> Keep:
    families = _allowed(coupling, plan)
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
        )
    scores = plan.method.score(model, coupling, plan.data, plan.loss)
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


def _allowed(coupling: Coupling, plan: _Plan) -> list[Family]:
    names = {n for f in coupling.families for n, _ in f.axes}
    for pattern in (*plan.include, *plan.exclude):
        if not any(_matches(n, pattern) for n in names):
            raise InvalidArgument(
                f"name pattern {pattern!r} matches no parameter that can be cut; they are named "
                f"like {', '.join(sorted(names)[:3])}"
            )
    return [
        f
        for f in coupling.families
        if (f.exact or plan.streams)
        and (not plan.include or any(_matches(n, p) for n, _ in f.axes for p in plan.include))
        and not any(_matches(n, p) for n, _ in f.axes for p in plan.exclude)
        and len(f) > 1
    ]


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def _described(model: nn.Module, coupling: Coupling, families: list[Family]) -> dict[int, object]:
    """Families whose widths the config can tell, each with the key of what one field describes.

    Every kind is tried on one step of its own; kinds that no field tells alone are tried together
    with others of their size (encoder and decoder, stages of different width).
    """
    before = _shapes(model)
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
    return describe(model, before, _cut_shapes(before, coupling, keep)) is not None


def _cut_shapes(
    before: Mapping[str, tuple[int, ...]], coupling: Coupling, keep: Keep
) -> dict[str, tuple[int, ...]]:
    kept = kept_indices(coupling, keep)
    return {
        n: tuple(len(kept[n][a]) if a in kept.get(n, {}) else s for a, s in enumerate(shape))
        for n, shape in before.items()
    }


def _apply(
    model: nn.Module, example: Batch, coupling: Coupling, keep: Keep, plan: _Plan, backup: Backup
) -> tuple[list[Change], dict[str, Any] | None]:
    before = _shapes(model)
    after = _cut_shapes(before, coupling, keep)
    fields = None
    if plan.uniform and has_config(model):
        fields = describe(model, before, after)
        if fields is None:
            raise ModelError(
                f"no config of {type(model).__name__} describes these widths; use uniform=False"
            )
    if plan.verify:
        _check(model, example, coupling, keep)
    if plan.fold != "none":
        data = plan.data if plan.data is not None else [example]
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


@torch.no_grad()
def _check(model: nn.Module, example: Batch, coupling: Coupling, keep: Keep) -> None:
    """Cutting must equal zeroing (where no statistic runs over what is cut), and must run."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    saved = zero(model, coupling, keep)
    try:
        expected = _output(model, example)
    finally:
        for parameter, value in saved:
            parameter.copy_(value)
    backup = Backup()
    try:
        cut(model, coupling, keep, backup)
        found = _output(model, example)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with its new shapes ({error}); a module may hold "
            "a size under a name that is not known: exclude= the layers it belongs to"
        ) from error
    finally:
        backup.restore()
        for module, was in training.items():
            module.training = was
    exact = all(f.exact or bool(keep[f.roots].all()) for f in coupling.families)
    scale = float(expected.abs().max()) + 1e-12
    if exact and float((found - expected).abs().max()) > 2e-3 * scale:
        raise ModelError(
            f"{type(model).__name__}: the cut model differs from the zeroed one by "
            f"{float((found - expected).abs().max()) / scale:.1e}; please report this architecture"
        )


def _output(model: nn.Module, example: Batch) -> Tensor:
    output = call(model, split(example)[0])
    found = getattr(output, "logits", None)
    tensor = found if isinstance(found, Tensor) else first_tensor(output)
    if tensor is None:
        raise ModelError(f"no tensor in the output of {type(model).__name__}")
    return tensor.detach().float()


def _note(widths: dict[str, Width], coupling: Coupling, keep: Keep) -> None:
    for family in coupling.families:
        name, axis = family.axes[0]
        per = int((coupling.axes[name, axis] == family.roots[0]).sum())
        label = f"{name} axis {axis}"
        before = widths[label].before if label in widths else len(family)
        after = int(keep[family.roots].sum())
        if after < before:
            widths[label] = Width(label, before, after, per)


def _plain(plan: _Plan) -> dict[str, Any]:
    skip = ("method", "data", "loss")
    return {k: v for k, v in vars(plan).items() if k not in skip}


def _fields(scorer: Any) -> dict[str, Any]:
    return asdict(scorer) if is_dataclass(scorer) and not isinstance(scorer, type) else {}
