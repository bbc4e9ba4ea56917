"""Any method of a training inside `transformers.Trainer` and what derives from it (TRL's, say).

    trainer = transformers.Trainer(model, args, train_dataset=...)
    sw.sparsify_trainer(trainer, "ast", pattern="2:4")
    trainer.train()                    # model: zeros exact, the mask record on it

What differs from `trainer_callback`: methods that change the model before its optimizer exists
(`transform`) work too, and a loss may take the place of the trainer's, a `Distillation` say.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.training.hooked import Hooked
from sparseworks.training.integrations import Follower, Sparsifier, sparse_trainer_callback
from sparseworks.training.optimizers import Optimizers
from sparseworks.training.planning import Sparse
from sparseworks.training.transformed import Transformed
from sparseworks.training.watching import Changes

__all__ = ["sparsify_trainer"]


def sparsify_trainer(
    trainer: Any,
    method: Any,
    *,
    sparsity: float | None = None,
    loss: Any = None,
    **settings: Any,
) -> Any:
    """Make a trainer train sparse; call its `train` afterwards.

    The state of the run lies in every checkpoint folder: build model and trainer as before, call
    this as before, and `resume_from_checkpoint` goes on bit for bit.

    Args:
        trainer: a `transformers.Trainer`, or of a class that derives from it, that has not trained.
        method: a method of kind "hooked" or "transform", as `sparsify` and `transform` take it;
            None for dense training (with a loss of your own).
        sparsity: final fraction of zeros; left out with N:M.
        loss: `(model, batch) -> scalar` of a micro-batch in training; evaluation keeps the
            trainer's own.
        settings: the other arguments of `sparsify` or `transform`, options of the method.

    Returns:
        The callback that was added, whose `run` is the sparse run; None without a method.

    Raises:
        InvalidArgument: a method or option that cannot be used; the model is as it was.
    """
    own: Follower | None = None
    if method is not None:
        sparse = Sparse(method, sparsity, settings)
        steps = _steps(trainer)
        sparse.check_steps(steps)
        if isinstance(sparse.chosen, Hooked):
            own = Sparsifier(sparse)
        else:
            if trainer.optimizer is not None:
                raise InvalidArgument(
                    f"method {sparse.chosen.info.name!r} adds parameters that the optimizer given "
                    "to the trainer does not hold: let the trainer make its own (`args.optim`)"
                )
            own = _Begun(sparse.transformed(trainer.model, steps))
            _without_decay(trainer, own.run)
    job = own.run if isinstance(own, _Begun) else None
    if loss is not None or job is not None:
        _with_loss(trainer, loss, job)
    if own is None:
        return None
    callback = sparse_trainer_callback(own)
    trainer.add_callback(callback)
    return callback


class _Begun(Follower):
    """A run of a transform, which began before there is an optimizer."""

    def __init__(self, run: Transformed) -> None:
        super().__init__()
        self.run, self.changes = run, Changes(run)

    def begin(self, model: nn.Module, optimizer: Any, total: int) -> None:
        """Follow the optimizer."""
        if self.run.optimizer is not None:
            raise InvalidArgument(
                f"method {self.run.method.info.name!r} goes through one `train` call; for another "
                "build the trainer anew and call `sparsify_trainer` on it"
            )
        [inside] = Optimizers(optimizer).all
        self.run.attach(inside)


def _steps(trainer: Any) -> int:
    """Optimizer steps that the trainer will take, by its own reckoning."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    with torch.random.fork_rng():  # the order of the data is as without this look
        loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[-1])


def _without_decay(trainer: Any, job: Transformed) -> None:
    """Weight decay leaves what the method added alone: it would shift the ranks of scores."""
    named = trainer.get_decay_parameter_names

    def get_decay_parameter_names(model: Any, *more: Any) -> list[str]:
        added = set(job.added)
        return [n for n in named(model, *more) if n not in added]

    trainer.get_decay_parameter_names = get_decay_parameter_names


def _with_loss(trainer: Any, loss: Any, job: Transformed | None) -> None:
    """The trainer's `compute_loss`, in training with the loss of the user and the penalty."""
    usual = trainer.compute_loss
    if loss is not None:
        trainer.model_accepts_loss_kwargs = False  # so the trainer takes the mean of micro-batches

    @functools.wraps(usual)
    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return usual(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if loss is not None and not return_outputs:
            found = loss(model, inputs)
            return found if job is None else found + job.penalty()
        found = usual(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if job is None:
            return found
        value, *rest = found if return_outputs else (found,)
        summed = trainer.compute_loss_func is not None or (
            trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        )  # over the whole step already, not a mean that the trainer will divide
        parts = trainer.current_gradient_accumulation_steps if summed else 1
        value = value + job.penalty() / parts
        return (value, *rest) if return_outputs else value

    trainer.compute_loss = compute_loss
