"""Decoders from their files, by mapping: nothing is packed, measured or compared again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.engine.decoder import spec as specs
from sparseworks.engine.decoder.native import NativeDecoder
from sparseworks.engine.decoder.packing import Line, Report
from sparseworks.engine.decoder.rotary import Rotary
from sparseworks.engine.decoder.saving import FILE_FORMAT
from sparseworks.io.sealed import check_seal
from sparseworks.kernels.panels import Format, Panels
from sparseworks.models.active import ActiveInputs

__all__ = ["load_decoder"]

_KINDS = {
    c.__name__: c
    for c in (specs.AttentionSpec, specs.LayerSpec, specs.LinearSpec, specs.MixtureSpec,
              specs.MlpSpec, specs.ModelSpec, specs.NormSpec, ActiveInputs, Rotary)
}  # fmt: skip


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
            metadata = file.metadata() or {}
            if "sparseworks_decoder" not in metadata:
                raise CheckpointError(f"{path}: not a decoder that sparseworks saved")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            check_seal(path, tensors, metadata)
            about = json.loads(metadata["sparseworks_decoder"])
            if about.get("format") != FILE_FORMAT:
                raise CheckpointError(
                    f"{path}: format {about.get('format')}, this reads {FILE_FORMAT}"
                )
        spec = _decode(about["spec"], tensors)
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


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "panels" in value:
        format, rows, columns, zeros, data, offset = value["panels"]
        return Panels(Format(format), int(rows), int(columns), bool(zeros), _decode(data, tensors),
                      _decode(offset, tensors))  # fmt: skip
    return _KINDS[value["kind"]](**{k: _decode(v, tensors) for k, v in value["fields"].items()})
