"""Train a model sparse: a classifier on images, or a causal language model on text.

The output folder holds the trained model, result.json, options.json, trace.json (the masks and the
loss over the training) and its pictures, report.html (where plotly is installed). While the
training runs it holds state.safetensors, from which --resume goes on bit for bit after any
interruption.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.fields import (
    Dense,
    Distill,
    MaskBudget,
    Masked,
    MaskPattern,
    MethodOptions,
    Start,
    Teacher,
    Twin,
)
from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks train`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """resnet20, resnet56, timm:NAME, torchvision:NAME, a CIFAR ResNet .safetensors,
    file.py:factory, a Hugging Face folder."""
    data: str | None = None
    """Training data: a parquet file of images, an image folder, digits; a text file for text."""
    method: str | None = None
    """Registered training method (gradual, rigl, set, ...), or dense for none."""
    plugin: Plugins = ()
    sparsity: float | None = None
    """Final fraction of zeros in [0, 1)."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force or --resume."""
    resume: bool = False
    """Go on with the training in --out; options that are not given are those it has."""
    start: Start = None
    eval_data: str | None = None
    """Evaluation data of accuracy or perplexity, measured after every epoch."""
    eval_samples: int | None = None
    """Evaluation images or windows; default: all."""
    samples: int | None = None
    """Train on the first so many images only."""
    length: int = 256
    """Tokens of a text window."""
    pattern: MaskPattern = None
    budget: MaskBudget = None
    include: Masked = ()
    exclude: Dense = ()
    teacher: Teacher = None
    distill: Distill = ()
    option: MethodOptions = ()
    epochs: int = 10
    """Passes over the training data."""
    batch_size: int | None = None
    """Default: 128 images or 16 windows."""
    accumulate: int = 1
    """Batches whose gradients add up to one step."""
    optimizer: str | None = None
    """sgd, adamw or a registered one (dct-adamw); default: sgd for images, adamw for text."""
    optimizer_option: tuple[str, ...] = ()
    """Options of a registered optimizer, name=value (JSON values)."""
    lr: float | None = None
    """Peak of the one-cycle learning rate; default: 0.1 with sgd, else 0.001."""
    weight_decay: float | None = None
    """Default: 0.0005 with sgd, else 0.01."""
    warmup: float | None = None
    """Fraction of the training in which the learning rate rises; default: 0.3, text 0.1."""
    clip: float | None = None
    """Largest norm of the gradient, 0 for any; default: any, text 1."""
    label_smoothing: float = 0.0
    """Of the cross-entropy of images."""
    augment: bool = True
    """Random crops and flips of images."""
    amp: str | None = None
    """Mixed precision: bf16, or fp16 with a loss scaler."""
    device: str | None = None
    """cpu or cuda; default: cuda where there is one."""
    compile: bool = False
    """Call the model through torch.compile."""
    seed: int = 0
    """Of initialisation, data order, masks."""
    save_every: int | None = None
    """Also checkpoint every so many steps; default: after every epoch only."""
    twin: Twin = None
    log: tuple[str, ...] = ()
    """Where loss, sparsity and flips go while it trains: tensorboard, wandb (an offline run, unless
    WANDB_MODE says otherwise), mlflow (a store in --out, unless MLFLOW_TRACKING_URI does)."""
    tensorboard: bool = True
    """Without --log: TensorBoard events in --out, where the tensorboard package is installed."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Prepare or resume, train with a checkpoint per epoch, save, report."""
    from sparseworks.cli import trained, training
    from sparseworks.cli.recording import train_record
    from sparseworks.cli.running import plain_options, progress_bar, write_json
    from sparseworks.training.checkpointing import load_state, save_state

    options, resumed = training.settle(options)
    out = options.out
    assert out is not None
    finished = trained.finished_result(out) if resumed else None
    if finished is not None:
        trained.show(finished, options, "was finished already; ")
        return finished
    if options.save_every is not None and options.save_every < 1:
        raise InvalidArgument(f"save_every={options.save_every} must be at least 1")
    twin = trained.twin_of(options)
    job = training.prepare(options)
    state = out / "state.safetensors"
    if resumed and state.is_file():
        job.training.load_state_dict(load_state(state))
    if not resumed:
        trained.fresh_folder(out)
        write_json(out / "options.json", plain_options(options))
    log = trained.open_log_of(options, job.training.step)
    job.training.trace.log = log
    try:
        with progress_bar("training", quiet=options.json) as progress:

            def on_step(now: Any) -> None:
                progress(now.step, now.steps, f"epoch {now.epoch + 1}")
                every = options.save_every
                if every and now.step % every == 0 and now.step % now.per_epoch:
                    save_state(state, now.state_dict())

            def on_epoch(now: Any, row: dict[str, float]) -> None:
                if job.metric is not None:
                    row[job.metric.name] = job.metric(now.model)
                save_state(state, now.state_dict())
                if not options.json:
                    trained.say_epoch(row, now.plan.epochs)
                told = {f"epoch/{n}": row[n] for n in row if n not in ("epoch", "step")}
                log.write(now.step, told)

            job.training.fit(on_step=on_step, on_epoch=on_epoch)
    except KeyboardInterrupt:
        print(
            f"sparseworks: interrupted at step {job.training.step} of {job.training.steps}; "
            f"sparseworks train --resume --out {out} goes on from the last checkpoint",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    finally:
        log.close()
    summary = trained.finish(job, options, twin, train_record)
    trained.show(summary, options, "")
    return summary
