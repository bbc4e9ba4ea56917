"""Ever smaller masks: what iterative pruning keeps of what is left."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparseworks.core.budgets import get_budget
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.schedules import exponential_rounds
from sparseworks.training.experiment import Experiment

__all__ = ["levels", "pruned"]


def levels(method: str, sparsity: float | None, rounds: int | None, share: float) -> list[float]:
    """Sparsities after each round, every round dropping the same share of what is left.

    Args:
        method: name, for messages.
        sparsity: S, after the last round.
        rounds: how many; None: as few as drop at most `share` a round.
        share: of the rest, in (0, 1).

    Returns:
        1 - (1 - S)^(r / R) for r = 1..R, with R = ceil(log(1 - S) / log(1 - share)).

    Raises:
        InvalidArgument: no sparsity, or one that is not positive.
    """
    if sparsity is None or sparsity <= 0:
        raise InvalidArgument(f"method {method!r} needs `sparsity` in (0, 1), not {sparsity}")
    if rounds is None:
        exact = math.log(1 - sparsity) / math.log(1 - share)
        rounds = max(1, math.ceil(exact - 1e-9))
    return exponential_rounds(rounds, sparsity)


@torch.no_grad()
def pruned(
    experiment: Experiment, model: nn.Module, sparsity: float, before: Masks | None
) -> Masks:
    """Masks of exactly this sparsity that keep the largest |w| among those kept before.

    Pattern and budget are the experiment's. A mask is a subset of the one before it, bit for bit;
    masks of tensors that are not chosen stay as they are.
    """
    views = {v.name: v for v in experiment.views(model)}
    scores = {}
    for name, view in views.items():
        score = view.matrix().float().abs()
        if before is not None and name in before:
            kept = view.matrix(before[name]).to(score.device)
            score = score.masked_fill(~kept, -torch.inf)
        scores[name] = score
    specs = [v.spec(experiment.pattern) for v in views.values()]
    keep = get_budget(experiment.budget)(specs, sparsity, scores)
    found = {
        name: view.select(experiment.pattern, scores[name], keep[name])
        for name, view in views.items()
    }
    made = Masks.of(found, experiment.method.info.name, str(experiment.pattern))
    return made if before is None else before.merged(made)
