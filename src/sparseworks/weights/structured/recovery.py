"""Train a slimmed model on: SGD with a one-cycle rate, and the dense model as teacher.

loss = (1 - a) CE(z, y) + a T^2 KL(softmax(z_t / T) || softmax(z / T)), for logits z of the slimmed
and z_t of the dense model.

Source: Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.types import Progress
from sparseworks.models.calls import Batch, TaskLoss, call, logits_of, loss_of, split
from sparseworks.training.distilling import distillation
from sparseworks.training.recalibration import reestimate
from sparseworks.training.stepping import train_epochs

__all__ = ["Recovery", "TaskLoss", "distillation", "finetune", "one_cycle", "reestimate", "told"]

Penalty = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Recovery:
    """What fine-tuning did: steps, seconds, and the mean loss of the last twentieth."""

    steps: int
    seconds: float
    loss: float


def finetune(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    *,
    epochs: int,
    steps_per_epoch: int,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    weight: float = 0.9,
    bf16: bool = False,
    penalty: Penalty | None = None,
    after_step: Callable[[int], None] | None = None,
    loss: TaskLoss | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Fine-tune in place; the model is left in evaluation mode.

    Args:
        model: to train.
        batches: epoch number -> (inputs, target) batches of that epoch.
        epochs: passes.
        steps_per_epoch: batches of a pass, for the schedule.
        lr: peak of the one-cycle schedule (a tenth of the way up, then cosine to 0).
        momentum: of SGD with Nesterov.
        weight_decay: on parameters with two axes or more.
        teacher: the dense model, in evaluation mode, or None for cross-entropy alone.
        temperature: T of the distillation.
        weight: a, the share of the distillation.
        bf16: compute in bfloat16 (autocast), faster where the processor has it.
        penalty: called after backward, before the step; may add to gradients.
        after_step: called with the step number after each step.
        loss: `(model, batch, logits) -> scalar` instead of the loss above.
        progress: called with (done, total, what).

    Raises:
        InvalidArgument: no steps.
        DataError: the loss is not finite.
    """
    total = epochs * steps_per_epoch
    if total < 1:
        raise InvalidArgument("epochs and steps_per_epoch are at least 1")
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=lr, momentum=momentum, nesterov=momentum > 0,
    )  # fmt: skip
    device = next(model.parameters()).device
    start = time.perf_counter()

    def objective(batch: Batch, step: int) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr * one_cycle(step, total)
        inputs, _ = split(batch)
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = logits_of(call(model, inputs))
            guide = None
            if teacher is not None:
                with torch.no_grad():
                    guide = logits_of(call(teacher, inputs))
        value = (loss or loss_of)(model, batch, logits.float())
        if guide is None:
            return value
        return (1 - weight) * value + weight * distillation(logits, guide, temperature)

    losses = train_epochs(
        model,
        batches,
        objective,
        [optimizer],
        epochs=epochs,
        steps=total,
        before_step=None if penalty is None else lambda: penalty(model),
        after_step=None if after_step is None else lambda step, _: after_step(step),
        on_epoch=told(progress, epochs, "fine-tuning"),
    )
    model.eval()
    last = losses[int(0.95 * total) :]
    return Recovery(len(losses), time.perf_counter() - start, sum(last) / max(1, len(last)))


def told(progress: Progress | None, epochs: int, what: str) -> Callable[[int, float], None] | None:
    """`on_epoch` of a training that reports its epochs."""
    if progress is None:
        return None
    return lambda epoch, _: progress(epoch + 1, epochs, what)


def one_cycle(step: int, total: int, rise: float = 0.1) -> float:
    """Share of the peak rate: linear up over `rise`, then cosine down to 0."""
    turn = max(1, int(rise * total))
    if step < turn:
        return (step + 1) / turn
    return 0.5 * (1 + math.cos(math.pi * (step - turn) / max(1, total - turn)))
