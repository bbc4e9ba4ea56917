"""`sparseworks.experiment`: methods that train several times (tickets, soups, searches).

The caller's own training function is called once per run; what a run was is described by plain
values that hash to its folder, so an experiment that is killed goes on where it was, and two
experiments in one folder share the runs that they have in common.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.patterns import Pattern, check_sparsity, parse_pattern
from sparseworks.core.types import Progress
from sparseworks.models.calls import Batch
from sparseworks.training.driving import Driver, Evaluate, Experiment
from sparseworks.training.parts import Fit
from sparseworks.training.runs import Store, digest_of

__all__ = ["Driver", "Experiment", "experiment"]


def experiment(
    fit: Fit,
    model: nn.Module,
    method: str | Driver,
    *,
    folder: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    budget: Any = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
    data: Iterable[Batch] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Experiment:
    """Run a method that trains several times; the model becomes its result.

    Args:
        fit: `fit(model, *, start, seed, first_step)` trains a model in place. It makes its own
            optimizer, calls `start(model, optimizer, steps)` with the number of steps of a whole
            training before the first of them, draws its data order from `seed`, and begins its
            schedule and its data order at `first_step`. It may be ended by an exception between
            two steps.
        model: the model at its initialisation (or trained, where the method starts there).
        method: a registered method of this kind, or its object.
        folder: keeps finished runs; the same call again skips them. None: in memory.
        about: what `fit`, `evaluate` and `data` are (recipe, data set), in JSON values. Runs are
            reused when this and the rest of their description are equal, so it is needed with
            a folder.
        sparsity: final fraction of zeros.
        pattern: legal zeros; None: the method's own.
        budget: who pays; None: the method's own.
        include: name patterns of the only weights to mask.
        exclude: name patterns of weights to leave dense.
        seed: of the data order.
        evaluate: `(model) -> score` on held-out data, higher is better; never on the test set
            where a method chooses by it.
        data: training batches, for methods that re-estimate batch-norm statistics.
        progress: called with (runs done, runs in all, name).
        options: fields of the method.

    Raises:
        InvalidArgument: something that cannot be used; nothing was trained.
        CheckpointError: a kept run is damaged.
    """
    chosen: Driver = registry.build(method, ("driver",), **options)
    if folder is not None and about is None:
        raise InvalidArgument(
            "runs in a folder are reused when their descriptions are equal: give `about`, what "
            "the training function does (recipe, data), in JSON values"
        )
    try:
        digest_of(about or {})
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"`about` must be JSON values ({error})") from None
    if sparsity is not None:
        check_sparsity(sparsity)
    made = Experiment(
        fit,
        model,
        chosen,
        sparsity=sparsity,
        pattern=parse_pattern(chosen.pattern if pattern is None else pattern),
        budget=chosen.budget if budget is None else budget,
        include=include,
        exclude=exclude,
        seed=seed,
        evaluate=evaluate,
        data=None if data is None else list(data),
        about=about or {},
        store=Store(folder),
        progress=progress,
    )
    result = chosen.run(made)
    result.into(model)
    made.result = result
    said = made.to_dict()
    what = digest_of({k: v for k, v in said.items() if k not in ("runs", "figures", "result")})
    made.store.note(f"{chosen.info.name}-{what}.json", said)
    return made
