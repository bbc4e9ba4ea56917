"""One front door for batches: whatever the source is, a list of batches comes out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.builtin import docstrings, sources
from sparseworks.data.images import digits, holds_images, read_images
from sparseworks.data.paths import existing
from sparseworks.data.text import passages, random_windows, read_text, token_ids, windows

__all__ = ["BUILTIN", "check_source", "load"]

BUILTIN = ("docstrings", "sources", "digits")
Kind = Literal["windows", "passages", "images"]


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse a source that is not there, without reading one that is.

    Raises:
        DataError: neither a built-in name nor a file or folder.
    """
    if os.fspath(source) not in BUILTIN:
        existing(source)


def load(
    source: str | os.PathLike[str] | Iterable[Any],
    *,
    tokenizer: Any = None,
    kind: Kind | None = None,
    split: Literal["calibration", "evaluation"] = "calibration",
    samples: int | None = 128,
    length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Any]:
    """Batches from a source.

    Args:
        source: "docstrings" (calibration and evaluation take every other one) or "sources" of the
            standard library, "digits", a text file, a
            folder of texts or of class folders, a parquet file of texts or images, a data set
            with a text column, or an iterable of ready batches.
        tokenizer: needed for text.
        kind: "windows" of tokens (language models), padded "passages" (encoders), or "images";
            None: images where the source holds images, else windows.
        split: calibration draws `samples` at random by `seed`; evaluation takes all in order, up
            to `samples`.
        samples: windows, passages or images; None: all (evaluation).
        length: tokens of a window, or of a passage at most.
        batch_size: per batch.

    Raises:
        DataError: the source is missing, empty or malformed.
        InvalidArgument: text without a tokenizer.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if name == "digits":
            return _image_batches(digits(), split, samples, batch_size, seed)
        if name not in BUILTIN and (kind == "images" or (kind is None and holds_images(name))):
            return _image_batches(read_images(name), split, samples, batch_size, seed)
        text = _text(name, split)
        texts = _passages(name, text, split)
    elif hasattr(source, "column_names"):
        texts = _dataset_texts(source)
        text = "\n\n".join(texts)
    else:
        batches = list(source)
        if not batches:
            raise DataError("the calibration data is empty: at least one batch is needed")
        if not all(isinstance(b, (Tensor, Mapping, tuple, list)) for b in batches):
            raise DataError("an iterable source must yield tensors, mappings or (inputs, target)")
        return batches
    if tokenizer is None:
        raise InvalidArgument(f"{source}: text needs a tokenizer; give the model's")
    if kind == "passages":
        chosen = seed if split == "calibration" else None
        return passages(
            texts, tokenizer, samples=samples, length=length, batch_size=batch_size, seed=chosen
        )
    if split == "calibration":
        drawn = random_windows(
            text,
            tokenizer,
            samples=samples or 128,
            length=length,
            batch_size=batch_size,
            seed=seed,
        )
        return list(drawn)
    # a window takes far less than 40 characters a token: the rest need not be tokenized
    ids = token_ids(text if samples is None else text[: samples * length * 40], tokenizer)
    ids = ids if samples is None else ids[: samples * length]
    return list(windows(ids, length=length, batch_size=batch_size))


def _image_batches(images: Any, split: str, samples: int | None, size: int, seed: int) -> list[Any]:
    chosen = seed if split == "calibration" else None
    return list(images.batches(size, samples=samples, seed=chosen))


def _half(split: str) -> list[str]:
    """Every other docstring: calibration and evaluation never share one."""
    chosen = docstrings()[0 if split == "calibration" else 1 :: 2]
    return [f"{d.summary} {d.body}" for d in chosen]


def _text(name: str, split: str) -> str:
    if name == "docstrings":
        return "\n\n".join(_half(split))
    if name == "sources":
        return "\n\n".join(text for _, text in sources())
    return read_text(name)


def _passages(name: str, text: str, split: str) -> list[str]:
    if name == "docstrings":
        return _half(split)
    return [p for p in text.split("\n\n") if p.strip()]


def _dataset_texts(dataset: Any) -> list[str]:
    column = next((c for c in ("text", "content", "sentence") if c in dataset.column_names), None)
    if column is None:
        raise DataError(f"the data set has no text column among {dataset.column_names}")
    return [t for t in dataset[column] if t]
