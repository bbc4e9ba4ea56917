"""How far two trainings end from each other: the study part of late rewinding.

Over the n weights that a mask keeps (Frankle et al. 2019, Stabilizing the Lottery Ticket
Hypothesis):

    distance(a, b) = ||M (a - b)||_2 / sqrt(n)
    angle(a, b; o) = arccos(<M (a - o), M (b - o)> / (||M (a - o)|| ||M (b - o)||))   in degrees

and for whole networks (Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket
Hypothesis):

    barrier(a, b) = max over t in [0, 1] of err((1 - t) a + t b) - ((1 - t) err(a) + t err(b))

The distance is divided by sqrt(n), so that masks of different sizes compare.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.calls import Batch
from sparseworks.training.recalibration import reestimate

__all__ = ["angle", "barrier", "distance", "interpolated"]


def _survivors(model: nn.Module, kept: Mapping[str, Tensor]) -> Tensor:
    """The weights that are kept, one after the other, in fp64."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parts = [named[n].detach().cpu()[kept[n].cpu()].double() for n in kept]
    if not parts or not sum(p.numel() for p in parts):
        raise InvalidArgument("no weight is kept, so there is nothing to compare")
    return torch.cat(parts)


def distance(a: nn.Module, b: nn.Module, kept: Mapping[str, Tensor]) -> float:
    """Root mean square difference of the kept weights.

    Args:
        a: a model.
        b: another of the same shapes.
        kept: parameter name -> bool mask, True = kept (a mask record).
    """
    difference = _survivors(a, kept) - _survivors(b, kept)
    return float(difference.norm() / math.sqrt(difference.numel()))


def angle(a: nn.Module, b: nn.Module, origin: nn.Module, kept: Mapping[str, Tensor]) -> float:
    """Degrees between the ways that two models went from the origin; 0 where one did not move."""
    start = _survivors(origin, kept)
    one, two = _survivors(a, kept) - start, _survivors(b, kept) - start
    lengths = float(one.norm() * two.norm())
    if lengths == 0:
        return 0.0
    return math.degrees(math.acos(max(-1.0, min(1.0, float(one @ two) / lengths))))


@torch.no_grad()
def interpolated(
    a: nn.Module, b: nn.Module, t: float, data: Iterable[Batch] | None = None
) -> nn.Module:
    """A new model (1 - t) a + t b: every floating-point parameter and buffer.

    Args:
        a: the model at t = 0; the new one is a copy of it.
        b: the model at t = 1.
        t: where on the line.
        data: batches to estimate batch-norm statistics on anew; None: they are interpolated too.
    """
    made = copy.deepcopy(a)
    other = b.state_dict()
    for name, value in made.state_dict().items():
        if value.dtype.is_floating_point:
            value.lerp_(other[name].to(value.device), t)
    if data is not None:
        reestimate(made, data)
    return made


def barrier(
    a: nn.Module,
    b: nn.Module,
    error: Callable[[nn.Module], float],
    *,
    points: int = 11,
    data: Iterable[Batch] | None = None,
) -> float:
    """The highest rise of the error above the straight line between its ends.

    0 or below means that the two models are linearly connected.

    Args:
        a: a trained model.
        b: another.
        error: `(model) -> error`, lower is better.
        points: values of t, the ends among them, at least 3.
        data: see `interpolated`; an iterable that can be read again.
    """
    if points < 3:
        raise InvalidArgument(f"points={points}: at least 3 are needed")
    batches = None if data is None else list(data)
    line = [i / (points - 1) for i in range(points)]
    errors = [error(interpolated(a, b, t, batches)) for t in line]
    return max(e - ((1 - t) * errors[0] + t * errors[-1]) for t, e in zip(line, errors))
