"""`sparseworks.sparsify`: start a sparse run on a model and its optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.patterns import Pattern, check_sparsity, parse_pattern
from sparseworks.models.hooks import with_torch_masks
from sparseworks.models.matrix import parameters_of
from sparseworks.models.views import find_prunable, recorded_views
from sparseworks.training.hooked import Hooked, Run, plain_name, unwrapped

__all__ = ["sparsify"]

_FLATTENING = (
    "FP16_Optimizer", "DistributedFusedAdam", "DistributedFusedLAMB", "DeepSpeedZeroOptimizer",
    "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer", "ZeroRedundancyOptimizer",
)  # fmt: skip
_WRAPPING = ("AcceleratedOptimizer", "LightningOptimizer")  # hooks go on the optimizer inside


def sparsify(
    model: nn.Module,
    optimizer: Optimizer,
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
        optimizer: any torch optimizer that holds the model's parameters one by one.
        method: "fixed" (the zeros of the model's mask record stay zero) or a registered method.
        sparsity: final fraction of zeros, for methods that choose masks.
        steps: optimizer steps of the whole training, for methods with a schedule.
        pattern: legal zeros; None: the method's own.
        budget: who pays; None: the method's own.
        include: name patterns of the only weights to mask.
        exclude: name patterns of weights to leave dense.
        seed: of the run's private random numbers.
        options: fields of the method.

    Raises:
        InvalidArgument: an option or an optimizer that cannot be used; nothing was changed.
        ModelError: "fixed" on a model without masks.
    """
    chosen = registry.build(method, **options)
    if not isinstance(chosen, Hooked):
        kind = getattr(getattr(chosen, "info", None), "kind", type(chosen).__name__)
        raise InvalidArgument(f"method {method!r} is {kind}, not one for a training loop")
    if type(optimizer).__name__ in _WRAPPING:
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InvalidArgument(
            "FullyShardedDataParallel keeps flattened copies of the weights, in which masks cannot "
            "be enforced; shard the model with torch.distributed.fsdp.fully_shard"
        )
    if type(optimizer).__name__ in _FLATTENING:
        raise InvalidArgument(
            f"{type(optimizer).__name__} keeps flattened copies of the weights, in which masks "
            "cannot be enforced; use an optimizer that steps the parameters themselves"
        )
    if chosen.starts_from_record:
        record = with_torch_masks(unwrapped(model), masks(unwrapped(model)))
        if record is None or not len(record):
            raise ModelError(
                f"method {chosen.info.name!r} needs a model with masks: prune or load one first"
            )
        views = recorded_views(model, record, plain_name)
        absent = set(record) - {plain_name(n) for n, *_ in parameters_of(model)}
        if absent:
            raise ModelError(f"the mask record names {min(absent)!r}, which the model has not")
        found = find_prunable(model, torch_masked=True, required=False)
        dense = found.reasons() | {v.name: "it has no mask" for v in found}
    else:
        found = find_prunable(model, include, exclude, embeddings=chosen.embeddings)
        views = [v for v in found if chosen.takes(v)]
        taken = f"method {chosen.info.name!r} does not take it"
        dense = found.reasons() | {v.name: taken for v in found if not chosen.takes(v)}
        if not views:
            raise ModelError(f"method {chosen.info.name!r} takes none of the tensors given")
        if sparsity is None:
            raise InvalidArgument(f"method {chosen.info.name!r} needs `sparsity`")
        check_sparsity(sparsity)
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lacking = [v.name for v in views if v.parameter.requires_grad and id(v.parameter) not in held]
    if lacking:
        raise InvalidArgument(
            f"the optimizer does not hold {lacking[0]!r}; build it from this model's parameters, "
            "or exclude the tensor"
        )
    plain = [replace(v, name=plain_name(v.name)) for v in views]
    run = Run(
        model,
        optimizer,
        chosen,
        plain,
        sparsity=sparsity,
        steps=steps,
        pattern=legal,
        budget=chosen.budget if budget is None else budget,
        seed=seed,
    )
    run.skipped = {p: why for n, why in dense.items() if (p := plain_name(n)) not in run.masks}
    run.start()
    return run
