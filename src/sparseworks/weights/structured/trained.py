"""`slim` with a method that trains: train towards a cut, make it, and say what it did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.core.masks import masks
from sparseworks.core.types import Progress
from sparseworks.models.calls import Arguments, Batch, Example, Loss
from sparseworks.models.coupling import Coupling, trace
from sparseworks.models.hooks import duplicate
from sparseworks.weights.structured.backup import Snapshot
from sparseworks.weights.structured.base import EpochBatches, TrainAndCut
from sparseworks.weights.structured.planning import shapes_of
from sparseworks.weights.structured.result import SlimResult, Width

__all__ = ["train_and_cut"]


def train_and_cut(
    model: nn.Module,
    example: Example,
    method: TrainAndCut,
    *,
    given: Mapping[str, Any],
    data: Any,
    epochs: int | None,
    loss: Loss | None,
    copy: bool,
    progress: Progress | None,
) -> SlimResult:
    """What `slim` does for methods of kind "train-and-cut".

    Args:
        given: options of `slim` for scores, None where nothing was given; where the method has one
            of the name, that is set.

    Raises:
        InvalidArgument: the method does not take what was given; the model is as it was.
        DataError: there are no batches, or the loss is not finite; the model is as it was.
    """
    start, name = time.perf_counter(), method.info.name
    known = [f.name for f in fields(method)]  # type: ignore[arg-type]
    own = {option: value for option, value in given.items() if value is not None}
    for option in own:
        if option not in known:
            raise InvalidArgument(
                f"method {name!r} trains and cuts by its own options ({', '.join(known)}); "
                f"{option}= is not for it"
            )
    method = replace(method, **own)  # type: ignore[type-var]
    if data is None or epochs is None:
        raise InvalidArgument(
            f"method {name!r} trains before it cuts: give data= (training batches, or an object "
            "with epoch(number) and a length) and epochs="
        )
    if epochs < 1:
        raise InvalidArgument(f"epochs={epochs} must be at least 1")
    if masks(model) is not None:
        raise InvalidArgument(
            f"the model has masks, which the training of {name!r} would not keep: slim it first "
            "and prune then, or drop them (sw.attach(model, None))"
        )
    batches, steps = _epochs(data)
    called = Arguments.of(example).named(model)
    if copy:
        model = duplicate(model)
    before, shapes = trace(model, called), shapes_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    snapshot = Snapshot(model)
    task = None if loss is None else lambda net, batch, logits: loss(net, batch)
    try:
        fitted = method.fit(
            model,
            called,
            batches,
            epochs=epochs,
            steps_per_epoch=steps,
            loss=task,
            progress=progress,
        )
        after = trace(model, called)
        changes = snapshot.changes()
    except BaseException:
        snapshot.restore()
        raise
    snapshot.modes()
    model.zero_grad(set_to_none=True)
    now = shapes_of(model)
    return SlimResult(
        name,
        {**registry.options_of(method), "epochs": epochs},
        tuple(_width(before, n, *w) for n, w in fitted.widths.items()),
        {n: (shapes[n], now[n]) for n in now if shapes[n] != now[n]},
        tuple(changes),
        None,
        (before.flops(), after.flops()),
        (parameters, sum(p.numel() for p in model.parameters())),
        model=model,
        seconds=time.perf_counter() - start,
        warnings=tuple(f"not reached by the example, left whole: {n}" for n in before.unreached),
        training=fitted.figures(),
    )


def _width(coupling: Coupling, name: str, before: int, after: int) -> Width:
    for family in coupling.families:
        for parameter, axis in family.axes:
            if parameter == name:
                per = int(np.sum(coupling.axes[name, axis] == family.roots[0]))
                return Width(f"{name} axis {axis}", before, after, per)
    return Width(name, before, after)


def _epochs(data: Any) -> tuple[EpochBatches, int]:
    """Batches by epoch, and how many there are in one."""
    if hasattr(data, "epoch") and hasattr(data, "__len__"):
        if len(data) < 1:
            raise DataError("the data give no whole batch: give more, or a smaller batch size")
        return data.epoch, len(data)
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    batches: list[Batch] = list(data) if isinstance(data, Iterable) else []
    if not batches:
        raise DataError("there are no training batches in data=")
    return (lambda number: batches), len(batches)
