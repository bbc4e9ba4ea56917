"""Methods that own the training loop, and what an experiment offers them.

A run is made once: what it was is described by plain values that hash to its folder, and a run that
is there is not made again.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sparseworks.core import registry
from sparseworks.core.budgets import Budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.patterns import Pattern
from sparseworks.core.registry import MethodInfo
from sparseworks.core.types import Progress, dense_lines
from sparseworks.models.calls import Batch
from sparseworks.models.hooks import duplicate
from sparseworks.models.views import View, find_prunable
from sparseworks.training.parts import Fit, train_part
from sparseworks.training.runs import (
    Finished,
    Store,
    digest_of,
    digest_of_masks,
    digest_of_model,
)

__all__ = ["Driver", "Evaluate", "Experiment"]

Evaluate = Callable[[nn.Module], float]


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


class Experiment:
    """The runs of one experiment; made by `sparseworks.experiment`.

    Attributes:
        model: filled with the result at the end, untouched before.
        finished: name -> run, in the order in which they were made or found.
        result: the run that the model holds, once the experiment is over.
        total: how many runs the method expects, for progress.
        figures: what was measured between runs.
        skipped: tensor name -> why it stays dense in all of them.
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
        # a name pattern that matches nothing is refused before any training
        self.skipped = find_prunable(model, include, exclude).reasons()

    def fresh(self) -> nn.Module:
        """A copy of the model as it was given."""
        return duplicate(self.model)

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
            steps = train_part(
                self.fit, model, seed=order, first_step=first_step, stop_at=stop_at, options=options
            )
            return {"steps": steps, "first_step": first_step}

        return self.once(name, description, make)

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
            "skipped": self.skipped,
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
        lines += dense_lines(self.skipped)
        return "\n".join(lines)
