"""Sparsity, size and FLOPs per tensor of a model or of a checkpoint."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]

_WEIGHTS = re.compile(r"(weight|_proj|weight_[ih][hr](_l\d+(_reverse)?)?)$")


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks inspect`."""

    model: Annotated[str, tyro.conf.Positional] = ""
    """A checkpoint (file or folder), or a model as `prune` takes it."""
    all: bool = False
    """Also tensors that cannot be sparse (embeddings, norms, biases)."""
    json: bool = False
    """Print as JSON."""


def run(options: Options) -> dict[str, Any]:
    """Print a row per tensor and the totals."""
    if not options.model:
        raise InvalidArgument("no model given; for example: sparseworks inspect out/checkpoint")
    rows, left = _rows(options.model)
    prunable = [r for r in rows if r["flops_per_position"] is not None]
    totals = {
        "weights": sum(r["weights"] for r in prunable),
        "zeros": sum(r["zeros"] for r in prunable),
        "stored_bytes": sum(r["stored_bytes"] for r in rows),
        "dense_bytes": sum(r["dense_bytes"] for r in rows),
        "signed_zero_bytes": sum(r["signed_zero_bytes"] for r in rows),
        "flops_per_position": sum(r["flops_per_position"] for r in prunable),
        "dense_flops_per_position": sum(2 * r["weights"] for r in prunable),
    }
    totals["sparsity"] = totals["zeros"] / max(1, totals["weights"])
    shown = rows if options.all else prunable or rows
    result = {"model": options.model, "totals": totals, "tensors": shown, "skipped": left}
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        _show(result)
    return result


def _rows(name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row per stored tensor: from a checkpoint's file, else from the loaded model.

    Returns:
        The rows, and why tensors of two or more axes are not counted as weights.
    """
    from sparseworks.io import inspect as inspect_file
    from sparseworks.models.zoo.libraries import LIBRARIES

    path = Path(name)
    stored_so = path.suffix == ".safetensors" or any(path.glob("*.safetensors"))
    if stored_so and name.partition(":")[0] not in LIBRARIES:
        info = inspect_file(path, values=True)
        stored = [_row(t) for t in info.tensors]
        why = "its name does not tell that it is the weight of a layer"
        return stored, {
            r["name"]: why
            for r in stored
            if r["flops_per_position"] is None and len(r["shape"]) > 1
        }
    from sparseworks.cli.loading import load_model
    from sparseworks.models.views import find_prunable

    model = load_model(name).model
    found = find_prunable(model, torch_masked=True, required=False)
    prunable = found.by_name()
    rows = []
    for key, value in model.state_dict().items():
        mask = prunable[key].torch_mask if key in prunable else None
        zeros = int(((value if mask is None else value * mask) == 0).sum())
        size = value.numel() * value.element_size()
        rows.append(
            {
                "name": key,
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "layout": "dense",
                "weights": value.numel(),
                "zeros": zeros,
                "stored_bytes": size,
                "dense_bytes": size,
                "signed_zero_bytes": 0,
                "flops_per_position": 2 * (value.numel() - zeros) if key in prunable else None,
            }
        )
    return rows, found.reasons()


def _row(tensor: Any) -> dict[str, Any]:
    weights = math.prod(tensor.shape)
    zeros = round((tensor.sparsity or 0.0) * weights)
    named = "embed" not in tensor.name and bool(_WEIGHTS.search(tensor.name))
    matrix = len(tensor.shape) >= 2 and named
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "layout": tensor.layout,
        "weights": weights,
        "zeros": zeros,
        "stored_bytes": tensor.nbytes,
        "dense_bytes": tensor.dense_bytes,
        "signed_zero_bytes": tensor.signed_zero_bytes,
        "flops_per_position": 2 * (weights - zeros) if matrix else None,
    }


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from sparseworks.core.types import dense_lines
    from sparseworks.io.summary import signed_zero_note
    from sparseworks.report.text import megabytes

    table = Table()
    for column in ("tensor", "shape", "dtype", "layout", "sparsity", "stored", "FLOPs/position"):
        table.add_column(column, justify="left" if column in ("tensor", "layout") else "right")
    for r in result["tensors"]:
        flops = "" if r["flops_per_position"] is None else f"{r['flops_per_position']:,}"
        table.add_row(
            r["name"],
            "x".join(map(str, r["shape"])),
            r["dtype"],
            r["layout"],
            f"{r['zeros'] / max(1, r['weights']):.2%}",
            megabytes(r["stored_bytes"]),
            flops,
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for line in dense_lines(result["skipped"], "not counted"):
        console.print(line.strip(), markup=False)
    t = result["totals"]
    share = t["flops_per_position"] / max(1, t["dense_flops_per_position"])
    console.print(
        f"{t['sparsity']:.2%} of {t['weights']:,} weights are zero; "
        f"{megabytes(t['stored_bytes'])} stored, {megabytes(t['dense_bytes'])} dense; "
        f"{t['flops_per_position']:,} FLOPs per token or pixel, {share:.1%} of dense"
    )
    if note := signed_zero_note(t["signed_zero_bytes"], t["stored_bytes"]):
        console.print(f"{note}: save with signed_zeros=False to store +0.0")
