"""A decoder as one safetensors file: tensors as they lie in memory, all else in its header."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseworks.io.atomic import atomic_file
from sparseworks.io.sealed import write_sealed
from sparseworks.kernels.panels import Panels

__all__ = ["FILE_FORMAT", "save_decoder"]

FILE_FORMAT = 2


def save_decoder(decoder: Any, path: str | os.PathLike[str]) -> None:
    """Write a decoder, its configuration included.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    report = decoder.report
    about = {
        "format": FILE_FORMAT,
        "cache": decoder.native.cache,
        "spec": _encode(decoder.native.spec, tensors),
        "report": {"lines": [asdict(x) for x in report.lines], "bandwidth": report.bandwidth,
                   "notes": report.notes},
        "config": decoder.config.to_dict(),
        "source": decoder.tokenizer_name,
        "generation_config": decoder.generation_config.to_dict(),
    }  # fmt: skip
    with atomic_file(Path(path)) as file:
        write_sealed(tensors, file, {"sparseworks_decoder": json.dumps(about, default=str)})


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        whole = value.contiguous()
        tensors[name] = whole.clone() if value._is_view() else whole
        return {"tensor": name}
    if isinstance(value, Panels):
        parts = [_encode(t, tensors) for t in (value.data, value.offset)]
        return {"panels": [int(value.format), value.rows, value.columns, value.zeros, *parts]}
    if is_dataclass(value):
        found = {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}
        return {"kind": type(value).__name__, "fields": found}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    return value
