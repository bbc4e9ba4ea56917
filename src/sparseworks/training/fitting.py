"""One plain training loop for image classifiers, for claims and the command line.

SGD with Nesterov momentum and a learning rate schedule; nothing in it knows of sparsity, which
comes in through the hooks of `sparsify`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.images import ImageSet
from sparseworks.training.distilling import distillation
from sparseworks.training.hooked import Run
from sparseworks.training.stepping import train_epochs

__all__ = ["Recipe", "fit_classifier"]

Start = Callable[[nn.Module, torch.optim.Optimizer, int], Run | None]


def _step_factor(t: float) -> float:
    return 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01


def _linear_factor(t: float, rise: float = 0.1) -> float:
    return 0.5 - 0.5 * math.cos(math.pi * t / rise) if t < rise else (1 - t) / (1 - rise)


_FACTORS = {"step": _step_factor, "linear": _linear_factor}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Args:
        epochs: passes over the images.
        batch_size: images a step; the last short batch of an epoch is left out.
        lr: peak of the schedule.
        momentum: Nesterov.
        weight_decay: on all parameters.
        augment: random crops and flips.
        label_smoothing: of the cross-entropy.
        schedule: "one-cycle"; "step", which starts at the peak and drops to a tenth at 1/2 and at
            3/4 of the training; or "linear", a half-cosine rise over a tenth of the training and
            then a straight line to 0, for retraining (Zimmer et al. 2023, How I Learned to Stop
            Worrying and Love Retraining).
        temperature: of the distillation, where there is a teacher.
        distill: share of the distillation in the loss, the cross-entropy has the rest.
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True
    label_smoothing: float = 0.0
    schedule: Literal["one-cycle", "step", "linear"] = "one-cycle"
    temperature: float = 4.0
    distill: float = 0.9

    def __post_init__(self) -> None:
        if self.schedule not in ("one-cycle", *_FACTORS):
            raise InvalidArgument(f"schedule={self.schedule!r}: 'one-cycle', 'step' or 'linear'")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InvalidArgument(
                f"epochs={self.epochs}, batch_size={self.batch_size} and lr={self.lr} "
                "must be positive"
            )
        if not self.temperature > 0 or not 0 <= self.distill <= 1:
            raise InvalidArgument(
                f"temperature={self.temperature} must be positive, distill={self.distill} in [0, 1]"
            )


def fit_classifier(
    model: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    *,
    start: Start | None = None,
    seed: int = 0,
    first_step: int = 0,
    teacher: nn.Module | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    on_epoch: Callable[[int, float, Run | None], Any] | None = None,
) -> Run | None:
    """Train a classifier in place.

    Args:
        model: logits `[batch, classes]` from images.
        images: the training set.
        recipe: how.
        start: called with (model, optimizer, steps) before the first step; returns the sparse run.
        seed: of the order and augmentation.
        first_step: where the schedule, the order and the augmentation go on, with a fresh
            optimizer: the steps before it are not taken.
        teacher: a trained model whose outputs are learnt too; left as it is.
        progress: called with (step, steps, what).
        on_epoch: called with (epoch, mean loss, run).

    Returns:
        The finished run, or None for dense training.

    Raises:
        DataError: fewer images than one batch, or the loss is not finite.
        InvalidArgument: `first_step` is not a step of the training.
    """
    steps = recipe.epochs * (len(images) // recipe.batch_size)
    if steps == 0:
        raise DataError(f"{len(images)} images are fewer than one batch of {recipe.batch_size}")
    if not 0 <= first_step < steps:
        raise InvalidArgument(f"first_step={first_step} is not in [0, {steps})")
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    schedule = _schedule(optimizer, recipe, steps, first_step)
    run = start(model, optimizer, steps) if start is not None else None
    generator = torch.Generator().manual_seed(seed)
    per_epoch = steps // recipe.epochs

    def after(step: int, mean: float) -> None:
        schedule.step()
        if progress is not None:
            progress(step, steps, f"epoch {(step - 1) // per_epoch + 1} loss {mean:.3f}")

    train_epochs(
        model,
        lambda _: images.epoch(recipe.batch_size, generator, training=recipe.augment),
        lambda batch, _: _loss(model, batch, recipe, teacher),
        [optimizer],
        epochs=recipe.epochs,
        steps=steps,
        first_step=first_step,
        after_step=after,
        on_epoch=None if on_epoch is None else lambda epoch, mean: on_epoch(epoch, mean, run),
    )
    if run is not None:
        run.finish()
    model.eval()
    return run


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, first_step: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate as it is at `first_step`."""
    made: torch.optim.lr_scheduler.LRScheduler
    if recipe.schedule == "one-cycle":
        made = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=recipe.lr, total_steps=steps, cycle_momentum=False
        )
    else:
        factor = _FACTORS[recipe.schedule]
        made = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it expects optimizer steps in between
        for _ in range(first_step):
            made.step()
    return made


def _loss(
    model: nn.Module, batch: tuple[Tensor, Tensor], recipe: Recipe, teacher: nn.Module | None
) -> Tensor:
    x, y = batch
    logits = model(x)
    loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
    if teacher is not None:
        with torch.no_grad():
            guide = teacher(x)
        soft = distillation(logits, guide, recipe.temperature)
        loss = (1 - recipe.distill) * loss + recipe.distill * soft
    return loss
