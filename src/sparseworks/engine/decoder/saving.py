"""A decoder as one safetensors file: tensors as they lie in memory, everything else in its header.

Loading maps the file; nothing is packed, measured or compared again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.engine.decoder import spec as specs
from sparseworks.engine.decoder.native import NativeDecoder
from sparseworks.engine.decoder.packing import Line, Report
from sparseworks.engine.decoder.rotary import Rotary
from sparseworks.io.atomic import atomic_file
from sparseworks.kernels.panels import Format, Panels

__all__ = ["load_decoder", "save_decoder"]

_FORMAT = 1
_KINDS = {
    c.__name__: c
    for c in (specs.AttentionSpec, specs.LayerSpec, specs.LinearSpec, specs.MixtureSpec,
              specs.MlpSpec, specs.ModelSpec, specs.NormSpec, Rotary)
}  # fmt: skip


def save_decoder(decoder: Any, path: str | os.PathLike[str]) -> None:
    """Write a decoder, its configuration included.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    report = decoder.report
    about = {
        "format": _FORMAT,
        "cache": decoder.native.cache,
        "spec": _encode(decoder.native.spec, tensors),
        "report": {"lines": [asdict(x) for x in report.lines], "bandwidth": report.bandwidth,
                   "notes": report.notes},
        "config": decoder.config.to_dict(),
        "source": decoder.tokenizer_name,
        "generation_config": decoder.generation_config.to_dict(),
    }  # fmt: skip
    with atomic_file(Path(path)) as file:
        save_file(tensors, file, {"sparseworks_decoder": json.dumps(about, default=str)})


def load_decoder(
    path: str | os.PathLike[str], *, threads: int | None = None, cache: str | None = None
) -> Any:
    """Load what `Decoder.save` wrote, by mapping the file.

    Args:
        path: of the file.
        threads: of the native code; None: as many as torch uses.
        cache: dtype of keys and values; None: as it was saved.

    Raises:
        CheckpointError: not a decoder, damaged, of another version, or no native code to run it.
    """
    from transformers import AutoConfig, GenerationConfig

    from sparseworks.engine.decoder.generating import Decoder

    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("sparseworks_decoder")
            if header is None:
                raise CheckpointError(f"{path}: not a decoder that sparseworks saved")
            about = json.loads(header)
            if about.get("format") != _FORMAT:
                raise CheckpointError(f"{path}: format {about.get('format')}, this reads {_FORMAT}")
            spec = _decode(about["spec"], file)
        config = dict(about["config"])
        made = AutoConfig.for_model(config.pop("model_type"), **config)
        made._name_or_path = about.get("source") or ""
        report = Report([Line(**x) for x in about["report"]["lines"]],
                        about["report"]["bandwidth"], about["report"]["notes"])  # fmt: skip
        native = NativeDecoder(spec, cache or about["cache"], threads)
        generation = GenerationConfig.from_dict(about["generation_config"])
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError, AttributeError,
            ModelError, InvalidArgument) as error:  # fmt: skip
        if isinstance(error, InvalidArgument) and "cache=" in str(error):
            raise
        raise CheckpointError(f"{path}: damaged, or not a decoder: {error}") from error
    return Decoder(made, native, report, generation)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.contiguous().clone() if value._is_view() else value.contiguous()
        return {"tensor": name}
    if isinstance(value, Panels):
        return {"panels": [int(value.format), value.rows, value.columns, value.zeros,
                           _encode(value.data, tensors), _encode(value.offset, tensors)]}  # fmt: skip
    if is_dataclass(value):
        found = {f.name: _encode(getattr(value, f.name), tensors) for f in fields(value)}
        return {"kind": type(value).__name__, "fields": found}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    return value


def _decode(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return file.get_tensor(value["tensor"])
    if "panels" in value:
        format, rows, columns, zeros, data, offset = value["panels"]
        return Panels(Format(format), int(rows), int(columns), bool(zeros), _decode(data, file),
                      _decode(offset, file))  # fmt: skip
    return _KINDS[value["kind"]](**{k: _decode(v, file) for k, v in value["fields"].items()})
