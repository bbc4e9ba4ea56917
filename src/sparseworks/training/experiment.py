"""`sparseworks.experiment`: methods that train several times (tickets, soups, searches).

The caller's own training function is called once per run; what a run was is described by plain
values that hash to its folder, so an experiment that is killed goes on where it was, and two
experiments in one folder share the runs that they have in common.
"""

from __future__ import annotations

import copy
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from sparseworks.core import registry
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.patterns import Pattern, check_sparsity, parse_pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch
from sparseworks.models.views import View, find_prunable
from sparseworks.training.hooked import Run
from sparseworks.training.runs import (
    Finished,
    Store,
    digest_of,
    digest_of_masks,
    digest_of_model,
)
from sparseworks.training.sparsify import sparsify

__all__ = ["Driver", "Experiment", "experiment"]

Fit = Callable[..., Any]
Evaluate = Callable[[nn.Module], float]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Driver(ABC):
    """Base of methods that own the training loop; frozen dataclasses of options.

    Args:
        pattern: legal zeros, where the call names none.
        budget: who pays, where the call names none.
    """

    pattern: str | Pattern = "unstructured"
    budget: str | Mapping[str, float] | Budget = "global"

    info: ClassVar[MethodInfo]

    @abstractmethod
    def run(self, experiment: Experiment) -> Finished:
        """Train as often as needed; the run that is returned becomes the model."""


class _Reached(BaseException):
    """Ends a training at a chosen step; not an Exception, so that loops let it pass."""


