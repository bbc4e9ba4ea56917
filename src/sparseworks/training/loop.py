"""One training loop that can stop at any step and go on bit for bit: classifiers and text models.

The order of the data and their augmentation are functions of (seed, epoch), so a state needs no
more than the step; what torch's own generators give (dropout) is part of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseworks.core.errors import CheckpointError, DataError, InvalidArgument
from sparseworks.data.epochs import Batches
from sparseworks.models.calls import Batch, Loss, default_loss, move, split
from sparseworks.training.checkpointing import random_state, restore_random
from sparseworks.training.hooked import Run
from sparseworks.training.optimizing import registered
from sparseworks.training.planning import HALVES, Plan, Sparse
from sparseworks.training.transforming import Transformed
from sparseworks.training.watching import Trace

__all__ = ["Training"]


class Training:
    """A model, its optimizer and its sparse run on the way through a plan.

    Args:
        model: what trains, on its device.
        plan: how.
        batches: on what.
        sparse: the method; None for dense training.
        loss: `(model, batch) -> scalar` in place of the cross-entropy, a `Distillation` say.
        compile: call the model through `torch.compile`.

    Attributes:
        step: optimizer steps taken.
        steps: of the whole training.
        run: the sparse run.
        history: a row of numbers per finished epoch.
        trace: about a hundred looks at the masks and the loss.

    Raises:
        DataError: too few data for one step.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        batches: Batches,
        *,
        sparse: Sparse | None = None,
        loss: Loss | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.plan, self.batches, self.guide = model, plan, batches, loss
        self.device = next(model.parameters()).device
        self.per_epoch = len(batches) // plan.accumulate
        self.steps = plan.epochs * self.per_epoch
        if self.steps == 0:
            raise DataError(
                f"the data give {len(batches)} batches of {plan.batch_size} an epoch, fewer than "
                f"the {plan.accumulate} of one step; give more data or a smaller batch_size"
            )
        if sparse is not None:
            sparse.check_steps(self.steps)
        torch.manual_seed(plan.seed)
        self.run: Run | Transformed | None = None
        if sparse is None:
            self.optimizer = _optimizer(plan, model.parameters())
        else:
            self.run, self.optimizer = sparse.begin(
                model, self.steps, lambda parameters: _optimizer(plan, parameters)
            )
        self.forward: Any = torch.compile(model) if compile else model
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=plan.lr,
            total_steps=self.steps,
            pct_start=plan.warmup,
            cycle_momentum=False,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.amp == "fp16")
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.trace = Trace(self.run, max(1, self.steps // 100))

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.per_epoch

    @property
    def loss(self) -> float:
        """Mean loss of this epoch so far."""
        return float(self._loss) / max(1, self.step - len(self.history) * self.per_epoch)

    def fit(
        self,
        *,
        on_step: Callable[[Training], Any] | None = None,
        on_epoch: Callable[[Training, dict[str, float]], Any] | None = None,
        until: int | None = None,
    ) -> None:
        """Train to the end, or to step `until`; the sparse run is not finished here.

        Args:
            on_step: called after every step.
            on_epoch: called after every epoch with its row of the history, and may add to it.

        Raises:
            DataError: the loss is not finite.
        """
        end = self.steps if until is None else min(until, self.steps)
        while self.step < end:
            self.forward.train()
            began, number = time.perf_counter(), self.epoch
            done = (self.step - number * self.per_epoch) * self.plan.accumulate
            batches = itertools.islice(self.batches.epoch(number), done, None)
            while self.step < min(end, (number + 1) * self.per_epoch):
                self._advance(itertools.islice(batches, self.plan.accumulate))
                if self.step % self.per_epoch == 0:
                    self._close_epoch(time.perf_counter() - began, on_epoch)
                if on_step is not None:
                    on_step(self)

    def _advance(self, batches: Iterator[Batch]) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        before = self._loss.clone()
        for batch in batches:
            with self._precision():
                loss = self._loss_of(move(batch, self.device)) / self.plan.accumulate
            self._loss += loss.detach()
            if isinstance(self.run, Transformed):
                loss = loss + self.run.penalty() / self.plan.accumulate
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.plan.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.step += 1
        self.trace.look(self.step, self._loss - before)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.plan.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, HALVES[self.plan.amp])

    def _loss_of(self, batch: Batch) -> Tensor:
        if self.guide is not None:
            return self.guide(self.forward, batch)
        inputs, target = split(batch)
        if isinstance(inputs, Tensor) and target is not None:
            logits = self.forward(inputs)
            return F.cross_entropy(logits, target, label_smoothing=self.plan.label_smoothing)
        return default_loss(self.forward, batch)

    def _close_epoch(self, seconds: float, on_epoch: Callable[..., Any] | None) -> None:
        mean = float(self._loss) / self.per_epoch
        if mean != mean or mean in (float("inf"), -float("inf")):
            raise DataError(
                f"the training loss is not finite in epoch {self.epoch}; lower the learning rate"
            )
        self._loss.zero_()
        row = {"epoch": self.epoch, "step": self.step, "loss": mean, "seconds": seconds}
        if self.run is not None:
            row["sparsity"] = self.run.current_sparsity
        self.history.append(row)
        if on_epoch is not None:
            on_epoch(self, row)

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs."""
        return {
            "step": self.step,
            "steps": self.steps,
            "history": [dict(row) for row in self.history],
            "loss": self._loss,
            "random": random_state(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "run": None if self.run is None else self.run.state_dict(),
            "trace": self.trace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, on a training built as that one was.

        Raises:
            CheckpointError: the state is of another model or of a training of another length.
            InvalidArgument: the state is of another method.
        """
        if state["steps"] != self.steps:
            raise CheckpointError(
                f"the checkpoint is of a training of {state['steps']} steps, this one has "
                f"{self.steps}: the data, epochs or batch size differ"
            )
        if (state["run"] is None) != (self.run is None):
            raise InvalidArgument("one of the checkpoint and this training is dense, the other not")
        _same_tensors(self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.run is not None:
            self.run.load_state_dict(state["run"])
        if "trace" in state:  # states of older versions have none
            self.trace.load_state_dict(state["trace"])
        self.step = state["step"]
        self.history = state["history"]
        self._loss.copy_(state["loss"])
        restore_random(state["random"])


def _optimizer(plan: Plan, parameters: Any) -> torch.optim.Optimizer:
    if plan.optimizer == "adamw":
        return torch.optim.AdamW(parameters, plan.lr, weight_decay=plan.weight_decay)
    if plan.optimizer != "sgd":
        chosen = registered(plan.optimizer, plan.optimizer_options)
        return chosen.build(parameters, plan.lr, plan.weight_decay)
    return torch.optim.SGD(
        parameters,
        plan.lr,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        nesterov=plan.momentum > 0,
    )


def _same_tensors(mine: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in mine.keys() | saved.keys():
        if name not in mine or name not in saved or mine[name].shape != saved[name].shape:
            raise CheckpointError(f"the checkpoint is of another model: {name!r} differs")
