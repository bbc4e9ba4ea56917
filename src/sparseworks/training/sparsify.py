"""`sparseworks.sparsify`: start a sparse run on a model and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.patterns import Pattern, parse_pattern, resolve_sparsity
from sparseworks.models.hooks import with_torch_masks
from sparseworks.models.matrix import parameters_of
from sparseworks.models.views import View, find_prunable, recorded_views
from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.names import plain_name, unwrapped
from sparseworks.training.optimizers import Optimizers
from sparseworks.training.straight_through import StraightThrough
from sparseworks.training.swapping import StraightThroughRun

__all__ = ["sparsify"]


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    method: str | Hooked,
    *,
    sparsity: float | None = None,
    steps: int | None = None,
    pattern: str | Pattern | None = None,
    budget: Any = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Make a training loop sparse; call the loop as before, then `run.finish()`.

    Args:
        model: the model that trains; wrappers may be put round it afterwards.
        optimizer: any torch optimizer that holds the model's parameters one by one, or a list of
            them; a step of the run is then over when each that holds a masked tensor has stepped.
        method: "fixed" (the zeros of the model's mask record stay zero) or a registered method.
        sparsity: final fraction of zeros, for methods that choose masks; left out with N:M.
        steps: optimizer steps of the whole training, for methods with a schedule.
        pattern: legal zeros; None: the method's own.
        budget: who pays; None: the method's own.
        include: name patterns of the only weights to mask. Frozen ones are refused here; without
            `include` they stay as they are and `run.skipped` names them.
        exclude: name patterns of weights to leave dense.
        seed: of the run's private random numbers.
        options: fields of the method.

    Raises:
        InvalidArgument: an option or an optimizer that cannot be used; nothing was changed.
        ModelError: "fixed" on a model without masks, or no weight left that trains.
    """
    chosen: Hooked = registry.build(method, ("hooked",), **options)
    optimizers = Optimizers(optimizer)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InvalidArgument(
            "FullyShardedDataParallel keeps flattened copies of the weights, in which masks cannot "
            "be enforced; shard the model with torch.distributed.fsdp.fully_shard"
        )
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    if chosen.starts_from_record:
        views, skipped = _recorded(model, chosen)
    else:
        views, skipped = _trained(model, chosen, legal, include, exclude)
        sparsity = resolve_sparsity(legal, sparsity, f"method {chosen.info.name!r}")
    held = optimizers.held
    lacking = [v.name for v in views if v.parameter.requires_grad and id(v.parameter) not in held]
    if lacking:
        who = "the optimizer does" if len(optimizers.all) == 1 else "the optimizers do"
        raise InvalidArgument(
            f"{who} not hold {lacking[0]!r}; build it from this model's parameters, give the list "
            "where several train the model, or exclude the tensor"
        )
    plain = [replace(v, name=plain_name(v.name)) for v in views]
    kind = StraightThroughRun if isinstance(chosen, StraightThrough) else Run
    run = kind(
        model,
        optimizers,
        chosen,
        plain,
        sparsity=sparsity,
        steps=steps,
        pattern=legal,
        budget=chosen.budget if budget is None else budget,
        seed=seed,
        skipped=skipped,
    )
    run.start()
    return run


def _recorded(model: nn.Module, method: Hooked) -> tuple[list[View], dict[str, str]]:
    """The weights of the model's mask record, frozen or not: their zeros are chosen already."""
    record = with_torch_masks(unwrapped(model), masks(unwrapped(model)))
    if record is None or not len(record):
        raise ModelError(
            f"method {method.info.name!r} needs a model with masks: prune or load one first"
        )
    absent = set(record) - {plain_name(n) for n, *_ in parameters_of(model)}
    if absent:
        raise ModelError(f"the mask record names {min(absent)!r}, which the model has not")
    views = recorded_views(model, record, plain_name)
    taken = {v.name for v in views}
    found = find_prunable(model, torch_masked=True, required=False)
    reasons = found.reasons() | {v.name: "it has no mask" for v in found}
    return views, {p: why for n, why in reasons.items() if (p := plain_name(n)) not in taken}


def _trained(
    model: nn.Module,
    method: Hooked,
    pattern: Pattern,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> tuple[list[View], dict[str, str]]:
    """The weights that the method masks, and why the others are left as they are.

    No gradient will ever say what a frozen one should keep or grow.
    """
    include = [include] if isinstance(include, str) else list(include or ())
    found = find_prunable(model, include, exclude, embeddings=method.embeddings)
    refused = {v.name: method.why_not(v, pattern) for v in found}
    views = [v for v in found if not refused[v.name] and v.parameter.requires_grad]
    skipped = {plain_name(n): reason for n, reason in found.reasons().items()}
    for view in found:
        if refused[view.name]:
            skipped[plain_name(view.name)] = refused[view.name]
        elif not view.parameter.requires_grad:
            skipped[plain_name(view.name)] = "frozen (requires_grad=False)"
            if include:
                raise InvalidArgument(
                    f"`include` asks for {view.name!r}, which is frozen (requires_grad=False): no "
                    "gradient would say what to keep or grow; let it train, or exclude it"
                )
    if not views:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ModelError(f"method {method.info.name!r} takes none of the tensors given ({reasons})")
    return views, skipped
