"""Masks while a model trains: the moves that the dynamic methods are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparseworks.core.budgets import get_budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.random import generator_for
from sparseworks.core.selection import keep_top
from sparseworks.training.hooked import Run
from sparseworks.training.sharding import is_sharded, whole
from sparseworks.training.transforming import Transformed

__all__ = [
    "check_fraction",
    "chosen_masks",
    "drop_and_grow",
    "magnitudes",
    "random_masks",
    "select_masks",
    "span",
    "summed_over_ranks",
]


def check_fraction(method: str, **values: float) -> None:
    """Options that are fractions in [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise InvalidArgument(f"{method}: {name}={value} must be in [0, 1]")


def span(run: Run | Transformed, begin: float, end: float) -> tuple[int, int]:
    """First and last step of a schedule, from fractions of the training.

    Raises:
        InvalidArgument: the run was not told its number of steps.
    """
    if run.steps is None or run.steps < 1:
        raise InvalidArgument(
            f"method {run.method.info.name!r} follows a schedule: give `steps`, the number of "
            "optimizer steps of the whole training"
        )
    return round(begin * run.steps), round(end * run.steps)


def magnitudes(run: Run | Transformed) -> dict[str, Tensor]:
    """|w| as matrices, -inf where masked."""
    found = {}
    for name, view in run.views.items():
        weight = view.matrix(whole(run.parameters[name].detach())).float().abs()
        found[name] = weight.masked_fill(~view.matrix(run.masks[name]), -torch.inf)
    return found


def chosen_masks(
    run: Run | Transformed, scores: Mapping[str, Tensor], sparsity: float
) -> Iterator[tuple[str, Tensor]]:
    """Masks of exactly this sparsity, by the run's pattern and budget, from matrix scores."""
    specs = [v.spec(run.pattern) for v in run.views.values()]
    keep = get_budget(run.budget)(specs, sparsity, scores)
    for name, view in run.views.items():
        yield name, view.select(run.pattern, scores[name], keep[name])


def select_masks(run: Run | Transformed, scores: Mapping[str, Tensor], sparsity: float) -> None:
    """Make `chosen_masks` the masks of the run."""
    for name, mask in chosen_masks(run, scores, sparsity):
        run.set_mask(name, mask)


def random_masks(run: Run | Transformed, sparsity: float) -> None:
    """Random masks with the numbers that the run's budget gives each tensor."""
    scores = {}
    for name, view in run.views.items():
        uniform = torch.rand(view.shape, generator=generator_for(run.seed, name))
        scores[name] = uniform.to(run.masks[name].device)
    select_masks(run, scores, sparsity)


def drop_and_grow(run: Run, name: str, count: int, grow: Tensor) -> None:
    """Drop the `count` smallest active weights, then grow as many where `grow` is largest.

    What was dropped may grow again and then keeps its value and optimizer state; other grown
    weights start at 0 with fresh state.

    Args:
        grow: scores of the parameter's shape.
    """
    mask = run.masks[name]
    active = mask.reshape(-1).nonzero().squeeze(1)  # few: only these are sorted to drop
    count = min(count, len(active), mask.numel() - len(active))
    if count <= 0:
        return
    weights = whole(run.parameters[name].detach()).reshape(-1)[active].float().abs()
    staying = active[keep_top(weights, len(active) - count, name)]
    scores = grow.reshape(-1).to(torch.float32, copy=True)
    scores[staying] = -torch.inf
    changed = keep_top(scores, count, name)
    changed[staying] = True
    run.set_mask(name, changed.view(mask.shape))


def summed_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over processes, so that every rank chooses the same masks.

    A sharded gradient has been summed already and is gathered.
    """
    import torch.distributed as dist

    if is_sharded(tensor):
        return whole(tensor)

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
