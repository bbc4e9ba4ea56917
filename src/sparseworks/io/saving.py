"""`sparseworks.save`: a model as one packed safetensors file, or as a Hugging Face folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.core.types import Progress
from sparseworks.io.atomic import atomic_file
from sparseworks.io.folders import save_folder
from sparseworks.io.gather import unwrap
from sparseworks.io.summary import CheckpointInfo
from sparseworks.io.writing import refuse_pickle_target, write_packed

__all__ = ["save"]

_FORMATS = ("file", "huggingface")


@torch.no_grad()
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    tokenizer: Any = None,
    signed_zeros: bool = True,
    progress: Progress | None = None,
) -> CheckpointInfo:
    """Save a model, every bit of it, in as few bytes as its zeros allow.

    Parameters and persistent buffers are stored, tied ones once, each in the smallest of three
    layouts: dense; a bitmask and the kept values (n/8 + kept * width bytes of n weights); for N:M
    masks a code per run and the kept values. The mask record (`sw.masks(model)`) is kept: a weight
    that is zero but not masked stays so. The write is atomic: a call that fails or is killed
    leaves what was there.

    Args:
        model: any module; its tensors may be on any device and of any dtype.
        path: of a file ("model.safetensors"), or of a folder for a transformers model.
        format: "file", "huggingface" (a folder with config.json, sparseworks.safetensors,
            generation config and tokenizer), or None: a file if `path` ends in ".safetensors".
        tokenizer: for a folder: a tokenizer or processor, or the folder to copy its files from;
            None: the folder the model was loaded from, where it is known.
        signed_zeros: False: -0.0 is stored as +0.0, in all tensors; all other bits stay.
            `weight *= mask` leaves -0.0 in half of the zeros, which costs a bit for each zero.
        progress: called with (tensors done, tensors in all, name).

    Returns:
        What was written, per tensor; its `signed_zero_bytes` is what -0.0 costs.

    Raises:
        InvalidArgument: a path or format that cannot be used.
        ModelError: the model holds something that cannot be stored (a DTensor, say).
        CheckpointError: the disk is full or the place cannot be written.
    """
    path, model = Path(path), unwrap(model)
    refuse_pickle_target(path)
    if format is None:
        format = "file" if path.suffix == ".safetensors" else "huggingface"
    if format not in _FORMATS:
        raise InvalidArgument(f"format={format!r}: 'file' or 'huggingface'")
    if format == "huggingface":
        return save_folder(model, path, tokenizer, progress, signed_zeros)
    if tokenizer is not None:
        raise InvalidArgument(f"{path}: a tokenizer can only be saved into a folder")
    with atomic_file(path) as temporary:
        info = write_packed(model, temporary, progress, signed_zeros)
    return replace(info, path=path)
