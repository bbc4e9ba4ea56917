"""`sparseworks.prune`: make a trained model sparse in one call, without training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.budgets import Budget, get_budget, uniform
from sparseworks.core.errors import InvalidArgument, ModelError, PatternError
from sparseworks.core.masks import masks
from sparseworks.core.patterns import Pattern, parse_pattern, resolve_sparsity
from sparseworks.core.schedules import exponential_rounds
from sparseworks.core.types import Progress, PruneResult
from sparseworks.models.calibration import Calibration
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.hooks import duplicate
from sparseworks.models.ranks import Ranks
from sparseworks.models.seen import look_at
from sparseworks.models.views import View, find_prunable
from sparseworks.weights.oneshot.base import OneShot, Search, Staged
from sparseworks.weights.oneshot.job import Job
from sparseworks.weights.oneshot.jobs import check_finite
from sparseworks.weights.oneshot.recovery import Recovery, get_recovery, name_of
from sparseworks.weights.oneshot.sensitivity import Sensitivity, measured_budget

__all__ = ["allotment", "batches_of", "budget_name", "fitting", "prune"]


def prune(
    model: nn.Module,
    method: str | OneShot | Search,
    *,
    sparsity: float | None = None,
    pattern: str | Pattern | None = None,
    budget: str | Mapping[str, float] | Budget | Sensitivity | None = None,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    skip_indivisible: bool = False,
    rounds: int | None = None,
    recovery: str | Recovery | None = None,
    seed: int = 0,
    copy: bool = False,
    resume: bool = False,
    device: torch.device | str | None = None,
    spill: str | None = None,
    group: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Zero weights of a trained model with a one-shot method and attach the mask record.

    A second call starts from the masks of the first: what is masked stays masked. So does what
    `torch.nn.utils.prune` masked: its layers are pruned at their `weight_orig`, and its masks join
    the record (`sparseworks.fold_torch_masks` makes ordinary weights of them).

    Args:
        model: changed in place, unless `copy`.
        method: registered name ("magnitude", "wanda", "sparsegpt", ...) or a method object.
        sparsity: fraction of zeros in [0, 1) over the pruned tensors; may be left out with N:M, and
            is left out for methods that find sparsities themselves.
        pattern: the legal zeros ("unstructured", "row", "2:4", "block16x16", "rows", ...); None:
            the method's own.
        budget: "uniform", "erk", "global", a mapping name -> sparsity, or a function; by
            sensitivity of blocks: "owl", "alpha", "ecoflap", "cfsp" (options: "owl:spread=0.1") or
            an object of one, under any method; None: the method's own.
        data: calibration batches (Tensor, mapping, or (inputs, target)), re-iterable.
        loss: `(model, batch) -> scalar` for gradient methods; cross-entropy when None.
        include: name patterns of the only weights to prune. With `data`, also of matrices that a
            module holds as bare parameters, where the forward pass is seen to multiply by them.
        exclude: name patterns of weights to leave dense.
        skip_indivisible: leave tensors dense that cannot take the pattern, instead of an error.
        rounds: prune in this many steps of equal relative size; None: the method's own.
        recovery: "refit" re-solves the kept weights of every row by least squares, "dsnot" swaps
            pruned and kept weights until the mean output error cancels ("dsnot:cycles=20" has
            options), an object of one, or None.
        seed: for methods that draw at random.
        copy: prune a copy; the model given stays as it is.
        resume: go on after an interrupted call on a large model; tensors that already have a mask
            are kept as they are.
        device: compute blocks there, one at a time; None: where they live.
        spill: folder for the calibration activations, instead of memory.
        group: of torch.distributed, whose ranks all make this call with the same arguments: they
            share the calibration batches, and all get the masks and weights that one would.
        progress: called with (done, total, what).
        options: fields of the method.

    Returns:
        What was done per tensor; printable.

    Raises:
        InvalidArgument: an option cannot be used; nothing was changed.
        ModelError: nothing to prune, or weights that are not finite; nothing was changed.
        DataError: calibration data is missing or not finite. A model below 1 GiB is left as it
            was; of a larger one the finished tensors keep their masks and `resume=True` goes on.
    """
    began = time.perf_counter()
    chosen = registry.build(method, ("one-shot", "search", "staged"), **options)
    if group is not None and not isinstance(chosen, OneShot):
        raise InvalidArgument(f"{chosen.info.name}: does not share its data over a group of ranks")
    if isinstance(chosen, Search):
        fixed = {
            "sparsity": sparsity, "budget": budget, "pattern": pattern, "rounds": rounds,
            "include": include, "exclude": exclude, "resume": resume or None,
        }  # fmt: skip
        if given := [f"{k}=" for k, v in fixed.items() if v is not None]:
            raise InvalidArgument(
                f"{chosen.info.name} finds sparsities by itself, for the whole model: leave "
                f"{', '.join(given)} out"
            )
        repair = get_recovery(recovery)
        batches = batches_of(chosen, data, repair, uniform)
        choice = chosen.find(model, batches, seed=seed, progress=progress)
        done = prune(
            model, choice.method, sparsity=max(choice.sparsity.values()), budget=choice.sparsity,
            include=list(choice.sparsity), data=batches, loss=loss, recovery=recovery, seed=seed,
            skip_indivisible=skip_indivisible, copy=copy, device=device, spill=spill,
        )  # fmt: skip
        figures = {**choice.figures, "recovery": name_of(repair)}
        settings = {**registry.options_of(chosen), **figures}
        seconds = time.perf_counter() - began
        name, settings = chosen.info.name, {**settings, "seed": seed}
        return replace(done, method=name, options=settings, seconds=seconds)
    if isinstance(chosen, Staged):
        return chosen.prune(
            model, prune, sparsity=sparsity, pattern=pattern, budget=budget, data=data, loss=loss,
            include=include, exclude=exclude, skip_indivisible=skip_indivisible, rounds=rounds,
            recovery=recovery, seed=seed, copy=copy, resume=resume, device=device, spill=spill,
            progress=progress,
        )  # fmt: skip
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    wanted = resolve_sparsity(legal, sparsity)
    repair = get_recovery(recovery)
    if repair is not None:
        repair.check(legal)
    steps = chosen.rounds if rounds is None else rounds
    ladder = [wanted] if legal.fixed_density is not None else exponential_rounds(steps, wanted)
    if resume and len(ladder) > 1:
        raise InvalidArgument(
            "resume goes on after an interrupted call of one round, not of several"
        )
    allot = allotment(chosen, budget, legal, resume)
    batches = batches_of(chosen, data, repair, allot)
    look = None if batches is None else look_at(model, batches)
    found = find_prunable(model, include, exclude, torch_masked=True, look=look)
    views, skipped = fitting(found.views, legal, skip_indivisible)
    skipped = found.reasons() | skipped
    check_finite(views, "; nothing was pruned")

    target = model
    if copy:
        target = duplicate(model)
        views = [v.within(target) for v in views]
    job = Job(target, chosen, legal, allot, batches, loss, repair, seed, resume)
    job.ranks = Ranks(group)
    if batches is not None:
        job.calibration = Calibration(batches, device, chosen.propagate, spill, progress, job.ranks)
    job.run(views, ladder, skipped, progress)
    settings = {
        **registry.options_of(chosen),
        "sparsity": wanted,
        "pattern": str(legal),
        "budget": budget_name(budget, chosen, legal),
        "rounds": steps,
        "recovery": name_of(recovery),
        "seed": seed,
    }
    record = masks(target)
    assert record is not None
    return PruneResult(
        chosen.info.name,
        settings,
        tuple(job.results[v.name] for v in views if v.name in job.results),
        skipped,
        record,
        target,
        job.shortfall,
        time.perf_counter() - began,
        tuple(job.warnings),
    )


