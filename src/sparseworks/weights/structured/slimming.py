"""`sparseworks.slim`: a smaller dense model, by cutting coupled groups of channels and heads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.types import Progress
from sparseworks.data.epochs import Batches
from sparseworks.models.calls import Arguments, Batch, Example, Loss
from sparseworks.models.coupling import Coupling, trace
from sparseworks.models.hooks import duplicate
from sparseworks.weights.structured.applying import apply_cut
from sparseworks.weights.structured.backup import Backup, Change, Snapshot
from sparseworks.weights.structured.base import GroupScore, TrainAndCut, WholeModel
from sparseworks.weights.structured.configs import has_config
from sparseworks.weights.structured.depth import drop_least, renamed
from sparseworks.weights.structured.materialising import materialise
from sparseworks.weights.structured.measure import latency as measure_latency
from sparseworks.weights.structured.planning import Keep, Plan, left_whole, shapes_of
from sparseworks.weights.structured.result import SlimResult, Width
from sparseworks.weights.structured.selection import OutOfReach
from sparseworks.weights.structured.targets import RoundTo, measured, pick, target
from sparseworks.weights.structured.trained import train_and_cut

__all__ = ["slim"]

Patterns = str | Iterable[str] | None


def slim(
    model: nn.Module,
    example: Example,
    *,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    method: Any = "group-norm",
    data: Iterable[Batch] | Batches | None = None,
    epochs: int | None = None,
    loss: Loss | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    round_to: RoundTo = None,
    floor: float = 0.1,
    uniform: bool | None = None,
    streams: bool = False,
    blocks: bool = False,
    fold: Literal["mean", "linear", "exact", "none"] | None = None,
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

    A layer whose weight is a function of its parameters (weight standardisation, weight and
    spectral norms) becomes a plain layer of that weight first, and the result names it; where no
    plain layer computes the same it stays whole, and so do the channels that it reads and makes.

    Args:
        model: changed in place, unless `copy`.
        example: what the model is called with: a tensor, a tuple or list of positional arguments,
            or a mapping of keywords; operations and latency are counted on it.
        flops: share of the floating-point operations to keep, in (0, 1).
        params: share of the parameters to keep.
        latency: share of the time per call to keep, measured on this machine.
        method: registered name of a structured score ("group-norm", "group-taylor", ...), or of a
            method that trains towards a cut ("wgsef", "mask-sparsity", ...), or an object of one;
            "slicegpt" cuts no groups but the whole stream, and of the other options only flops=,
            params=, `data` and `copy` count for it.
        data: calibration batches for scores that need them and for folding; for a method that
            trains, its training data: batches, or an object with `epoch(number)` and a length.
        epochs: passes over the data, of methods that train. These cut by their own options
            (`keep=0.5`) instead of a target; OFB takes `flops`.
        loss: `(model, batch) -> scalar` for gradient scores; cross-entropy when None.
        include: name patterns; only groups that touch one of these parameters.
        exclude: name patterns; no group that touches one of these parameters.
        round_to: every width that changes becomes a multiple of this; a mapping of name patterns to
            multiples has one for the outputs of some layers (the first pattern that fits counts).
            "auto": of 1, 8 and 16 the one that is fastest on this machine. None: "auto" for
            `latency`, else 1.
        floor: share of every width that stays at least.
        uniform: equal layers of all blocks keep equal widths, and only widths that a Hugging Face
            config can tell are cut, so that plain from_pretrained loads the result. None: for
            Hugging Face models, unless the method is one that gives blocks widths of their own.
        streams: also cut groups that a statistic runs over (a residual stream under layer norm),
            where cutting is not the same as zeroing.
        blocks: where widths at their floor leave more than the target, drop whole residual blocks,
            the one that the output misses least first.
        fold: what cut channels say goes into the next layer: "mean" (over `data`, into its bias or
            batch-norm mean), "linear" (guessed from the channels that stay, into its weights too),
            "exact" (constant channels only), "none". None: "mean" with data, else "none".
        iterations: rounds of equal relative size, scored anew.
        recover: called with (model, round) after each round but the last, to train in between.
        verify: check that the cut model computes what the model with zeroed groups computes.
        copy: slim a copy; the model given stays as it is.
        progress: called with (done, total, what).
        options: fields of the method.

    Returns:
        what was done; `.model` is the slimmed model.

    Raises:
        InvalidArgument: an option that cannot be used, an example that does not fit the model, or a
            target that cannot be reached.
        CouplingError: the graph holds an operation that is not known.
        ModelError: the model cannot be exported, or does not run with its new shapes.
    """
    start = time.perf_counter()
    targets = {"flops": flops, "params": params, "latency": latency}
    if epochs is not None and registry.has_option(method, "epochs"):
        options["epochs"], epochs = epochs, None  # a score that trains has its own
    chosen = registry.build(method, ("structured", "train-and-cut", "whole-model"), **options)
    if isinstance(chosen, TrainAndCut):
        given_too = {
            **targets, "include": _listed(include) or None, "exclude": _listed(exclude) or None,
            "round_to": round_to, "uniform": uniform, "streams": streams or None,
            "blocks": blocks or None, "fold": fold, "recover": recover,
            "iterations": None if iterations == 1 else iterations,
            "floor": None if floor == 0.1 else floor, "verify": None if verify else False,
        }  # fmt: skip
        return train_and_cut(
            model, example, chosen, given=given_too, data=data, epochs=epochs, loss=loss,
            copy=copy, progress=progress,
        )  # fmt: skip
    if epochs is not None:
        raise InvalidArgument(f"method {chosen.info.name!r} does not train: leave epochs= out")
    batches = None if data is None else _calibration(data)
    if isinstance(chosen, WholeModel):
        given = Arguments.of(example).named(model)
        treated = duplicate(model) if copy else model
        result: SlimResult = chosen.slim(treated, given, targets, batches)
        return result
    what, share = target(targets, floor, iterations, round_to)
    scorer: GroupScore = chosen
    if uniform is None:  # a method that gives every block its own width says so
        uniform = has_config(model) if scorer.uniform is None else scorer.uniform
    plan = Plan(
        scorer,
        batches,
        loss,
        _listed(include),
        _listed(exclude),
        None if round_to == "auto" else round_to,
        floor,
        uniform,
        streams,
        fold or ("mean" if batches is not None and scorer.calibrates else "none"),
        verify,
    )
    given = Arguments.of(example).named(model)
    auto = round_to == "auto" or (round_to is None and what == "latency")
    if copy:
        model = duplicate(model)
    parameters = sum(p.numel() for p in model.parameters())
    report, undo = progress or (lambda *_: None), []
    first: Coupling | None = None
    widths: dict[str, Width] = {}
    changes: list[Change] = []
    config: dict[str, Any] = {}
    gone: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    plain: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    base = 0.0
    guard = None if recover is None else Snapshot(model)  # what it trains is no part of a backup
    try:
        for i in range(iterations):
            report(i, iterations, "cutting groups")
            backup = Backup()
            undo.append(backup)
            while True:
                coupling = trace(model, given)
                if first is None and coupling.functions:
                    plain, whole = _functions(model, given, coupling, plan, backup)
                    coupling = trace(model, given) if plain else coupling
                measure = measured(model, given, coupling, what)
                if first is None:
                    first, base = coupling, measure(coupling.keep_all())
                    shapes = shapes_of(model)
                goal = base * share ** ((i + 1) / iterations)
                try:
                    plan, keep = pick(model, given, coupling, plan, measure, goal, what, auto)
                    break
                except OutOfReach:
                    if not blocks:
                        raise
                container, index, told = drop_least(model, given, backup)
                gone.append(f"{container}.{index}")
                config |= told
                widths = _after_drop(widths, container, index)
                changes = [
                    replace(c, module=name)
                    for c in changes
                    if (name := renamed(c.module, container, index)) is not None
                ]
            auto = False  # one choice for all rounds
            made, fields = apply_cut(model, given, coupling, keep, plan, backup)
            changes, config = changes + made, {**config, **(fields or {})}
            _note(widths, coupling, keep)
            if recover is not None and i + 1 < iterations:
                recover(model, i)
        report(iterations, iterations, "cutting groups")
        assert first is not None
        after = shapes_of(model)
        notes = [f"not reached by the example, left whole: {n}" for n in first.unreached]
        last = trace(model, given)
        return SlimResult(
            scorer.info.name,
            {
                **targets,
                **_plain(plan),
                "blocks": blocks,
                "iterations": iterations,
                **registry.options_of(scorer),
            },
            tuple(widths.values()),
            {n: (shapes[n], after[n]) for n in after if shapes.get(n) != after[n]},
            tuple(changes),
            (config if plan.uniform and has_config(model) else None),
            (sum(2.0 * c.macs for c in first.costs), last.flops()),
            (parameters, sum(p.numel() for p in model.parameters())),
            (base, measure_latency(model, given)) if what == "latency" else None,
            model,
            time.perf_counter() - start,
            (*notes, *whole),
            tuple(gone),
            plain,
            left_whole(last, plan, {n for n in after if shapes.get(n) == after[n]}),
        )
    except BaseException:
        for backup in reversed(undo):
            backup.restore()
        if guard is not None:
            guard.restore()
        raise


def _functions(
    model: nn.Module, example: Batch, coupling: Coupling, plan: Plan, backup: Backup
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Make layers whose weight is computed plain where that is allowed; those, and the others."""
    if plan.uniform and has_config(model):
        why = "its config builds no plain layer there (uniform=False allows one)"
        return (), tuple(f"left whole: {f}; {why}" for f in coupling.functions)
    return materialise(model, example, coupling.functions, backup)


def _listed(given: Patterns) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


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


def _calibration(data: Iterable[Batch] | Batches) -> list[Batch]:
    return list(data if isinstance(data, Iterable) else data.epoch(0))
