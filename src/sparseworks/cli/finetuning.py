"""What `sparseworks finetune` trains on what: options, model, examples, the trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from sparseworks.cli.trained import say_epoch
from sparseworks.core.errors import DataError, InvalidArgument, MissingDependency

_PRUNED = "pruned.safetensors"  # what a one-shot method left, for a training that is resumed
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
            save(self.model, states / _PRUNED)
        with progress_bar("fine-tuning", quiet=self.quiet) as progress:
            self.trainer.add_callback(_watching(self, progress))
            self.trainer.train(resume_from_checkpoint=True if last else None)
        if any(not math.isfinite(r["loss"]) for r in self.trace.rows):
            raise DataError("the training loss is not finite; lower the learning rate")


def prepare(options: Any, resumed: bool) -> Any:
    """Model, examples, method and trainer of the options; everything is checked."""
    from sparseworks.cli.loading import load_model
    from sparseworks.cli.preparing import check_inputs, parse_options
    from sparseworks.cli.training import Job, distillation_of
    from sparseworks.core import registry
    from sparseworks.data.finetuning import kind_of_source
    from sparseworks.io import load
    from sparseworks.training.planning import HALVES
    from sparseworks.training.runs import digest_of_model
    from sparseworks.training.trainers import sparsify_trainer

    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError:
        raise MissingDependency(
            "finetune needs transformers and accelerate: pip install 'sparseworks[finetune]'"
        ) from None
    check_inputs(options)
    if options.eval_samples is not None and options.eval_data is None:
        raise InvalidArgument("--eval-samples goes with --eval-data")
    if options.amp not in (None, *HALVES):
        raise InvalidArgument(f"--amp {options.amp}: use {' or '.join(HALVES)}")
    extra = parse_options(options.option)
    one_shot, method = False, None
    if options.method != "dense":
        method = registry.build(
            options.method, ("one-shot", "staged", "hooked", "transform"), **extra
        )
        one_shot = method.info.kind in ("one-shot", "staged")
    elif options.sparsity is not None:
        raise InvalidArgument("--method dense takes no --sparsity")
    kind = kind_of_source(options.data)
    transformers.set_seed(options.seed)
    loaded = _fitting(load_model(options.model, options.dtype), kind, options)
    if options.start is not None:
        load(options.start, loaded.model)
    train, held = (
        _examples(source, kind, loaded, options, count)
        for source, count in ((options.data, options.samples),
                              (options.eval_data, options.eval_samples))
    )  # fmt: skip
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loss = distillation_of(options, loaded, method, device)
    metric = _metric(held, kind, loaded, options)
    before = metric(loaded.model) if metric is not None else None
    start = digest_of_model(loaded.model)
    states = options.out / "states"
    if one_shot and resumed and (states / _PRUNED).is_file():
        load(states / _PRUNED, loaded.model)
    elif one_shot:
        _prune(options, extra, loaded, train)
    trainer = _trainer(options, loaded, train, states, device)
    common = {"include": options.include or None, "exclude": options.exclude or None}
    settings: dict[str, Any] = {"pattern": options.pattern, "budget": options.budget,
                                **common, **extra, "seed": options.seed}  # fmt: skip
    given: tuple[Any, Any, dict[str, Any]] = (options.method, options.sparsity, settings)
    if one_shot:
        given = ("fixed", None, {})
    elif method is None:
        given = (None, None, {})
    run_of = sparsify_trainer(trainer, given[0], sparsity=given[1], loss=loss, **given[2])
    training = Finetuning(trainer, run_of, metric, pruned=one_shot, quiet=options.json)
    return Job(training, loaded.tokenizer, metric, before, start)


def _fitting(loaded: Any, kind: str, options: Any) -> Any:
    """The model, if it is for data of this kind; an encoder gets a head for labels."""
    needed = {"text": "causal", "completions": "causal"}.get(kind, "classifier")
    name = type(loaded.model).__name__
    if kind == "labelled texts" and loaded.kind in ("encoder", "other") and loaded.tokenizer:
        return dataclasses.replace(loaded, model=_with_head(options), kind="classifier")
    of_text = loaded.tokenizer is not None
    if loaded.kind != needed or of_text != (kind != "images"):
        wants = {
            "text": "a causal language model with its tokenizer",
            "completions": "a causal language model with its tokenizer",
            "labelled texts": "an encoder or a classifier of sequences with its tokenizer",
            "images": "an image classifier of transformers",
        }[kind]
        raise InvalidArgument(
            f"{options.data} holds {kind}, which need {wants}; {options.model} is {name}"
            + ("" if of_text or kind == "images" else " without a tokenizer")
        )
    return loaded


def _with_head(options: Any) -> Any:
    """The encoder of a folder under a new head for the classes of the data."""
    import transformers

    from sparseworks.cli.loading import parse_dtype
    from sparseworks.data.finetuning import classes_of

    classes = classes_of(options.data)
    if len(classes) < 2:
        raise DataError(f"{options.data}: has one class alone, {classes[0]!r}")
    names = dict(enumerate(classes))
    try:
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            options.model, num_labels=len(classes), id2label=names,
            label2id={v: k for k, v in names.items()}, dtype=parse_dtype(options.dtype),
        ).eval()  # fmt: skip
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{options.model}: takes no classification head ({error})") from None


def _examples(source: Any, kind: str, loaded: Any, options: Any, count: int | None) -> Any:
    from sparseworks.data import finetuning as data

    if source is None:
        return None
    if kind != data.kind_of_source(source):
        raise InvalidArgument(
            f"{source} holds {data.kind_of_source(source)}, the training data {kind}"
        )
    if options.length < 2:
        raise InvalidArgument(f"--length {options.length}: at least 2")
    if kind == "images":
        return _images(source, loaded, options, count)
    if kind == "labelled texts":
        classes = _classes(loaded.model, options)
        rows = data.labelled_texts(source, loaded.tokenizer, options.length, classes)
    else:
        make = data.text_windows if kind == "text" else data.completions
        rows = make(source, loaded.tokenizer, options.length)
    return rows[:count]


def _classes(model: Any, options: Any) -> list[str]:
    """Names of the model's classes; numbers, where the data has numbers and the model has names."""
    from sparseworks.data.finetuning import classes_of

    known = getattr(model.config, "id2label", None) or {}
    names = [str(known[k]) for k in sorted(known, key=int)]
    if all(c.isdigit() for c in classes_of(options.data)) and not set(names) & {"0"}:
        return [str(i) for i in range(len(names))]
    return names


