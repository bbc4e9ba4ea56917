"""Masks that learn: small modules that `torch.nn.utils.parametrize` puts on a weight.

A transform registers one of them per tensor; the layer then computes with `part(weight)`, and the
part's parameters train with the rest of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument

__all__ = ["SoftMask", "StraightThroughMask", "straight_through"]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft` (Bengio et al. 2013, Estimating or
    Propagating Gradients Through Stochastic Neurons).

    Args:
        hard: any tensor, a bool mask say; nothing flows back into it.
        soft: finite, of the same shape; its gradient is the one that arrives, everywhere.
    """
    return hard.detach().to(soft.dtype) + (soft - soft.detach())


class StraightThroughMask(nn.Module):
    """z = w * m, with m a hard mask whose gradient goes to real scores.

    dL/dw = dL/dz * m and dL/dscores = dL/dz * w, masked positions included. The mask is a buffer:
    the method chooses it from the scores, this module does not.

    Args:
        scores: initial scores, of the weight's shape; cloned.
        mask: initial bool mask; None: all kept.
    """

    scores: nn.Parameter
    mask: Tensor

    def __init__(self, scores: Tensor, mask: Tensor | None = None) -> None:
        super().__init__()
        _check_finite(scores)
        first = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.clone()
        self.scores = nn.Parameter(scores.detach().clone())
        self.register_buffer("mask", first)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * straight_through(self.mask, self.scores).to(weight.dtype)


class SoftMask(nn.Module):
    """z = w * sigmoid(scores / temperature): a mask between 0 and 1 that hardens as it cools.

    Args:
        scores: initial logits, of the weight's shape; cloned.
        temperature: above 0; `cool` changes it.
    """

    scores: nn.Parameter
    temperature: Tensor

    def __init__(self, scores: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        _check_finite(scores)
        self.scores = nn.Parameter(scores.detach().clone())
        self.register_buffer("temperature", torch.ones((), device=scores.device))
        self.cool(temperature)

    def cool(self, temperature: float) -> None:
        """Set the temperature.

        Raises:
            InvalidArgument: not above 0.
        """
        if not temperature > 0:
            raise InvalidArgument(f"soft mask: temperature={temperature} must be above 0")
        self.temperature.fill_(temperature)

    def gate(self) -> Tensor:
        """sigmoid(scores / temperature), the soft mask itself."""
        return torch.sigmoid(self.scores / self.temperature)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gate().to(weight.dtype)


def _check_finite(scores: Tensor) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise InvalidArgument("mask scores must be finite; check the weights they come from")
