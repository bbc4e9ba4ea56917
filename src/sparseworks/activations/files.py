"""Gates as a safetensors file: their tensors, all else in its header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseworks.activations.chess import OutputGate
from sparseworks.activations.delta import DeltaGate
from sparseworks.activations.r_sparse import LowRankGate
from sparseworks.activations.rotation import RotatedGate
from sparseworks.activations.spark import StatisticalGate
from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.io.atomic import atomic_file
from sparseworks.io.sealed import check_seal, write_sealed
from sparseworks.models.active import ActiveInputs, Gate, InputGate, RuledGate

__all__ = ["read_gates", "write_gates"]

_KEY = "sparseworks_activations"
_FORMAT = 1


def write_gates(path: str | os.PathLike[str], method: str, options: Mapping[str, Any],
                found: Mapping[str, Gate]) -> None:  # fmt: skip
    """Write gates by the names of their modules."""
    tensors: dict[str, Tensor] = {}
    lines = {}
    for name, gate in found.items():
        parts: dict[str, Tensor | None] = {}
        line: dict[str, Any] = {"kind": type(gate).__name__}
        if isinstance(gate, OutputGate):
            parts["tau"] = gate.tau
        elif isinstance(gate, StatisticalGate):
            line["k"] = gate.k
        elif isinstance(gate, DeltaGate):
            line |= {"frames": gate.frames, "weight": gate.weight, "reverse": gate.reverse}
            parts["theta"] = gate.theta
        elif isinstance(gate, RuledGate):
            rule = gate.rule
            line |= {"threshold": rule.threshold, "keep": rule.keep, "share": rule.share}
            parts["weight"] = rule.weight
            for attribute in ("turn", "down", "up"):
                parts[attribute] = getattr(gate, attribute, None)
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous().clone()
        lines[name] = line
    about = {"format": _FORMAT, "method": method, "options": dict(options), "gates": lines}
    with atomic_file(Path(path)) as file:
        write_sealed(tensors, file, {_KEY: json.dumps(about)})


def read_gates(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, Gate]]:
    """(method, options, gates by name).

    Raises:
        CheckpointError: no such file, not gates, damaged, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise CheckpointError(f"{path}: not gates that sparseworks saved")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            check_seal(path, tensors, metadata)
            about = json.loads(metadata[_KEY])
            if about.get("format") != _FORMAT:
                raise CheckpointError(f"{path}: format {about.get('format')}, this reads {_FORMAT}")
        found = {n: _gate(n, line, tensors) for n, line in about["gates"].items()}
        return str(about["method"]), dict(about["options"]), found
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError,
            InvalidArgument) as error:  # fmt: skip
        raise CheckpointError(f"{path}: damaged, or not gates: {error}") from error


def _gate(name: str, line: dict[str, Any], tensors: Mapping[str, Tensor]) -> Gate:
    if line["kind"] == "OutputGate":
        return OutputGate(tensors[f"{name}.tau"])
    if line["kind"] == "StatisticalGate":
        return StatisticalGate(int(line["k"]))
    if line["kind"] == "DeltaGate":
        return DeltaGate(
            tensors[f"{name}.theta"], int(line["frames"]), float(line["weight"]), line["reverse"]
        )
    rule = ActiveInputs(float(line["threshold"]), int(line["keep"]), tensors.get(f"{name}.weight"),
                        float(line["share"]))  # fmt: skip
    if line["kind"] == "InputGate":
        return InputGate(rule)
    if line["kind"] == "RotatedGate":
        return RotatedGate(rule, tensors[f"{name}.turn"])
    if line["kind"] == "LowRankGate":
        return LowRankGate(rule, tensors[f"{name}.down"], tensors[f"{name}.up"])
    raise ValueError(f"a gate of kind {line['kind']!r}")