def _images(source: Any, loaded: Any, options: Any, count: int | None) -> Any:
    """At the size and with the normalisation of the model's own processor, where it has one."""
    import transformers

    from sparseworks.data.finetuning import Images

    size: Any = getattr(loaded.model.config, "image_size", None)
    normal: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, ImportError):
        auto: Any = transformers.AutoImageProcessor
        processor = auto.from_pretrained(options.model)
        if processor.image_mean and processor.image_std:
            normal = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
        told = dict(getattr(processor, "crop_size", None) or processor.size or {})
        size = size or ((told["height"], told["width"]) if "height" in told else
                        told.get("shortest_edge"))  # fmt: skip
    if size is None:
        raise InvalidArgument(
            f"{options.model}: neither its config nor a preprocessor_config.json tells the size of "
            "its images"
        )
    pair = (size, size) if isinstance(size, int) else tuple(size)
    images = Images.read(source, pair, count, **normal)
    most = int(images.images.labels.max())
    if most >= loaded.model.config.num_labels:
        raise DataError(
            f"{source}: has label {most}, and {options.model} has "
            f"{loaded.model.config.num_labels} classes"
        )
    return images


def _metric(held: Any, kind: str, loaded: Any, options: Any) -> Any:
    from sparseworks.data.finetuning import padded
    from sparseworks.diagnostics.metrics import accuracy, perplexity

    if held is None:
        return None
    size = options.batch_size
    rows = [held[i] for i in range(len(held))]
    pad = _padding(loaded)
    batches = [padded(rows[i : i + size], pad) for i in range(0, len(rows), size)]
    return (perplexity if kind in ("text", "completions") else accuracy)(batches)


def _padding(loaded: Any) -> int:
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        return 0
    found = tokenizer.pad_token_id
    return int((tokenizer.eos_token_id or 0) if found is None else found)


def _prune(options: Any, extra: Any, loaded: Any, train: Any) -> None:
    """Zeros of a one-shot method, calibrated on training examples; equal on every process."""
    import sparseworks as sw
    from sparseworks.data.finetuning import padded

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(options.seed))
    rows = [train[int(i)] for i in order[: options.calibration]]
    batches = [padded(rows[i : i + 8], _padding(loaded)) for i in range(0, len(rows), 8)]
    sw.prune(
        loaded.model, options.method, sparsity=options.sparsity, pattern=options.pattern,
        budget=options.budget, data=batches, include=options.include or None,
        exclude=options.exclude or None, seed=options.seed, **extra,
    )  # fmt: skip


def _trainer(options: Any, loaded: Any, train: Any, states: Path, device: str) -> Any:
    """The Trainer of transformers, with the options as its arguments."""
    import transformers

    from sparseworks.cli.preparing import parse_options
    from sparseworks.training.optimizing import registered

    own: Any = None
    try:
        chosen = registered(options.optimizer, parse_options(options.optimizer_option))
    except InvalidArgument:
        if options.optimizer_option or options.optimizer not in _optimizers():
            raise
    else:
        parameters = [p for p in loaded.model.parameters() if p.requires_grad]
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
        loaded.model, arguments, train_dataset=train, data_collator=Padded(_padding(loaded)),
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
