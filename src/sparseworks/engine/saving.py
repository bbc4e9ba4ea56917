"""A compiled plan as one file: tensors in safetensors, everything else as JSON in its header.

Weights are stored as they are in the model (dense values of the kept taps only matter at load time,
where zeros are skipped again); nothing is measured when a plan is loaded.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from sparseworks.core.errors import CheckpointError
from sparseworks.engine import ir
from sparseworks.engine.graph import Signature
from sparseworks.engine.part import Part
from sparseworks.engine.plan import Plan
from sparseworks.engine.steps import Call, decode, encode
from sparseworks.io.atomic import atomic_file
from sparseworks.kernels.native import available

__all__ = ["read_plan", "save_plan"]

_FORMAT = 2
_OPS = {c.__name__: c for c in ir.Op.__subclasses__()}


def save_plan(plan: Plan, path: str | os.PathLike[str], error: float, times: Any) -> None:
    """Write a plan.

    Raises:
        CheckpointError: outputs of a type that cannot be named in JSON, or the file cannot be
            written.
    """
    writer = _Writer()
    s = plan.signature
    try:
        specs = [pytree.treespec_dumps(spec) for spec in (s.in_spec, s.out_spec)]
    except NotImplementedError as problem:
        raise CheckpointError(f"the model's inputs or outputs cannot be saved: {problem}") from None
    about = {
        "format": _FORMAT,
        "error": error,
        "times": times,
        "inputs": s.inputs,
        "outputs": encode(s.outputs),
        "keywords": s.keywords,
        "accepts": encode(s.accepts),
        "specs": specs,
        "constants": {n: writer.tensor(t) for n, t in plan.constants.items()},
        "steps": [
            {"call": [t.name, t.target, encode(t.args), encode(t.kwargs)]}
            if isinstance(t, Call)
            else {"part": writer.part(t)}
            for t in plan.steps
        ],
    }
    with atomic_file(Path(path)) as file:
        save_file(writer.tensors, file, {"sparseworks_plan": json.dumps(about)})


def read_plan(
    path: str | os.PathLike[str], threads: int | None = None
) -> tuple[Plan, float, dict[str, float]]:
    """What `save_plan` was given: the plan, its error and its times.

    Args:
        path: of the file.
        threads: of the native kernels; None: as many as torch uses.

    Raises:
        CheckpointError: not a plan, of another version, or no native kernels to run it.
    """
    if not available():
        raise CheckpointError(f"{path}: a plan needs the native kernels, which are not built here")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("sparseworks_plan")
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    if text is None:
        raise CheckpointError(f"{path}: not a compiled plan; write one with `compiled.save(path)`")
    try:
        about = json.loads(text)
        if about["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: a plan of format {about['format']}, this version reads {_FORMAT}: "
                "compile the model again"
            )
        count = torch.get_num_threads() if threads is None else threads
        plan = _read(about, tensors, count)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: a damaged plan ({type(error).__name__}: {error})") from None
    return plan, about["error"], about["times"]


class _Writer:
    """Values by number, tensors by key."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[ir.Value, int] = {}

    def tensor(self, tensor: Tensor) -> str:
        key = f"t{len(self.tensors)}"
        self.tensors[key] = tensor.detach().contiguous().clone()
        return key

    def part(self, part: Part) -> dict[str, Any]:
        self.values = {}
        ops = [[type(op).__name__, self._fields(op)] for op in part.ops]
        values = [[v.kind, v.channels] for v in self.values]
        return {"kind": part.kind, "ops": ops, "values": values, "inputs": part.inputs,
                "masks": part.masks, "outputs": part.outputs}  # fmt: skip

    def _fields(self, thing: Any) -> dict[str, Any]:
        return {f.name: self._encoded(getattr(thing, f.name)) for f in fields(thing)}

    def _encoded(self, value: Any) -> Any:
        if isinstance(value, ir.Value):
            return {"value": self.values.setdefault(value, len(self.values))}
        if isinstance(value, ir.Heads):
            return {"heads": self._fields(value)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value)}
        if isinstance(value, (list, tuple)):
            return [self._encoded(v) for v in value]
        return int(value) if isinstance(value, IntEnum) else value


def _read(about: dict[str, Any], tensors: dict[str, Tensor], threads: int) -> Plan:
    in_spec, out_spec = map(pytree.treespec_loads, about["specs"])
    signature = Signature(
        about["inputs"], decode(about["outputs"]), about["keywords"], in_spec, out_spec,
        decode(about["accepts"]),
    )  # fmt: skip
    steps: list[Call | Part] = []
    for step in about["steps"]:
        if "call" in step:
            name, target, args, kwargs = step["call"]
            steps.append(Call(name, target, decode(args), decode(kwargs)))
        else:
            steps.append(_read_part(step["part"], tensors, threads))
    return Plan(signature, steps, {n: tensors[k] for n, k in about["constants"].items()})


def _read_part(held: dict[str, Any], tensors: dict[str, Tensor], threads: int) -> Part:
    values = [ir.Value(kind, channels) for kind, channels in held["values"]]

    def decoded(value: Any) -> Any:
        if isinstance(value, list):
            return [decoded(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "value":
            return values[content]
        if kind == "tensor":
            return tensors[content]
        return ir.Heads(**{k: decoded(v) for k, v in content.items()})

    ops = []
    for name, content in held["ops"]:
        given = {k: decoded(v) for k, v in content.items()}
        if "activation" in given:
            given["activation"] = ir.Activation(given["activation"])
        if "precision" in given:
            given["precision"] = ir.Precision(given["precision"])
        ops.append(_OPS[name](**given))
    return Part(held["kind"], ops, held["inputs"], held["masks"], held["outputs"], threads)
