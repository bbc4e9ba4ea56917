"""What `sparseworks slim` runs a model on: an example, and calibration or training data."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparseworks.core.errors import InvalidArgument

__all__ = ["subject"]


def subject(loaded: Any, options: Any, method: Any) -> tuple[Any, Any]:
    """One batch to trace and time on, and the data that the method is given, or None.

    Args:
        loaded: the model.
        options: of the command.
        method: the object of a structured method.

    Raises:
        InvalidArgument: there is nothing to call the model with.
        DataError: the data cannot be read.
    """
    import torch

    from sparseworks.cli.preparing import own_batches
    from sparseworks.data import load
    from sparseworks.models.calls import Arguments

    needed = bool(method.info.needs)
    generator = torch.Generator().manual_seed(options.seed)
    if options.data is None and options.input_shape:
        return torch.randn(options.input_shape, generator=generator), None
    if options.data is None and loaded.tokenizer is None:
        if not loaded.input_shape or needed:
            raise InvalidArgument("give --data, or --input-shape where the method needs no data")
        return torch.randn(options.batch_size, *loaded.input_shape, generator=generator), None
    own = options.data is not None and ".py:" in options.data
    if method.info.kind == "train-and-cut":
        batches: Any = own_batches(options.data) if own else _epochs(loaded, options)
        first = next(iter(batches if own else batches.epoch(0)), None)
        if first is None:
            raise InvalidArgument(
                f"{options.data} has no whole batch of {options.batch_size}; lower --batch-size"
            )
        return Arguments.of_batch(first), batches
    if own:
        batches = own_batches(options.data)
        return method.example(loaded.model, batches), batches
    kind: Any = None
    if loaded.tokenizer is not None:
        kind = "passages" if loaded.kind in ("encoder", "classifier") else "windows"
    batches = load(
        options.data or "docstrings",
        tokenizer=loaded.tokenizer,
        kind=kind,
        samples=128 if options.samples is None else options.samples,
        length=options.length,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    return method.example(loaded.model, batches), batches if needed or options.data else None


def _epochs(loaded: Any, options: Any) -> Any:
    """Training data of the options: images, or text for a language model."""
    from sparseworks.data.epochs import ImageEpochs, TextEpochs
    from sparseworks.data.images import digits, read_images
    from sparseworks.data.text import read_text, token_ids

    if loaded.kind == "causal":
        ids = token_ids(read_text(options.data), loaded.tokenizer)
        return TextEpochs(ids, options.length, options.batch_size, options.seed)
    images = digits() if options.data == "digits" else read_images(options.data)
    if options.samples is not None:
        images = dataclasses.replace(
            images,
            pixels=images.pixels[: options.samples],
            labels=images.labels[: options.samples],
        )
    return ImageEpochs(images, options.batch_size, options.seed, options.augment)