def allotment(method: OneShot, given: Any, pattern: Pattern, resume: bool) -> Budget | Sensitivity:
    """Who pays; N:M has one density, so there the method's own budget does not count."""
    if pattern.fixed_density is not None and given is None:
        return uniform
    chosen = method.budget if given is None else given
    found = measured_budget(chosen)
    if found is None:
        return get_budget(chosen)
    if pattern.fixed_density is not None:
        raise InvalidArgument(
            f"pattern {pattern} has one density; budget '{found}' cannot vary it (use 'uniform')"
        )
    if resume:
        raise InvalidArgument(
            f"budget '{found}' measures the whole model, of which a part is pruned already: resume "
            "with the sparsities of the first call, budget={name: sparsity}"
        )
    return found


def batches_of(
    method: OneShot | Search,
    data: Iterable[Batch] | None,
    recovery: Recovery | None,
    budget: Budget | Sensitivity,
) -> Sequence[Batch] | None:
    """The calibration batches, or None where there are none and none are needed."""
    if data is None:
        needs = {
            method.info.name: "data" in method.info.needs,
            f"recovery={name_of(recovery)!r}": recovery is not None,
            f"budget='{budget}'": isinstance(budget, Sensitivity) and "data" in budget.needs,
        }
        for what, needed in needs.items():
            if needed:
                raise InvalidArgument(f"{what} needs calibration batches: give `data=`")
        return None
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    return data if isinstance(data, Sequence) else list(data)


def fitting(
    views: Sequence[View], pattern: Pattern, skip: bool
) -> tuple[list[View], dict[str, str]]:
    """The views that can take the pattern; the others skipped by name, or an error."""
    fitting, skipped = [], {}
    for view in views:
        try:
            view.fitted(pattern).check(view.shape, view.run)
            fitting.append(view)
        except PatternError as error:
            if not skip:
                raise PatternError(
                    f"{view.name}: {error}; exclude it, or skip such tensors (skip_indivisible)"
                ) from None
            skipped[view.name] = str(error)
    if not fitting:
        raise ModelError(f"no weight can take pattern {pattern}: {next(iter(skipped.items()))}")
    return fitting, skipped


def budget_name(given: Any, method: OneShot, pattern: Pattern) -> str:
    """What the record of a call says of its budget."""
    if given is None:
        given = "uniform" if pattern.fixed_density is not None else method.budget
    if isinstance(given, (str, Sensitivity)):
        return str(given)
    return getattr(given, "__name__", "per tensor")
