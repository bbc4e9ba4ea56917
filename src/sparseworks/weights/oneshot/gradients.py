"""Gradients of a loss over batches, for the methods that need the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError
from sparseworks.models.calls import Batch, Loss, default_loss, move
from sparseworks.models.modes import evaluating
from sparseworks.models.views import View

__all__ = ["checked_loss", "gradients_enabled", "mean_gradients"]


@contextmanager
def gradients_enabled(model: nn.Module, views: Sequence[View]) -> Iterator[list[nn.Parameter]]:
    """Evaluation mode in which only the weights of the views ask for gradients."""
    asked = {p: p.requires_grad for p in model.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    weights = [v.parameter for v in views]
    for parameter in weights:
        parameter.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            yield weights
    finally:
        for parameter, value in asked.items():
            parameter.requires_grad_(value)


def checked_loss(model: nn.Module, batch: Batch, loss: Loss | None) -> Tensor:
    """The loss of one batch.

    Raises:
        DataError: the loss is not a finite scalar.
    """
    device = next(model.parameters()).device
    value = (loss or default_loss)(model, move(batch, device))
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError("the loss must be a scalar tensor: loss(model, batch) -> Tensor")
    if not bool(torch.isfinite(value.detach())):
        raise DataError(f"the loss is {float(value.detach())} on the calibration data")
    return value


def mean_gradients(
    model: nn.Module, views: Sequence[View], batches: Sequence[Batch], loss: Loss | None
) -> dict[str, Tensor]:
    """Mean over batches of the gradient of every view's weight, in fp32, zero where unused."""
    with gradients_enabled(model, views) as weights:
        sums = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
        for batch in batches:
            value = checked_loss(model, batch, loss)
            found = torch.autograd.grad(value, weights, allow_unused=True)
            for total, gradient in zip(sums, found):
                if gradient is not None:
                    total.add_(gradient.float(), alpha=1.0 / len(batches))
    return {v.name: s for v, s in zip(views, sums)}
