"""Transformers folders with integers for weights, which compressed-tensors and what loads through
it (transformers, vLLM) reads.

A weight w of a group of columns that share the scale s becomes the integer

    q = clamp(round(w / s), -(2^(bits-1) - 1), 2^(bits-1) - 1)    and comes back as    s q

so a zero stays a zero: there is no zero point. s is r max|w| / (2^(bits-1) - 1) with the r of
`RATIOS` that leaves the least squared error. Zeros are stored like any other weight; no scheme here
skips them.

| scheme | bits | a scale for | stored |
| --- | --- | --- | --- |
| pack-quantized | 4 or 8 | `group` columns of a row, or a row | 32 / bits integers in an int32 |
| int-quantized | 8 | a row | int8 |

Activations are not quantized in either.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.io.folders import require_transformers_model, write_plain_folder
from sparseworks.io.gather import unwrap
from sparseworks.kernels.grids import least_error
from sparseworks.models.views import find_prunable

__all__ = ["RATIOS", "SCHEMES", "QuantizedFolder", "export_quantized", "pack", "quantize"]

SCHEMES = ("pack-quantized", "int-quantized")
RATIOS = tuple(1 - i / 50 for i in range(21))  # of the largest weight: 1, 0.98, ..., 0.6
_SLICE = 1 << 22  # weights that are rounded at once


@dataclass(frozen=True)
class QuantizedFolder:
    """What was written.

    Attributes:
        path: of the folder.
        tensors: names of the weights that are integers there.
        skipped: name -> why a weight of two or more axes is not.
        bytes: of the weight files.
    """

    path: Path
    tensors: tuple[str, ...]
    skipped: dict[str, str]
    bytes: int


@torch.no_grad()
def export_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    scheme: str = "pack-quantized",
    *,
    bits: int | None = None,
    group: int | None = None,
    tokenizer: Any = None,
) -> QuantizedFolder:
    """Write a transformers model with its prunable Linear weights as integers.

    Args:
        model: of transformers, of any floating dtype, which that of the scales is.
        path: of the folder; plain `from_pretrained` loads it where compressed-tensors is installed.
        scheme: one of `SCHEMES`.
        bits: None: 4 packed, else 8.
        group: columns that share a scale; 0: a row; None: 128 packed, else 0. Weights whose columns
            do not divide by it stay as they are.
        tokenizer: as in `save`.

    Returns:
        Where it is, what was rounded, and what was not and why.

    Raises:
        InvalidArgument: a scheme, bits, group or path that cannot be used; nothing was written.
        ModelError: the model is quantized, has no such weight, or one that is not finite.
        CheckpointError: the place cannot be written.
    """
    path, model = Path(path), unwrap(model)
    bits, group = _checked(scheme, bits, group)
    require_transformers_model(model, path)
    modules, skipped = _chosen(model, group)
    state = dict(model.state_dict())
    for name, module in modules.items():
        weight = state.pop(f"{name}.weight")
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{name}.weight: holds NaN or Inf, which no integer stands for")
        codes, scale = quantize(weight, bits, group)
        state[f"{name}.weight_scale"] = scale
        if scheme == "pack-quantized":
            state[f"{name}.weight_packed"] = pack(codes, bits)
            state[f"{name}.weight_shape"] = torch.tensor(module.weight.shape)
        else:
            state[f"{name}.weight"] = codes
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    described = _described(scheme, bits, group, [n for n in linear if n not in modules])
    with write_plain_folder(model, path, tokenizer, state) as temporary:
        file = temporary / "config.json"
        written = {**json.loads(file.read_text()), "quantization_config": described}
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    return QuantizedFolder(path, tuple(f"{n}.weight" for n in modules), skipped, size)


def _checked(scheme: str, bits: int | None, group: int | None) -> tuple[int, int]:
    if scheme not in SCHEMES:
        raise InvalidArgument(f"scheme={scheme!r}: use one of {', '.join(SCHEMES)}")
    packed = scheme == "pack-quantized"
    bits = (4 if packed else 8) if bits is None else bits
    group = (128 if packed else 0) if group is None else group
    if bits not in ((4, 8) if packed else (8,)):
        raise InvalidArgument(f"bits={bits}: {scheme} has {'4 or 8' if packed else '8'}")
    if group < 0 or (group and not packed):
        raise InvalidArgument(f"group={group}: {scheme} takes " + (
            "columns that share a scale, or 0 for a scale a row" if packed else "a scale a row (0)"
        ))  # fmt: skip
    return bits, group


def _chosen(model: nn.Module, group: int) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Name -> module of the weights to be rounded, and why others are not."""
    found = find_prunable(model)
    skipped = found.reasons()
    modules: dict[str, nn.Linear] = {}
    for view in found.views:
        module = view.module
        if view.layout.startswith("experts"):
            raise ModelError(
                f"{view.name}: a bank of experts, which transformers does not load beside integers"
            )
        if type(module) is not nn.Linear:
            skipped[view.name] = "not the weight of a Linear layer"
        elif group and module.in_features % group:
            skipped[view.name] = f"{module.in_features} columns do not divide by {group}"
        else:
            modules[view.module_name] = module
    if not modules:
        name, reason = next(iter(skipped.items()))
        raise ModelError(f"{type(model).__name__} has no weight to round ({name}: {reason})")
    return modules, skipped


def quantize(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight `[rows, columns]`.

    Args:
        weight: floating, finite; its columns divide by `group`.
        bits: of an integer.
        group: columns that share a scale; 0: a row.

    Returns:
        int8 `[rows, columns]`, and scales in the dtype of the weight `[rows, columns / group]`.
    """
    rows, columns = weight.shape
    width = group or columns
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // width, dtype=weight.dtype)
    step = max(1, _SLICE // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].detach().float().cpu()
        made, scale = _rounded(part.view(len(part), -1, width), bits, weight.dtype)
        codes[start : start + step] = made.view(len(part), columns)
        scales[start : start + step] = scale.view(len(part), -1)
    return codes, scales


def _rounded(w: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[rows, groups, width]` fp32 -> int8 of that shape and `[rows, groups]` scales."""
    top = 2 ** (bits - 1) - 1
    largest, least = w.abs().amax(-1), torch.finfo(dtype).tiny
    # rounded to the dtype they are stored in before they divide
    scales = ((largest * (ratio / top)).clamp_min(least).to(dtype) for ratio in RATIOS)
    return least_error(w, scales, lambda w, s: (w / s.float()[..., None]).round().clamp(-top, top))


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 `[rows, columns]` -> int32 `[rows, ceil(columns bits / 32)]`.

    Integers are shifted to be unsigned (by 2^(bits-1)); the first is in the lowest bits.
    """
    each = 32 // bits
    rows, columns = codes.shape
    words = -(-columns // each)
    shifted = torch.zeros(rows, words * each, dtype=torch.int64)
    shifted[:, :columns] = codes.to(torch.int64) + (1 << (bits - 1))
    places = torch.arange(each) * bits
    packed = (shifted.view(rows, words, each) << places).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def _described(scheme: str, bits: int, group: int, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "mse",
        "strategy": "group" if group else "channel", "group_size": group or None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": scheme,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "format": scheme,
                "input_activations": None, "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }  # fmt: skip
