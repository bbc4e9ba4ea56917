"""Fine-tune a Hugging Face model sparse: language models, text and image classifiers.

Built on transformers' Trainer. The method prunes the model before (one-shot methods, whose zeros
then stay), while, or by training it. Data is text (windows), rows of prompt and completion, chat
messages, labelled texts or labelled images; an encoder gets a head for the labels.

The output folder holds the checkpoint, result.json, options.json, trace.json and report.html (where
plotly is installed); while the training runs, its states, from which --resume goes on bit for bit.
`torchrun --nproc-per-node N -m sparseworks finetune ...` trains on N processes.
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

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks finetune`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """Hugging Face folder or hub name, file.py:factory."""
    data: str | None = None
    """Training data: a text file or folder; .jsonl, .csv or .parquet rows; an image folder."""
    method: str | None = None
    """One-shot method (wanda, sparsegpt, ...: pruned first, the zeros stay), training method (ast,
    gradual, squarehead, ...), or dense for none."""
    plugin: Plugins = ()
    sparsity: float | None = None
    """Final fraction of zeros in [0, 1)."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force or --resume."""
    resume: bool = False
    """Go on with the training in --out; options that are not given are those it has."""
    start: Start = None
    eval_data: str | None = None
    """Data of the same kind: perplexity or accuracy on it before, after every epoch, and after."""
    eval_samples: int | None = None
    """Evaluation examples; default: all."""
    samples: int | None = None
    """Train on the first so many examples only."""
    length: int = 256
    """Tokens of a window, or of an example at most."""
    pattern: MaskPattern = None
    budget: MaskBudget = None
    include: Masked = ()
    exclude: Dense = ()
    calibration: int = 128
    """Training examples that a one-shot method calibrates on."""
    teacher: Teacher = None
    distill: Distill = ()
    option: MethodOptions = ()
    epochs: float = 3.0
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps in place of --epochs."""
    batch_size: int = 8
    """Examples of a forward pass, on each process."""
    accumulate: int = 1
    """Batches whose gradients add up to one step."""
    optimizer: str = "adamw_torch"
    """As transformers names them (adamw_torch, adafactor, sgd, ...), or a registered one."""
    optimizer_option: tuple[str, ...] = ()
    """Options of a registered optimizer, name=value (JSON values)."""
    lr: float = 1e-4
    """Peak of the learning rate."""
    schedule: str = "cosine"
    """Of the learning rate, as transformers names them (linear, constant, ...)."""
    warmup: float = 0.05
    """Fraction of the training in which the learning rate rises."""
    weight_decay: float = 0.0
    """Of matrices."""
    clip: float = 1.0
    """Largest norm of the gradient, 0 for any."""
    amp: str | None = None
    """Mixed precision: bf16 or fp16."""
    dtype: str | None = None
    """Of the weights: fp32, bf16 or fp16; default fp32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, for less memory (gradient checkpointing)."""
    device: str | None = None
    """cpu or cuda; default: cuda where there is one."""
    seed: int = 0
    """Of data order, a new head, masks."""
    save_every: int | None = None
    """Steps between states to resume from; default: an epoch."""
    log: tuple[str, ...] = ()
    """Where the trainer also logs, as transformers names them: tensorboard, wandb, mlflow, ..."""
    twin: Twin = None
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Prepare or resume, train, save, report; on all ranks that torchrun started."""
    from sparseworks.cli.ranks import process_group

    with process_group(training=True) as group:
        return run_on(options, group)


def run_on(options: Options, group: Any) -> dict[str, Any]:
    """The command on one rank of a group, or alone (None)."""
    from sparseworks.cli import finetuning, trained, training
    from sparseworks.cli.running import plain_options, write_json

    options, resumed = training.settle(options, "finetune")
    out = options.out
    assert out is not None
    finished = trained.finished_result(out) if resumed else None
    if finished is not None:
        trained.show(finished, options, "was finished already; ")
        return finished
    twin = trained.twin_of(options)
    first = group is None or group.rank() == 0
    job = finetuning.prepare(options, resumed)
    if first and not resumed:
        trained.fresh_folder(out)
        write_json(out / "options.json", plain_options(options))
    if group is not None:
        from torch import distributed

        distributed.barrier()
    try:
        job.training.fit(resumed)
    except KeyboardInterrupt:
        print(
            f"sparseworks: interrupted at step {job.training.step} of {job.training.steps}; "
            f"sparseworks finetune --resume --out {out} goes on from the last state",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    if not first:
        return {}
    summary = trained.finish(job, options, twin)
    trained.show(summary, options, "")
    return summary
