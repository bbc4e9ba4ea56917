"""What `sparseworks finetune` trains on what: options, model, examples, the trainer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sparseworks.cli.finetuning_trainer import PRUNED, Finetuning, make_trainer
from sparseworks.core.errors import DataError, InvalidArgument, MissingDependency


def prepare(options: Any, resumed: bool) -> Any:
    """Model, examples, method and trainer of the options; everything is checked."""
    from sparseworks.cli.loading import load_model
    from sparseworks.cli.preparing import check_inputs
    from sparseworks.cli.training import Job, distillation_of
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry
    from sparseworks.core.patterns import check_sparsity, parse_pattern
    from sparseworks.data.finetuning import classes_of, kind_of_source
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
    if options.sparsity is not None:
        check_sparsity(options.sparsity)
    if options.pattern is not None:
        parse_pattern(options.pattern)
    kind = kind_of_source(options.data)
    transformers.set_seed(options.seed)
    classes = classes_of(options.data) if kind == "labelled texts" else ()
    loaded = _fitting(load_model(options.model, options.dtype), kind, classes, options)
    if options.start is not None:
        load(options.start, loaded.model)
    train, held = (
        _examples(source, kind, classes, loaded, options, count)
        for source, count in ((options.data, options.samples),
                              (options.eval_data, options.eval_samples))
    )  # fmt: skip
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loss = distillation_of(options, loaded, method, device)
    metric = _metric(held, kind, loaded, options)
    before = metric(loaded.model) if metric is not None else None
    start = digest_of_model(loaded.model)
    states = options.out / "states"
    if one_shot and resumed and (states / PRUNED).is_file():
        load(states / PRUNED, loaded.model)
    elif one_shot:
        _prune(options, extra, loaded, train)
    trainer = make_trainer(options, loaded.model, train, _padding(loaded), states, device)
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


def _fitting(loaded: Any, kind: str, classes: Sequence[str], options: Any) -> Any:
    """The model, if it is for data of this kind; an encoder gets a head for labels."""
    needed = {"text": "causal", "completions": "causal"}.get(kind, "classifier")
    name = type(loaded.model).__name__
    if kind == "labelled texts" and loaded.kind in ("encoder", "other") and loaded.tokenizer:
        model = _with_head(loaded.model, classes, options)
        return dataclasses.replace(loaded, model=model, kind="classifier")
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


def _with_head(encoder: Any, classes: Sequence[str], options: Any) -> Any:
    """The encoder, with its zeros and their record, under a new head for the data's classes."""
    import transformers

    from sparseworks.core.masks import Masks, attach, masks

    if len(classes) < 2:
        raise DataError(f"{options.data}: has one class alone, {classes[0]!r}")
    config = copy.deepcopy(encoder.config)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: i for i, name in enumerate(classes)}
    try:
        auto: Any = transformers.AutoModelForSequenceClassification
        model = auto.from_config(config).to(encoder.dtype)
    except ValueError:
        raise InvalidArgument(
            f"{options.model}: transformers has no classifier of sequences for "
            f"{type(encoder).__name__}"
        ) from None
    base = encoder.base_model
    model.base_model.load_state_dict(base.state_dict(), strict=False)  # a pooler may be new
    record = masks(encoder)
    if record is not None:
        cut = "" if base is encoder else f"{encoder.base_model_prefix}."
        named = {n.removeprefix(cut): record.entry(n) for n in record if n.startswith(cut)}
        prefix = model.base_model_prefix
        attach(model, Masks({f"{prefix}.{n}": e for n, e in named.items()}))
    return model.eval()


def _examples(
    source: Any, kind: str, classes: Sequence[str], loaded: Any, options: Any, count: int | None
) -> Any:
    from sparseworks.data import finetuning as data

    if source is None:
        return None
    if source != options.data and (other := data.kind_of_source(source)) != kind:
        raise InvalidArgument(f"{source} holds {other}, the training data {kind}")
    if options.length < 2:
        raise InvalidArgument(f"--length {options.length}: at least 2")
    if kind == "images":
        return _images(source, loaded, options, count)
    if kind == "labelled texts":
        known = _known(loaded.model, classes)
        rows = data.labelled_texts(source, loaded.tokenizer, options.length, known)
    else:
        make = data.text_windows if kind == "text" else data.completions
        rows = make(source, loaded.tokenizer, options.length)
    return rows[:count]


def _known(model: Any, classes: Sequence[str]) -> list[str]:
    """Names of the model's classes; numbers, where the data has numbers and the model has names."""
    known = getattr(model.config, "id2label", None) or {}
    names = [str(known[k]) for k in sorted(known, key=int)]
    if all(c.isdigit() for c in classes) and not set(names) & {"0"}:
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
