"""What `sparseworks train` trains on what: options, model, data, plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sparseworks.cli.plugins import load_plugins
from sparseworks.core.errors import CheckpointError, DataError, InvalidArgument

# what a resumed run may say anew
_FREE = {"out", "resume", "force", "json", "log", "tensorboard", "save_every", "twin"}
ZOO = ("resnet20", "resnet56")
_EXAMPLES = {
    "train": "sparseworks train resnet20 --data train.parquet --method rigl --sparsity 0.9 "
    "--out runs/rigl",
    "finetune": "sparseworks finetune FOLDER --data text.txt --method sparsegpt --pattern 2:4 "
    "--out runs/recovered",
}


@dataclasses.dataclass
class Job:
    """A training ready to go."""

    training: Any
    tokenizer: Any
    metric: Any
    before: float | None
    start: str


def settle(options: Any, command: str = "train") -> tuple[Any, bool]:
    """The options to train with, and whether the output folder holds a training to go on with."""
    from sparseworks.training.logs import check_trackers

    out = options.out
    if out is None:
        raise InvalidArgument("give --out, the folder of the trained model")
    check_trackers(getattr(options, "log", ()))
    stored = out / "options.json"
    if options.resume:
        if not stored.is_file():
            raise InvalidArgument(f"{out}: holds no training to resume (no options.json)")
        options = _as_stored(options, stored)
        load_plugins(options)  # those that it was started with
        return options, True
    if not options.model or options.data is None or options.method is None:
        lacking = "model" if not options.model else "--data" if not options.data else "--method"
        raise InvalidArgument(f"no {lacking} given; for example: {_EXAMPLES[command]}")
    if stored.is_file() and not (out / "result.json").is_file() and not options.force:
        raise InvalidArgument(
            f"{out}: holds an unfinished training; go on with --resume, or start anew with --force"
        )
    from sparseworks.cli.preparing import check_output

    check_output(out, options.force)
    return options, False


def _as_stored(options: Any, path: Path) -> Any:
    """The stored options; one that was given must say the same."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    kept = {}
    for option in dataclasses.fields(options):
        given = getattr(options, option.name)
        old: Any = stored.get(option.name, option.default)
        old = tuple(old) if isinstance(old, list) else old
        if option.name == "twin" and given is None and old is not None:
            kept["twin"] = Path(old)
        if option.name == "log":
            kept["log"] = given or old
        if option.name in _FREE:
            continue
        if given not in (option.default, old):
            flag = "--" + option.name.replace("_", "-")
            raise InvalidArgument(
                f"{path.parent}: was started with {flag} {old}, not {given}; resume it with the "
                "same options, or choose another --out"
            )
        kept[option.name] = old
    return dataclasses.replace(options, **kept)


def prepare(options: Any) -> Job:
    """Model, data, plan and method of the options; everything is checked, nothing is written."""
    import torch

    from sparseworks.cli.preparing import make_metrics
    from sparseworks.cli.values import parse_options
    from sparseworks.training.loop import Training
    from sparseworks.training.planning import Plan, Sparse
    from sparseworks.training.runs import digest_of_model

    sparse = None
    if options.method == "dense":
        if options.sparsity is not None:
            raise InvalidArgument("--method dense takes no --sparsity")
    else:
        settings = {
            "pattern": options.pattern,
            "budget": options.budget,
            "include": options.include or None,
            "exclude": options.exclude or None,
            "seed": options.seed,
            **parse_options(options.option),
        }
        sparse = Sparse(options.method, options.sparsity, settings)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    text, images, loaded = model_and_data(options)
    optimizer: Any = options.optimizer or ("adamw" if text else "sgd")
    sgd = optimizer == "sgd"

    def chosen(name: str, default: Any) -> Any:
        value = getattr(options, name)
        return default if value is None else value

    plan = Plan(
        epochs=options.epochs,
        batch_size=chosen("batch_size", 16 if text else 128),
        lr=chosen("lr", 0.1 if sgd else 1e-3),
        weight_decay=chosen("weight_decay", 5e-4 if sgd else 0.01),
        augment=options.augment,
        label_smoothing=options.label_smoothing,
        optimizer=optimizer,
        optimizer_options=parse_options(options.optimizer_option),
        warmup=chosen("warmup", 0.1 if text else 0.3),
        accumulate=options.accumulate,
        clip=chosen("clip", 1.0 if text else None) or None,
        amp=options.amp,
        seed=options.seed,
    )
    batches = _epochs(options, plan, images, loaded.tokenizer)
    if sparse is not None:
        sparse = sparse.with_defaults(**_told(batches))
    loss = distillation_of(
        options, loaded, getattr(sparse, "chosen", None), device, plan.label_smoothing
    )
    model = loaded.model.to(device)
    if any(isinstance(m, torch.nn.Conv2d) for m in model.modules()):
        model = model.to(memory_format=torch.channels_last)  # three times faster on CPUs
    metric = None
    if options.eval_data is not None:
        names = ["perplexity" if text else "accuracy"]
        [metric] = make_metrics(names, loaded, options.eval_data, options.eval_samples)
    before = metric(model) if metric is not None and options.model not in ZOO else None
    start = digest_of_model(model)
    training = Training(model, plan, batches, sparse=sparse, loss=loss, compile=options.compile)
    return Job(training, loaded.tokenizer, metric, before, start)