class Experiment:
    """The runs of one experiment; made by `experiment`.

    Attributes:
        model: filled with the result at the end, untouched before.
        finished: name -> run, in the order in which they were made or found.
        result: the run that the model holds, once the experiment is over.
        total: how many runs the method expects, for progress.
        figures: what was measured between runs.
    """

    def __init__(
        self,
        fit: Fit,
        model: nn.Module,
        method: Driver,
        *,
        sparsity: float | None,
        pattern: Pattern,
        budget: Any,
        include: str | Iterable[str] | None,
        exclude: str | Iterable[str] | None,
        seed: int,
        evaluate: Evaluate | None,
        data: Sequence[Batch] | None,
        about: Mapping[str, Any],
        store: Store,
        progress: Progress | None,
    ) -> None:
        self.fit, self.model, self.method = fit, model, method
        self.sparsity, self.pattern, self.budget = sparsity, pattern, budget
        self.include, self.exclude = include, exclude
        self.seed, self.evaluate, self.data = seed, evaluate, data
        self.store, self.progress = store, progress
        self.total = 0
        self.finished: dict[str, Finished] = {}
        self.result: Finished | None = None
        self.figures: dict[str, float] = {}
        self._common = {"format": 1, "model": digest_of_model(model), "about": dict(about)}
        self.views(model)  # a name pattern that matches nothing is refused before any training

    def fresh(self) -> nn.Module:
        """A copy of the model as it was given."""
        return copy.deepcopy(self.model)

    def views(self, model: nn.Module) -> list[View]:
        """The prunable weights of a copy of the model, as the caller chose them."""
        return list(find_prunable(model, self.include, self.exclude))

    def once(
        self,
        name: str,
        description: Mapping[str, Any],
        make: Callable[[nn.Module], Mapping[str, float] | None],
    ) -> Finished:
        """A run from where it is kept, or made now and kept.

        Args:
            name: of the run in this experiment.
            description: all that it depends on besides the model and `about`, in JSON values.
            make: turns a fresh copy of the experiment's model into the result, in place, and may
                return figures.
        """
        described = {**self._common, **description}
        digest = digest_of(described)
        said = self.store.find(digest)
        figures = dict(said["figures"]) if said is not None else {}
        done = Finished(name, digest, described, figures, self.store)
        scored = self.evaluate is None or "score" in figures
        if said is None or not scored:
            copied = self.fresh()
            if said is None:
                began = time.perf_counter()
                figures.update(make(copied) or {})
                figures["seconds"] = round(time.perf_counter() - began, 3)
                record = masks(copied)
                figures["sparsity"] = record.sparsity() if record is not None else 0.0
            else:
                done.into(copied)
            if self.evaluate is not None:
                figures["score"] = self.score(copied)
            self.store.keep(done, copied)
        self.finished[name] = done
        if self.progress is not None:
            self.progress(len(self.finished), max(self.total, len(self.finished)), name)
        return done

    def train(
        self,
        name: str,
        *,
        start: Finished | None = None,
        record: Masks | None = None,
        first_step: int = 0,
        stop_at: int | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Finished:
        """Train a copy of the model with the caller's `fit`; masked weights stay exactly 0.

        Args:
            name: of the run.
            start: the run whose weights and buffers it starts from; None: the model as given.
            record: its masks; None: those of the start.
            first_step: where the schedule and the data order go on.
            stop_at: end after this step, counted like `first_step`.
            seed: of the data order; None: the experiment's.
            options: passed on to `fit`.

        Raises:
            ModelError: `fit` never called `start`, so nothing could be hooked in.
        """
        order = self.seed if seed is None else seed
        description = {
            "run": "train",
            "start": None if start is None else start.digest,
            "masks": digest_of_masks(record),
            "first_step": first_step,
            "stop_at": stop_at,
            "seed": order,
            "options": options,
        }

        def make(model: nn.Module) -> Mapping[str, float]:
            if start is not None:
                start.into(model)
            if record is not None:
                attach(model, record)
                record.apply(model)
            steps = self._fit(model, order, first_step, stop_at, options)
            return {"steps": steps, "first_step": first_step}

        return self.once(name, description, make)

    def _fit(
        self,
        model: nn.Module,
        seed: int,
        first_step: int,
        stop_at: int | None,
        options: Mapping[str, Any],
    ) -> int:
        """Call the caller's loop on a model with or without masks; returns its steps."""
        record = masks(model)
        steps: list[int] = []
        runs: list[Run] = []
        handles: list[Any] = []
        reached = first_step

        def begin(net: nn.Module, optimizer: Optimizer, count: int) -> Run | None:
            nonlocal reached
            steps.append(count)
            if record is not None and len(record):
                runs.append(sparsify(net, optimizer, "fixed"))

            def after(*_: Any) -> None:
                nonlocal reached
                reached += 1
                if reached == stop_at:
                    raise _Reached

            handles.append(optimizer.register_step_post_hook(after))
            return runs[0] if runs else None

        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            try:
                self.fit(model, start=begin, seed=seed, first_step=first_step, **options)
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
                for run in runs:
                    run.finish()
        if not steps:
            raise ModelError(
                "the training function never called `start(model, optimizer, steps)`; it must, "
                "after it made the optimizer and before the first step"
            )
        if stop_at is not None and reached != stop_at:
            raise InvalidArgument(f"the training ended at step {reached}, before step {stop_at}")
        attach(model, record)  # with the method and the patterns that chose it
        model.eval()
        model.zero_grad(set_to_none=True)
        return steps[0]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """What `evaluate` says of a model, which is left in evaluation mode.

        Raises:
            InvalidArgument: there is no `evaluate`, or it did not return a finite number.
        """
        if self.evaluate is None:
            raise InvalidArgument(f"method {self.method.info.name!r} chooses by `evaluate`")
        model.eval()
        value = float(self.evaluate(model))
        if not math.isfinite(value):
            raise InvalidArgument(f"`evaluate` returned {value}; a finite number is needed")
        return value

    def to_dict(self) -> dict[str, Any]:
        """The whole experiment in JSON values."""
        return {
            "method": self.method.info.name,
            "options": registry.options_of(self.method),
            "sparsity": self.sparsity,
            "pattern": str(self.pattern),
            "seed": self.seed,
            **self._common,
            "runs": {n: {"run": r.digest, **r.figures} for n, r in self.finished.items()},
            "figures": self.figures,
            "result": None if self.result is None else self.result.name,
        }

    def __str__(self) -> str:
        width = max([len(n) for n in self.finished], default=3)
        lines = [f"{self.method.info.name}: {len(self.finished)} runs"]
        for name, run in self.finished.items():
            score = f"  score {run.figures['score']:.4g}" if "score" in run.figures else ""
            mark = "  <- the model" if run is self.result else ""
            lines.append(f"  {name:<{width}}  {run.figures['sparsity']:.2%} zeros{score}{mark}")
        lines += [f"  {name}: {value:.4g}" for name, value in self.figures.items()]
        return "\n".join(lines)


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
    chosen = registry.build(method, **options)
    if not isinstance(chosen, Driver):
        kind = getattr(getattr(chosen, "info", None), "kind", type(chosen).__name__)
        raise InvalidArgument(f"method {method!r} is {kind}, not one that trains several times")
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
