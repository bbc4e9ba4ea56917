"""One call of `prune` at work: rounds, budgets, streaming, and undoing it all on failure."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import Budget, shortfall, uniform
from sparseworks.core.errors import InvalidArgument, SparseworksError
from sparseworks.core.evidence import Collector, Hessian
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.patterns import Pattern
from sparseworks.core.types import Progress, TensorResult
from sparseworks.models.calibration import Calibration, collect, stream
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.hooks import as_given, with_torch_masks
from sparseworks.models.ranks import Ranks
from sparseworks.models.residence import Residence
from sparseworks.models.views import View
from sparseworks.weights.oneshot.base import OneShot, Target
from sparseworks.weights.oneshot.jobs import LazyScores, diagonal_error, put, share
from sparseworks.weights.oneshot.recovery import Recovery
from sparseworks.weights.oneshot.sensitivity import Measured, Sensitivity

__all__ = ["Job"]

_ROLLBACK_BYTES = 1 << 30


class Job:
    """One call: the state that must be undone when it fails."""

    def __init__(
        self,
        model: nn.Module,
        method: OneShot,
        pattern: Pattern,
        budget: Budget | Sensitivity,
        batches: Sequence[Batch] | None,
        loss: Loss | None,
        recovery: Recovery | None,
        seed: int,
        resume: bool,
    ) -> None:
        self.model, self.method, self.pattern = model, method, pattern
        self.allot = budget
        self.budget: Budget = uniform  # until it is measured
        self.batches, self.loss, self.recovery, self.seed = batches, loss, recovery, seed
        self.calibration: Calibration | None = None
        self.ranks, self.home = Ranks(), Residence()
        before = masks(model)
        self.finished = set(before or ()) if resume else set()
        self.record = with_torch_masks(model, before) or Masks()
        self.record = Masks({n: self.record.entry(n) for n in self.record}, method.info.name)
        self.results: dict[str, TensorResult] = {}
        self.warnings: list[str] = []
        self.shortfall = 0

    def run(
        self,
        views: Sequence[View],
        ladder: Sequence[float],
        skipped: dict[str, str],
        progress: Progress | None,
    ) -> None:
        self.budget = self._measured(views)
        undo = self.method.prepare(self, views, ladder[-1])
        total = sum(v.parameter.numel() for v in views)
        kept = sum(
            self.record.entry(v.name).kept if v.name in self.record else v.parameter.numel()
            for v in views
        )
        ladder = [s for s in ladder if s >= 1 - kept / total] or ladder[-1:]  # the first are behind
        with as_given(views) as pruned:
            try:
                self._rounds(views, ladder, skipped, progress, undo)
            finally:
                pruned.update(self.results)

    def _measured(self, views: Sequence[View]) -> Budget:
        """The budget, measured on the model as it is given where it asks for that."""
        if not isinstance(self.allot, Sensitivity):
            return self.allot
        on = Measured(self.model, self.batches, self.loss, self.calibration, self.seed)
        return self.allot.budget(on, views)

    def _rounds(
        self,
        views: Sequence[View],
        ladder: Sequence[float],
        skipped: dict[str, str],
        progress: Progress | None,
        undo: Callable[[], None],
    ) -> None:
        before = masks(self.model)
        size = sum(v.parameter.numel() * v.parameter.element_size() for v in views)
        backup = (
            {v.name: v.parameter.detach().clone() for v in views}
            if size < _ROLLBACK_BYTES
            else None
        )
        try:
            for position, sparsity in enumerate(ladder):
                report = progress if position == len(ladder) - 1 else None
                self.round(views, sparsity, skipped, report)
                if progress is not None and len(ladder) > 1:
                    progress(position + 1, len(ladder), f"round {position + 1}")
            attach(self.model, self._told(before))
        except BaseException as error:
            if backup is not None:
                with torch.no_grad():
                    for view in views:
                        view.parameter.copy_(backup[view.name])
                undo()
                attach(self.model, before)
                self.results.clear()
            else:
                attach(self.model, self._told(before) if self.results else before)
                if isinstance(error, SparseworksError):
                    raise type(error)(
                        f"{error}; {len(self.results)} of {len(views)} tensors are done and keep "
                        "their masks, call again with resume=True"
                    ) from error
            raise

    def _told(self, before: Masks | None) -> Masks:
        """The record to attach: torch's own masks only of what was pruned."""
        names = [n for n in self.record if n in self.results or n in (before or ())]
        return Masks({n: self.record.entry(n) for n in names}, self.record.method)

    def round(
        self,
        views: Sequence[View],
        sparsity: float,
        skipped: dict[str, str],
        progress: Progress | None,
    ) -> None:
        open_ = [v for v in views if v.name not in self.finished]
        specs = [v.spec(self.pattern) for v in views]
        streamed = self.method.collector is not None or self.recovery is not None
        evidence = {}
        if self.method.collector is None and self.batches is not None:
            evidence = dict(self.method.gather(self.model, views, self.batches, self.loss))
        scores = LazyScores(lambda: self.score_all(views, evidence))
        keep = self.budget(specs, sparsity, scores)
        del scores
        self.shortfall = shortfall(specs, keep, sparsity)
        if not streamed:
            done = 0
            for (name, module), own in itertools.groupby(open_, self.home.place):
                with self.home.resident(name, module):
                    for view in own:
                        self.prune_one(view, keep[view.name], evidence.get(view.name), None)
                        done += 1
                        if progress is not None:
                            progress(done, len(open_), view.name)
            return
        assert self.calibration is not None
        both = (self.method.collector, self.recovery.evidence if self.recovery else None)
        kinds: list[type[Collector]] = list(dict.fromkeys(k for k in both if k is not None))
        remaining = {v.name for v in open_}

        def make(view: View, device: torch.device) -> list[Collector]:
            if view.name not in remaining:
                return []
            return [kind(view.groups, view.shape[1], device) for kind in kinds]

        def visit(view: View, collectors: Sequence[Collector]) -> None:
            if view.name in remaining:
                own = evidence.get(view.name) if self.method.collector is None else collectors[0]
                self.prune_one(view, keep[view.name], own, collectors)

        def settle(views: Sequence[View], owner: Mapping[str, int]) -> None:
            share(self, [v for v in views if v.name in remaining], owner)

        unused = stream(self.model, views, self.calibration, make, visit, settle)
        for name in unused:
            skipped[name] = "the calibration data did not use it"
            self.warnings.append(f"{name} was not used by the calibration data and is left dense")

    def score_all(self, views: Sequence[View], evidence: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scores of all tensors at once, for budgets that compare them."""
        if self.method.collector is Hessian:
            raise InvalidArgument(
                f"{self.method.info.name} scores weights while it changes them, so budget 'global' "
                "cannot compare them; use 'uniform', 'erk' or sparsities per tensor"
            )
        if self.method.collector is not None:
            assert self.calibration is not None
            kind = self.method.collector
            seen = collect(
                self.model, views, self.calibration, lambda v, d: [kind(v.groups, v.shape[1], d)]
            )
            evidence = {n: c[0] for n, c in seen.items()}
        scores = {}
        for view in views:
            target = self.target(view, 0)
            weight = view.matrix().float()
            scores[view.name] = self.method.matrix_scores(target, weight, evidence.get(view.name))
        return scores

    def target(self, view: View, keep: int) -> Target:
        allowed = view.matrix(self.record[view.name]) if view.name in self.record else None
        if allowed is not None:
            allowed = allowed.to(view.parameter.device)
        return Target(view, view.fitted(self.pattern), keep, allowed, self.seed)

    @torch.no_grad()
    def prune_one(
        self, view: View, keep: int, evidence: Any, collectors: Sequence[Collector] | None
    ) -> None:
        began = time.perf_counter()
        dense = view.matrix().float()
        target = self.target(view, keep)
        try:
            solution = self.method.solve(target, dense, evidence)
        except InvalidArgument as reason:
            masked = "; it has a mask from before: ask for a higher sparsity, take pattern="
            hint = "" if target.allowed is None else f"{masked}'unstructured', or exclude it"
            raise InvalidArgument(f"{view.name}: {reason}{hint}") from None
        note = ""
        for collector in collectors or ():
            if unseen := collector.unseen_groups():
                note = f"no calibration token reached groups {unseen}; pruned by magnitude"
                self.warnings.append(f"{view.name}: {note}")
                break
        if self.recovery is not None and collectors:
            seen = next(c for c in collectors if isinstance(c, self.recovery.evidence))
            solution = self.recovery.recover(target, dense, solution, seen)
        error = solution.error
        if error is None and collectors:
            error = diagonal_error(view, dense, solution.weight, collectors[0])
        put(view, solution.weight, solution.mask)
        mask = view.from_matrix(solution.mask)
        self.record = self.record.with_mask(view.name, mask, str(self.pattern))
        entry = self.record.entry(view.name)
        self.results[view.name] = TensorResult(
            view.name,
            entry.shape,
            str(self.pattern),
            entry.kept,
            mask.numel(),
            error,
            time.perf_counter() - began,
            note,
        )
