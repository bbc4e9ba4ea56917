"""`sparseworks.transform`: change modules before the optimizer exists, train, change them back.

    job = sw.transform(model, "jackpots", sparsity=0.9, steps=N)
    optimizer = torch.optim.SGD(job.parameter_groups(), lr=0.1)
    job.attach(optimizer)
    ...                            # the usual loop, with loss + job.penalty()
    job.finish()                   # ordinary modules, zeros exact, the mask record on the model

What a method adds (scores, gates, wider layers) lives in the model, so the model's own
`state_dict` holds it; `job.state_dict()` holds the rest. To resume: transform a fresh model in the
same way, load the model, the optimizer and the job.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import Pattern, check_sparsity, parse_pattern, resolve_sparsity
from sparseworks.models.views import find_prunable
from sparseworks.training.transformed import Transform, Transformed

__all__ = ["Transform", "Transformed", "transform"]


def transform(
    model: nn.Module,
    method: str | Transform,
    *,
    sparsity: float | None = None,
    steps: int | None = None,
    pattern: str | Pattern | None = None,
    budget: Any = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Transformed:
    """Change a model so that training makes it sparse; build the optimizer afterwards.

    Args:
        model: changed in place; wrap it (DDP, torch.compile) afterwards.
        method: a registered method of kind "transform", or an object.
        sparsity: final fraction of zeros, for methods that take one; left out with N:M.
        steps: optimizer steps of the whole training, for methods with a schedule.
        pattern: legal zeros; None: the method's own.
        budget: who pays; None: the method's own.
        include: name patterns of the only weights to treat.
        exclude: name patterns of weights to leave dense.
        seed: of the job's private random numbers.
        options: fields of the method.

    Raises:
        InvalidArgument: an option that cannot be used; the model is as it was.
        ModelError: the model cannot be treated; it is as it was.
    """
    chosen: Transform = registry.build(method, ("transform",), **options)
    legal = parse_pattern(chosen.pattern if pattern is None else pattern)
    if chosen.needs_sparsity:
        sparsity = resolve_sparsity(legal, sparsity, f"method {chosen.info.name!r}")
    elif sparsity is not None:
        check_sparsity(sparsity)
    if steps is not None and steps < 1:
        raise InvalidArgument(f"steps={steps} must be at least 1")
    found = find_prunable(model, include, exclude)
    views = list(found)
    for view in views:
        legal.check(view.shape, view.run)
        if not bool(torch.isfinite(view.parameter).all()):
            raise ModelError(f"{view.name} holds NaN or Inf; repair the weights first")
    job = Transformed(
        model,
        chosen,
        views,
        sparsity=sparsity,
        steps=steps,
        pattern=legal,
        budget=chosen.budget if budget is None else budget,
        seed=seed,
    )
    job.skipped = found.reasons()
    try:
        chosen.begin(job)
    except BaseException:
        job.undo()
        raise
    return job
