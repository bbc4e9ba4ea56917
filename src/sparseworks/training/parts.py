"""A caller's training function as a part: begun late, ended early, with masks that hold.

Everything goes through the function's one duty, to call `start(model, optimizer, steps)` before its
first step: masks hook into the optimizer there, and so does the end of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import attach, masks
from sparseworks.training.hooked import Run
from sparseworks.training.sparsify import sparsify

__all__ = ["Fit", "train_part"]

Fit = Callable[..., Any]


class _Reached(BaseException):
    """Ends a training at a chosen step; not an Exception, so that loops let it pass."""


def train_part(
    fit: Fit,
    model: nn.Module,
    *,
    seed: int,
    first_step: int = 0,
    stop_at: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> int:
    """Train a model in place; its masks, where it has a record, hold at every step.

    torch's global generators are seeded for the training and left as they were.

    Args:
        fit: see `sparseworks.experiment`.
        model: to train; left in evaluation mode.
        seed: of the data order and of torch's generators.
        first_step: where schedule and data order go on.
        stop_at: end after this step, counted like `first_step`.
        options: further arguments of `fit`.

    Returns:
        The steps of a whole training, as `fit` said them.

    Raises:
        ModelError: `fit` never called `start`.
        InvalidArgument: the training ended before `stop_at`.
    """
    record = masks(model)
    steps: list[int] = []
    runs: list[Run] = []
    handles: list[Any] = []
    reached = first_step

    def begin(net: nn.Module, optimizer: Optimizer, count: int) -> Run | None:
        steps.append(count)
        if record is not None and len(record):
            runs.append(sparsify(net, optimizer, "fixed"))

        def after(*_: Any) -> None:
            nonlocal reached
            reached += 1
            if reached == stop_at:
                raise _Reached

        handles.append(optimizer.register_step_post_hook(after))
        return runs[0] if runs else None

    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            fit(model, start=begin, seed=seed, first_step=first_step, **(options or {}))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
            for run in runs:
                run.finish()
    if not steps:
        raise ModelError(
            "the training function never called `start(model, optimizer, steps)`; it must, "
            "after it made the optimizer and before the first step"
        )
    if stop_at is not None and reached != stop_at:
        raise InvalidArgument(f"the training ended at step {reached}, before step {stop_at}")
    attach(model, record)  # with the method and the patterns that chose it
    model.eval()
    model.zero_grad(set_to_none=True)
    return steps[0]
