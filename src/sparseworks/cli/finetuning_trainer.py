"""The trainer of `sparseworks finetune`: transformers' own, watched for the page and the states."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from sparseworks.cli.trained import say_epoch
from sparseworks.core.errors import DataError, InvalidArgument

PRUNED = "pruned.safetensors"
"""What a one-shot method left, for a training that is resumed."""
_WATCHED = "watched.safetensors"


class Finetuning:
    """A trainer with its sparse run, as what draws and saves a training takes it.

    Attributes:
        steps: optimizer steps of the whole training.
        history: a row of numbers per epoch.
        trace: about a hundred looks at the masks and the loss.
    """

    def __init__(
        self, trainer: Any, run_of: Any, metric: Any, *, pruned: bool, quiet: bool
    ) -> None:
        self.trainer, self._run_of, self.metric = trainer, run_of, metric
        self.model, self.pruned, self.quiet = trainer.model, pruned, quiet
        self.history: list[dict[str, float]] = []
        self.trace: Any = None
        self.steps = 0

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.trainer.state.global_step)

    @property
    def run(self) -> Any:
        """The sparse run, once the training has begun."""
        return None if self._run_of is None else self._run_of.run

    def fit(self, resumed: bool) -> None:
        """Train to the end; from the last state, where one is there and it is asked for."""
        from sparseworks.cli.running import progress_bar
        from sparseworks.io import save

        states = Path(self.trainer.args.output_dir)
        last = resumed and any(states.glob("checkpoint-*"))
        if self.pruned and not resumed and self.trainer.is_world_process_zero():
            states.mkdir()
            save(self.model, states / PRUNED)
        with progress_bar("fine-tuning", quiet=self.quiet) as progress:
            self.trainer.add_callback(_watching(self, progress))
            self.trainer.train(resume_from_checkpoint=True if last else None)
        if any(not math.isfinite(r["loss"]) for r in self.trace.rows):
            raise DataError("the training loss is not finite; lower the learning rate")


def make_trainer(
    options: Any, model: Any, train: Any, padding: int, states: Path, device: str
) -> Any:
    """The Trainer of transformers, with the options as its arguments."""
    import transformers

    from sparseworks.cli.values import parse_options
    from sparseworks.training.optimizing import registered

    own: Any = None
    if options.optimizer not in _optimizers() or options.optimizer_option:
        chosen = registered(options.optimizer, parse_options(options.optimizer_option))
        parameters = [p for p in model.parameters() if p.requires_grad]
        own = chosen.build(parameters, options.lr, options.weight_decay)
    per_step = options.batch_size * options.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    steps = options.steps or max(1, math.ceil(options.epochs * len(train) / per_step))
    every = max(1, steps // 100)
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(states), num_train_epochs=options.epochs, max_steps=options.steps or -1,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulate, learning_rate=options.lr,
            lr_scheduler_type=options.schedule, warmup_steps=math.ceil(options.warmup * steps),
            weight_decay=options.weight_decay, max_grad_norm=options.clip,
            bf16=options.amp == "bf16", fp16=options.amp == "fp16",
            gradient_checkpointing=options.checkpointing, seed=options.seed,
            save_strategy="steps" if options.save_every else "epoch",
            save_steps=options.save_every or 500, save_total_limit=1, logging_steps=every,
            logging_nan_inf_filter=False, report_to=list(options.log), disable_tqdm=True,
            use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
            remove_unused_columns=False,
            **({} if own is not None else {"optim": options.optimizer}),
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"the trainer does not take these options: {error}") from None
    trainer = transformers.Trainer(
        model, arguments, train_dataset=train, data_collator=Padded(padding),
        optimizers=(own, None),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _optimizers() -> tuple[str, ...]:
    """Those that transformers names."""
    from transformers.training_args import OptimizerNames

    return tuple(str(o.value) for o in OptimizerNames)


class Padded:
    """`padded` with the token to fill up with."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: Any) -> Any:
        from sparseworks.data.finetuning import padded

        return padded(rows, self.padding)


def _watching(training: Finetuning, progress: Any) -> Any:
    """The callback that keeps trace and history, also in the states, and shows how far it is."""
    from transformers import TrainerCallback

    from sparseworks.training.checkpointing import load_state, save_state
    from sparseworks.training.watching import Trace

    class Watching(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            training.steps = state.max_steps
            training.trace = Trace(training.run, int(args.logging_steps))
            self.began, self.losses = time.perf_counter(), []
            kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WATCHED
            if state.global_step and kept.is_file():
                saved = load_state(kept)
                training.trace.load_state_dict(saved["trace"])
                training.history, self.losses = saved["history"], saved["losses"]

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            progress(state.global_step, state.max_steps, f"epoch {state.epoch or 0:.2f}")

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            if logs and "loss" in logs:
                loss = torch.tensor(float(logs["loss"]), dtype=torch.float64)
                training.trace.look(state.global_step, loss)
                self.losses.append(float(loss))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            row: dict[str, float] = {"epoch": round(state.epoch or 0, 2), "step": state.global_step}
            row["loss"] = sum(self.losses) / len(self.losses) if self.losses else math.nan
            row["seconds"] = time.perf_counter() - self.began
            self.began, self.losses = time.perf_counter(), []
            if training.run is not None:
                row["sparsity"] = training.run.current_sparsity
            if training.metric is not None and state.is_world_process_zero:
                row[training.metric.name] = training.metric(training.model.eval())
            training.history.append(row)
            if not training.quiet and state.is_world_process_zero:
                say_epoch(row, state.num_train_epochs)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                watched = {"trace": training.trace.state_dict(), "history": training.history,
                           "losses": self.losses}  # fmt: skip
                save_state(folder / _WATCHED, watched)

    return Watching()
