"""Train a classifier several times to find a small one in it: tickets and soups.

The output folder keeps every finished training under runs/, so that --resume goes on after any
interruption, a kill included; at the end it also holds model.safetensors, result.json, options.json
and report.html (where plotly is installed).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.cli.plugins import Plugins
from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks tickets`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """resnet20, resnet56, timm:NAME, torchvision:NAME, a CIFAR ResNet .safetensors,
    file.py:factory."""
    data: str | None = None
    """Training images: a parquet file, a folder with one folder a class, digits."""
    method: str = "rewinding"
    """rewinding, soup, or another registered method that trains several times."""
    plugin: Plugins = ()
    sparsity: float | None = None
    """Final fraction of zeros in [0, 1)."""
    out: Path | None = None
    """Output folder; it must not exist yet, unless --force or --resume."""
    resume: bool = False
    """Go on with the experiment in --out; options that are not given are those it has."""
    start: str | None = None
    """Weights to start from: a packed or plain safetensors file of the model."""
    holdout: float = 0.1
    """Share of the training images that scores the runs and is not trained on."""
    eval_data: str | None = None
    """Test images, measured once at the end on the dense network and on the result."""
    eval_samples: int | None = None
    """Test images; default: all."""
    samples: int | None = None
    """Use the first so many training images only."""
    pattern: str | None = None
    """unstructured, row, N:M, blockHxW; default: the method's own."""
    budget: str | None = None
    """uniform, erk or global; default: the method's own."""
    include: tuple[str, ...] = ()
    """Name patterns of the only weights to mask."""
    exclude: tuple[str, ...] = ()
    """Name patterns of weights to leave dense."""
    option: tuple[str, ...] = ()
    """Options of the method, name=value: rewind=0.05, rounds=5, controls=true, copies=3."""
    epochs: int = 10
    """Passes over the images of one training."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.1
    """Peak of the learning rate of SGD."""
    weight_decay: float = 5e-4
    """On all parameters."""
    schedule: str | None = None
    """step, linear or one-cycle; default: step, which has no warm-up; linear for soup."""
    augment: bool = True
    """Random crops and flips."""
    device: str | None = None
    """cpu or cuda; default: cuda where there is one."""
    seed: int = 0
    """Of initialisation, held-out images, data order."""
    force: bool = False
    """Replace the output folder."""
    json: bool = False
    """Print the result as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Prepare or resume, train, save, report."""
    import sparseworks as sw
    from sparseworks.cli import trained, training
    from sparseworks.cli.preparing import make_metrics
    from sparseworks.cli.running import plain_options, progress_bar, write_json
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry
    from sparseworks.training.fitting import Recipe, fit_classifier

    if not options.resume and (not options.model or options.data is None):
        raise InvalidArgument(
            f"no {'--data' if options.model else 'model'} given; for example: sparseworks tickets "
            "resnet20 --data train.parquet --sparsity 0.9 --out runs/ticket"
        )
    options, resumed = training.settle(options)
    out = options.out
    assert out is not None
    done = trained.finished_result(out) if resumed else None
    if done is not None:
        _show(done, options, "was finished already")
        return done
    method = registry.build(options.method, ("driver",), **parse_options(options.option))
    if not 0 < options.holdout < 1:
        raise InvalidArgument(f"--holdout {options.holdout} must be in (0, 1)")
    schedule: Any = options.schedule or ("linear" if options.method == "soup" else "step")
    recipe = Recipe(
        epochs=options.epochs, batch_size=options.batch_size, lr=options.lr,
        weight_decay=options.weight_decay, augment=options.augment, schedule=schedule,
    )  # fmt: skip
    subject = _subject(options)
    metric = None
    if options.eval_data is not None:
        names = ["accuracy"]
        [metric] = make_metrics(names, subject.loaded, options.eval_data, options.eval_samples)
    if not resumed:
        trained.fresh_folder(out)
        write_json(out / "options.json", plain_options(options))
    try:
        with progress_bar("trainings", quiet=options.json) as progress:
            done = sw.experiment(
                lambda net, **given: fit_classifier(net, subject.train, recipe, **given),
                subject.loaded.model,
                method,
                folder=out / "runs",
                about={"data": subject.digest, "recipe": dataclasses.asdict(recipe)},
                sparsity=options.sparsity,
                pattern=options.pattern,
                budget=options.budget,
                include=options.include or None,
                exclude=options.exclude or None,
                seed=options.seed,
                evaluate=subject.score,
                data=subject.statistics,
                progress=progress,
            )
    except KeyboardInterrupt:
        print(
            f"sparseworks: interrupted; finished trainings are kept, and sparseworks tickets "
            f"--resume --out {out} goes on",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    summary = _finish(options, done, subject, recipe, metric)
    _show(summary, options, str(done))
    return summary


@dataclass(frozen=True)
class _Subject:
    loaded: Any
    train: Any
    score: Any
    statistics: Any
    digest: str


def _subject(options: Options) -> _Subject:
    """The model on its device, images to train on and images to score with."""
    import torch

    from sparseworks.cli import training
    from sparseworks.data.images import ImageSet
    from sparseworks.diagnostics.metrics import accuracy

    text, images, loaded = training.model_and_data(options)
    if text:
        raise InvalidArgument(f"{options.model}: tickets trains image classifiers")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    count = max(1, round(options.holdout * len(images)))
    parts = [
        ImageSet(images.pixels[i], images.labels[i], images.mean, images.std)
        for i in (order[:count], order[count:])
    ]
    held, train = parts
    h = hashlib.blake2b(digest_size=8)
    for part in parts:
        h.update(part.pixels.contiguous().numpy().data)
        h.update(part.labels.numpy().data)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.model.to(device)
    if any(isinstance(m, torch.nn.Conv2d) for m in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # three times faster on CPUs
    loaded = dataclasses.replace(loaded, model=model)
    fifth = max(1, len(train) // 5)
    statistics = train.batches(options.batch_size, samples=fifth, seed=options.seed)
    score = accuracy(held.batches(500))
    moved = [(x.to(device), y) for x, y in statistics]
    return _Subject(loaded, train, score, moved, h.hexdigest())


def _finish(
    options: Options, done: Any, subject: _Subject, recipe: Any, metric: Any
) -> dict[str, Any]:
    """Save the model, then the page, then the result that says all is there."""
    from sparseworks.cli.recording import tickets_record
    from sparseworks.cli.running import plain_options, write_json
    from sparseworks.diagnostics.claims import machine
    from sparseworks.io import save

    out, model = options.out, subject.loaded.model
    assert out is not None
    save(model, out / "model.safetensors")
    summary: dict[str, Any] = {
        "options": plain_options(options),
        "model": options.model,
        "class": type(model).__name__,
        "experiment": done.to_dict(),
        "sparsity": done.result.figures["sparsity"],
        "metric": None,
        "checkpoint": str(out / "model.safetensors"),
        "machine": machine(),
    }
    if metric is not None:
        dense = done.finished.get("dense")
        before = metric(dense.into(done.fresh())) if dense is not None else None
        summary["metric"] = {"name": metric.name, "unit": metric.unit, "before": before,
                             "after": metric(model)}  # fmt: skip
    score = None if metric is None else summary["metric"]["after"]
    summary["record"] = tickets_record(
        options, done, subject, recipe, metric, score, summary["machine"]
    )
    if importlib.util.find_spec("plotly") is not None:
        from sparseworks.report.tickets import write_tickets

        write_tickets(out / "report.html", summary)
    write_json(out / "result.json", summary)
    return summary


def _show(summary: dict[str, Any], options: Options, said: str) -> None:
    if options.json:
        print(json.dumps(summary, indent=1, default=str))
        return
    print(said)
    metric = summary["metric"]
    if metric is not None:
        before = "" if metric["before"] is None else f"dense {metric['before']:.4g}, "
        print(f"  test {metric['name']}: {before}result {metric['after']:.4g} {metric['unit']}")
    print(f"sparsity {summary['sparsity']:.2%}; the model is {summary['checkpoint']}")
