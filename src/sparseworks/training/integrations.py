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
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparseworks.core.errors import CheckpointError, InvalidArgument, MissingDependency
from sparseworks.training.checkpointing import load_state, save_state
from sparseworks.training.hooked import Hooked
from sparseworks.training.logs import Log, join_log
from sparseworks.training.planning import Sparse
from sparseworks.training.sparsify import sparsify
from sparseworks.training.watching import Changes

__all__ = ["lightning_callback", "trainer_callback"]

_FILE = "sparseworks.safetensors"


class Follower:
    """A sparse run beside someone else's trainer.

    Attributes:
        run: once the training has begun.
        changes: its sparsity and flips, for the trainer's logs.
    """

    def __init__(self) -> None:
        self.run: Any = None
        self.changes: Changes | None = None

    def begin(self, model: nn.Module, optimizer: Any, total: int) -> None:
        """Start, or follow the optimizer, for a training of `total` optimizer steps."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with the masks of a checkpoint."""
        self.run.load_state_dict(state)
        self.changes = Changes(self.run)  # they count from there

    def finish(self) -> None:
        """End the run; it warns of a training that stopped too early."""
        if self.run is not None and not self.run.finished:
            self.run.finish()


class Sparsifier(Follower):
    """Of a hooked method, which starts when there is an optimizer."""

    def __init__(self, sparse: Sparse, steps: int | None = None) -> None:
        super().__init__()
        self.sparse = sparse
        if not isinstance(sparse.chosen, Hooked):
            raise InvalidArgument(
                f"method {sparse.method!r} changes the model before its optimizer exists: call "
                "`sw.sparsify_trainer` on a transformers Trainer, or `sw.transform` on the model "
                "in a loop of your own"
            )
        self.steps = steps

    def begin(self, model: nn.Module, optimizer: Any, total: int) -> None:
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
        self.changes = Changes(self.run)


def trainer_callback(
    method: Any, *, sparsity: float | None = None, steps: int | None = None, **settings: Any
) -> Any:
    """A callback for `transformers.Trainer` that makes its training sparse.

    The state of the run lies in every checkpoint folder, so `resume_from_checkpoint` goes on with
    the same masks and `load_best_model_at_end` gets those of the best one. Sparsity and flips
    (since the log before) are in the trainer's logs, and in the TensorBoard events, W&B and MLflow
    runs that its `report_to` names.

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
    return sparse_trainer_callback(Sparsifier(Sparse(method, sparsity, settings), steps))


def sparse_trainer_callback(follower: Follower) -> Any:
    """The callback for `transformers.Trainer` that takes a run along."""
    return _trainer_class()(follower)


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
            self.log: Log | None = None

        @property
        def run(self) -> Any:
            return self.sparsifier.run

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.sparsifier.begin(given["model"], given["optimizer"], state.max_steps)
            self.log = None
            if state.global_step:
                # the trainer does not say which folder it resumes from, only at which step
                self._restore(_resumed_folder(args, state))

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.run is not None and state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                if folder.is_dir():
                    save_state(folder / _FILE, self.run.state_dict())

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            changes = self.sparsifier.changes
            if changes is None or logs is None:
                return
            figures = changes.look()
            logs.update(figures)
            if state.log_history and state.log_history[-1]["step"] == state.global_step:
                state.log_history[-1].update(figures)
            if state.is_world_process_zero:
                # the trainer's own reporters come first in its list: they have been called already
                if self.log is None:
                    self.log = join_log(args.report_to, _events(args), "train/global_step")
                told = {f"train/{name}": value for name, value in figures.items()}
                self.log.write(state.global_step, told)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            best = state.best_model_checkpoint
            if args.load_best_model_at_end and best and self.run is not None:
                self._restore(Path(best))
            if self.log is not None:
                self.log.close()
            self.sparsifier.finish()

        def _restore(self, folder: Path) -> None:
            if not (folder / _FILE).is_file():
                raise CheckpointError(
                    f"{folder}: holds no {_FILE}; it was not saved by a training with this callback"
                )
            self.sparsifier.restore(load_state(folder / _FILE))

    return SparseTrainerCallback


def _resumed_folder(args: Any, state: Any) -> Path:
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _events(args: Any) -> Path | None:
    """Where the trainer writes TensorBoard's events: the newest folder where it does not say."""
    said = os.environ.get("TENSORBOARD_LOGGING_DIR") or getattr(args, "logging_dir", None)
    if said:
        return Path(said).expanduser()
    made = [p for p in (Path(args.output_dir) / "runs").glob("*") if p.is_dir()]
    return max(made, key=lambda p: p.stat().st_mtime, default=None)


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
    on with the same masks. Sparsity and flips are logged every `log_every_n_steps` to whichever
    logger the trainer has.

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
    sparsifier = Sparsifier(Sparse(method, sparsity, settings), steps)
    numbers = (optimizer,) if isinstance(optimizer, int) else tuple(optimizer)
    return _lightning_class()(sparsifier, numbers)


def _lightning_base() -> Any:
    """Callback of whichever of Lightning's two packages is there; they are one class twice."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise MissingDependency("the Lightning callback needs lightning: pip install lightning")


@functools.cache
def _lightning_class() -> Any:
    base: Any = _lightning_base()

    class SparseLightningCallback(base):  # type: ignore[misc]
        def __init__(self, sparsifier: Sparsifier, numbers: tuple[int, ...]) -> None:
            self.sparsifier, self.numbers = sparsifier, numbers
            self._saved: dict[str, Any] | None = None
            self._looked, self._figures = -1, dict[str, float]()

        @property
        def run(self) -> Any:
            return self.sparsifier.run

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            # Lightning loads a callback's state before there is an optimizer to hook
            total = int(trainer.estimated_stepping_batches)
            chosen = [trainer.optimizers[i] for i in self.numbers]
            self.sparsifier.begin(pl_module, chosen, total)
            if self._saved is not None:
                self.sparsifier.restore(self._saved)
                self._saved = None
            self._looked, self._figures = -1, {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            changes, look = (
                self.sparsifier.changes,
                trainer.global_step // trainer.log_every_n_steps,
            )
            if changes is not None and trainer.loggers and look != self._looked:
                self._looked, self._figures = look, changes.look()
            if self._figures:  # Lightning decides which of them it writes
                pl_module.log_dict(self._figures, on_step=True, on_epoch=False)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.sparsifier.finish()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.run is None else self.run.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._saved = state_dict or None

    return SparseLightningCallback
