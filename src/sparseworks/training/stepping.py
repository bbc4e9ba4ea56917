"""The plain training loop: batch, loss, backward, step. What differs is given as functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseworks.core.errors import DataError
from sparseworks.models.calls import move

__all__ = ["train_epochs"]


def train_epochs(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any, int], Tensor],
    optimizers: Sequence[Optimizer],
    *,
    epochs: int,
    steps: int,
    first_step: int = 0,
    before_step: Callable[[], Any] | None = None,
    after_step: Callable[[int, float], Any] | None = None,
    on_epoch: Callable[[int, float], Any] | None = None,
) -> list[float]:
    """Train in place, in training mode.

    Args:
        model: to train; it stays in training mode.
        batches: epoch number -> batches; they are moved to where the model is.
        loss: (batch, steps taken before) -> scalar.
        optimizers: all of them step after every batch.
        epochs: passes.
        steps: of the whole training; what the epochs hold beyond them is left out.
        first_step: batches before this one are drawn, so that the order goes on as it would, and
            not trained on.
        before_step: called after backward, before the optimizers step.
        after_step: called with the steps taken and the mean loss of this epoch so far.
        on_epoch: called with the epoch and its mean loss.

    Returns:
        The loss of every step.

    Raises:
        DataError: the loss is not finite.
    """
    device = next(model.parameters()).device
    step = 0
    losses: list[float] = []
    model.train()
    for epoch in range(epochs):
        begun = len(losses)
        for batch in batches(epoch):
            if step >= steps:
                break
            if step < first_step:
                step += 1
                continue
            value = loss(move(batch, device), step)
            losses.append(float(value.detach()))
            if not math.isfinite(losses[-1]):
                raise DataError(
                    f"the training loss is {losses[-1]} at step {step} (epoch {epoch + 1}); "
                    "lower the learning rate (lr=)"
                )
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(value)
            if before_step is not None:
                before_step()
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step, _mean(losses[begun:]))
        if len(losses) > begun and on_epoch is not None:
            on_epoch(epoch, _mean(losses[begun:]))
    return losses


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