def distillation_of(
    options: Any, loaded: Any, method: Any, device: str, label_smoothing: float = 0.0
) -> Any:
    """The loss that --teacher and --distill ask for, or None."""
    import copy

    from sparseworks.cli.loading import load_model
    from sparseworks.cli.values import parse_options
    from sparseworks.io import load
    from sparseworks.training.distilling import Distillation

    if options.teacher is None:
        if options.distill:
            raise InvalidArgument("--distill needs --teacher, `start` say")
        return None
    if options.teacher == "start":
        teacher = copy.deepcopy(loaded.model)
    elif Path(options.teacher).is_dir():
        teacher = load_model(options.teacher).model
    else:
        teacher = load(options.teacher, copy.deepcopy(loaded.model))
    own = getattr(method, "recovery", None)
    weights = parse_options(options.distill)
    weights = weights or own or {"task": 0.5, "kl": 0.5, "temperature": 2.0}
    return Distillation.of(weights, teacher.to(device), label_smoothing=label_smoothing)


def model_and_data(options: Any) -> tuple[bool, Any, Any]:
    """Is it text, the training images, and the loaded model."""
    import torch

    from sparseworks.cli.loading import LoadedModel, load_model
    from sparseworks.cli.preparing import check_inputs
    from sparseworks.data.images import digits, read_images
    from sparseworks.io import load

    check_inputs(options)
    torch.manual_seed(options.seed)
    images: Any = None
    loaded: Any = None
    if options.model not in ZOO:
        loaded = load_model(options.model, seed=options.seed)
        if loaded.kind == "encoder" or (loaded.kind == "classifier" and loaded.tokenizer):
            raise InvalidArgument(
                f"{options.model}: train takes image classifiers and causal language models; use "
                "sw.sparsify in a training loop of your own for this one"
            )
    text = loaded is not None and loaded.kind == "causal"
    for flag, given in (
        ("--samples", options.samples is not None),
        ("--label-smoothing", getattr(options, "label_smoothing", 0) != 0),
    ):
        if text and given:
            raise InvalidArgument(f"{flag} is for images, and {options.model} reads text")
    if not text:
        source = options.data
        limit = options.samples
        images = digits() if source == "digits" else read_images(source, limit=limit)
        if source == "digits" and limit is not None:
            images = dataclasses.replace(
                images, pixels=images.pixels[:limit], labels=images.labels[:limit]
            )
    if loaded is None:
        from sparseworks.models import zoo

        classes = int(images.labels.max()) + 1
        torch.manual_seed(options.seed)
        loaded = LoadedModel(getattr(zoo, options.model)(classes), "classifier", None, "")
    if options.start is not None:
        load(options.start, loaded.model)
    if images is not None:
        _try(loaded.model, images, options)
    return text, images, loaded


def _try(model: Any, images: Any, options: Any) -> None:
    """The model must take the images and have an output for every label."""
    import torch

    from sparseworks.models.calls import logits_of

    with torch.no_grad():
        try:
            logits = logits_of(model.eval()(images.normalized(slice(0, 2))))
        except RuntimeError as error:
            shape = list(images.pixels.shape[1:])
            raise DataError(f"{options.model} cannot take images of {shape}: {error}") from None
    classes = int(images.labels.max()) + 1
    if logits.ndim != 2 or logits.shape[1] < classes or int(images.labels.min()) < 0:
        raise DataError(
            f"{options.model} gives logits of shape {list(logits.shape)} and {options.data} has "
            f"labels from {int(images.labels.min())} to {classes - 1}"
        )


def _told(batches: Any) -> dict[str, Any]:
    """What the training data say, for methods that have an option of the name."""
    from sparseworks.data.epochs import ImageEpochs

    if not isinstance(batches, ImageEpochs):
        return {}
    images = batches.images
    return {"samples": len(images), "example": images.normalized(slice(0, 2))}


def _epochs(options: Any, plan: Any, images: Any, tokenizer: Any) -> Any:
    from sparseworks.data.epochs import ImageEpochs, TextEpochs
    from sparseworks.data.text import read_text, token_ids

    if images is not None:
        return ImageEpochs(images, plan.batch_size, options.seed, plan.augment)
    if tokenizer is None:
        raise InvalidArgument(f"{options.model}: has no tokenizer, so it reads no text")
    if options.length < 2:
        raise InvalidArgument(f"length={options.length} must be at least 2")
    ids = token_ids(read_text(options.data), tokenizer)
    return TextEpochs(ids, options.length, plan.batch_size, options.seed)
