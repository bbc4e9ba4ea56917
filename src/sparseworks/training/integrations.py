"""Sparse training inside other people's trainers: Hugging Face Trainer, Lightning, Accelerate.

    Trainer(..., callbacks=[sw.trainer_callback("rigl", sparsity=0.9)])
    lightning.Trainer(..., callbacks=[sw.lightning_callback("gradual", sparsity=0.8)])

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = sw.sparsify(model, optimizer, "rigl", sparsity=0.9, steps=N)
    accelerator.register_for_checkpointing(run)

The callbacks start the run when the trainer has its optimizer, keep the run's state in the
trainer's own checkpoints, resume from it, and finish the run when the training ends.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument, MissingDependency
from sparseworks.training.checkpointing import load_state, save_state
from sparseworks.training.hooked import Hooked, Run
from sparseworks.training.planning import Sparse
from sparseworks.training.sparsify import sparsify

__all__ = ["lightning_callback", "trainer_callback"]

_FILE = "sparseworks.safetensors"


class Sparsifier:
    """What every callback does, whatever its trainer calls it.

    Attributes:
        run: the sparse run, once the training has begun.
    """

    def __init__(
        self, method: Any, sparsity: float | None, steps: int | None, settings: dict[str, Any]
    ) -> None:
        self.sparse = Sparse(method, sparsity, settings)
        if not isinstance(self.sparse.chosen, Hooked):
            raise InvalidArgument(
                f"method {method!r} changes the model before its optimizer exists: call "
                "`sw.transform` on the model first, and give that to the trainer"
            )
        self.steps = steps
        self.run: Run | None = None

    def begin(self, model: nn.Module, optimizer: Any, total: int) -> Run:
        """Start the run for a training of `total` optimizer steps."""
        if self.run is not None:
            self.run.remove()  # of a training that failed: it must not go on beside this one
        steps = self.steps or total
        if steps > total:
            raise InvalidArgument(
                f"the sparsity schedule ends at step {steps}, after the training ({total} steps); "
                "leave `steps` out or train longer"
            )
        self.sparse.check_steps(total)
        self.run = sparsify(
            model,
            optimizer,
            self.sparse.method,
            sparsity=self.sparse.sparsity,
            steps=steps,
            **self.sparse.settings,
        )
        return self.run

    def finish(self) -> None:
        """End the run; it warns of a training that stopped too early."""
        if self.run is not None and not self.run.finished:
            self.run.finish()


def trainer_callback(
    method: Any, *, sparsity: float | None = None, steps: int | None = None, **settings: Any
) -> Any:
    """A callback for `transformers.Trainer` that makes its training sparse.

    The state of the run lies in every checkpoint folder, so `resume_from_checkpoint` goes on with
    the same masks and `load_best_model_at_end` gets those of the best one. The current sparsity is
    in the logs.

    Args:
        method: a hooked method, as `sparsify` takes it.
        sparsity: final fraction of zeros.
        steps: optimizer steps of the schedule; None: of the whole training.
        settings: the other arguments of `sparsify`.

    Raises:
        InvalidArgument: an unknown or unsuitable method, or (when the training begins) a schedule
            that ends after it.
        MissingDependency: transformers is not installed.
    """
    return sparse_trainer_callback(Sparsifier(method, sparsity, steps, settings))


def sparse_trainer_callback(sparsifier: Any) -> Any:
    """The callback that takes a `Sparsifier`, or what begins and finishes as it does, along."""
    return _trainer_class()(sparsifier)


@functools.cache
def _trainer_class() -> Any:
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise MissingDependency(
            "the Trainer callback needs transformers: pip install 'sparseworks[hf]'"
        ) from None

    class SparseTrainerCallback(TrainerCallback):
        def __init__(self, sparsifier: Sparsifier) -> None:
            self.sparsifier = sparsifier

        @property
        def run(self) -> Run | None:
            return self.sparsifier.run

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            run = self.sparsifier.begin(given["model"], given["optimizer"], state.max_steps)
            if state.global_step:
                # the trainer does not say which folder it resumes from, only at which step
                self._restore(run, _resumed_folder(args, state))

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.run is not None and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                if folder.is_dir():
                    save_state(folder / _FILE, self.run.state_dict())

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            if self.run is not None and logs is not None:
                logs["sparsity"] = self.run.current_sparsity

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            best = state.best_model_checkpoint
            if args.load_best_model_at_end and best and self.run is not None:
                self._restore(self.run, Path(best))
            self.sparsifier.finish()

        def _restore(self, run: Run, folder: Path) -> None:
            if not (folder / _FILE).is_file():
                raise CheckpointError(
                    f"{folder}: holds no {_FILE}; it was not saved by a training with this callback"
                )
            run.load_state_dict(load_state(folder / _FILE))

    return SparseTrainerCallback


def _resumed_folder(args: Any, state: Any) -> Path:
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def lightning_callback(
    method: Any,
    *,
    sparsity: float | None = None,
    steps: int | None = None,
    optimizer: int | Sequence[int] = 0,
    **settings: Any,
) -> Any:
    """A callback for Lightning's Trainer that makes its training sparse.

    The state of the run is part of Lightning's checkpoints; `trainer.fit(..., ckpt_path=...)` goes
    on with the same masks.

    Args:
        method: a hooked method, as `sparsify` takes it.
        sparsity: final fraction of zeros.
        steps: optimizer steps of the schedule; None: `trainer.estimated_stepping_batches`.
        optimizer: which of the trainer's optimizers, by number; several where more than one
            trains the masked weights.
        settings: the other arguments of `sparsify`.

    Raises:
        InvalidArgument: an unknown or unsuitable method, or (when the training begins) a schedule
            that ends after it.
        MissingDependency: Lightning is not installed.
    """
    sparsifier = Sparsifier(method, sparsity, steps, settings)
    numbers = (optimizer,) if isinstance(optimizer, int) else tuple(optimizer)
    return _lightning_class()(sparsifier, numbers)


@functools.cache
def _lightning_class() -> Any:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            raise MissingDependency(
                "the Lightning callback needs lightning: pip install lightning"
            ) from None

    class SparseLightningCallback(Callback):  # type: ignore[misc]
        def __init__(self, sparsifier: Sparsifier, numbers: tuple[int, ...]) -> None:
            self.sparsifier, self.numbers = sparsifier, numbers
            self._saved: dict[str, Any] | None = None

        @property
        def run(self) -> Run | None:
            return self.sparsifier.run

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # Lightning loads a callback's state before there is an optimizer to hook
            total = int(trainer.estimated_stepping_batches)
            chosen = [trainer.optimizers[i] for i in self.numbers]
            run = self.sparsifier.begin(pl_module, chosen, total)
            if self._saved is not None:
                run.load_state_dict(self._saved)
                self._saved = None

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.sparsifier.finish()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.run is None else self.run.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict or None

    return SparseLightningCallback
