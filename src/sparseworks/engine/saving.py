"""A compiled plan as one file: tensors in safetensors, everything else as JSON in its header.

Weights are those of the model, without their zeros where that is less; they are whole again when a
plan is loaded, and packed as compiling packed them. Nothing is measured then.
"""

from __future__ import annotations

import contextlib
import copyreg
import importlib
import json
import os
import re
from dataclasses import fields
from enum import IntEnum
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from torch.utils import _pytree as pytree

from sparseworks.core.errors import CheckpointError
from sparseworks.engine import graph, ir
from sparseworks.engine.attributes import Attributes
from sparseworks.engine.binding import UNKNOWN, Binding
from sparseworks.engine.part import Part
from sparseworks.engine.plan import Plan
from sparseworks.engine.recent import LIMIT
from sparseworks.engine.steps import Call, decode, encode
from sparseworks.io.atomic import atomic_file
from sparseworks.io.sealed import check_seal, write_sealed
from sparseworks.io.thinning import thickened, thinned
from sparseworks.kernels.native import available

__all__ = ["read_plan", "save_plan", "unpacked"]

_FORMAT = 6  # 5 has whole tensors only
_KINDS = (
    Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL,
    Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD,
)  # fmt: skip
_OPS = {c.__name__: c for c in ir.Op.__subclasses__()}


def save_plan(
    plan: Plan, path: str | os.PathLike[str], error: float, times: Any, shown: Attributes
) -> None:
    """Write a plan, and what its compiled model shows.

    Raises:
        CheckpointError: outputs of a type that cannot be named in JSON, or the file cannot be
            written.
    """
    about, tensors = _described(plan)
    odd = next((s for s in about["specs"] if not isinstance(s, str)), None)
    if odd is not None:
        raise CheckpointError(
            f"the model's inputs or outputs cannot be saved: a type in {odd} is not registered in "
            "torch.utils._pytree with a serialized_type_name"
        )
    tensors, thin = thinned(tensors)
    about |= {
        "format": _FORMAT,
        "thin": thin,
        "error": error,
        "times": times,
        "shown": shown.to_json(),
    }
    with atomic_file(Path(path)) as file:
        write_sealed(tensors, file, {"sparseworks_plan": json.dumps(about)})


def _packed(plan: Plan) -> tuple[dict[str, Any], bytes, int, int]:
    """A plan as pickle holds it.

    Tensors are bytes: pickled as tensors, their memory would move to where processes share it, from
    under the programs that read it.
    """
    about, tensors = _described(plan)
    return about, save(tensors), plan.parts[0].threads, plan.cache_bytes


def unpacked(about: dict[str, Any], content: bytes, threads: int, cache_bytes: int) -> Plan:
    """The inverse of `_packed`, named by pickles."""
    return _read(about, load(content), threads, cache_bytes)


copyreg.pickle(Plan, lambda plan: (unpacked, _packed(plan)))


def _described(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A plan as JSON (but for specs that have no name there) and tensors."""
    writer, s = _Writer(), plan.signature
    about = {
        "binding": _of_binding(s.binding),
        "inputs": s.inputs,
        "outputs": encode(s.outputs),
        "accepts": encode(s.accepts),
        "guards": s.guards,
        "specs": [_of_spec(s.in_spec), _of_spec(s.out_spec)],
        "constants": {n: writer.tensor(t) for n, t in plan.constants.items()},
        "steps": [
            {"call": [t.name, t.target, encode(t.args), encode(t.kwargs)]}
            if isinstance(t, Call)
            else {"part": writer.part(t)}
            for t in plan.steps
        ],
    }
    return about, writer.tensors


def _of_binding(binding: Binding) -> dict[str, Any]:
    parameters = []
    for p in binding.signature.parameters.values():
        default: list[Any] = []
        if p.default is not p.empty:
            with contextlib.suppress(CheckpointError):
                default = [encode(p.default)]
        parameters.append([p.name, _KINDS.index(p.kind), p.default is not p.empty, default])
    options = {k: v for k, v in binding.options.items() if v is None or isinstance(v, bool)}
    return {"parameters": parameters, "slots": binding.slots, "options": options}


def _read_binding(held: dict[str, Any]) -> Binding:
    parameters = []
    for name, kind, optional, default in held["parameters"]:
        value = (decode(default[0]) if default else UNKNOWN) if optional else Parameter.empty
        parameters.append(Parameter(name, _KINDS[kind], default=value))
    return Binding(Signature(parameters), held["slots"], held["options"])


def read_plan(
    path: str | os.PathLike[str], threads: int | None = None, cache_bytes: int = LIMIT
) -> tuple[Plan, float, dict[str, float], Attributes]:
    """What `save_plan` was given: the plan, its error and its times, and what is shown.

    Args:
        path: of the file.
        threads: of the native kernels; None: as many as torch uses.
        cache_bytes: of what is kept for sizes that were met.

    Raises:
        CheckpointError: not a plan, of another version, or no native kernels to run it.
    """
    if not available():
        raise CheckpointError(f"{path}: a plan needs the native kernels, which are not built here")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from None
    if "sparseworks_plan" not in metadata:
        raise CheckpointError(f"{path}: not a compiled plan; write one with `compiled.save(path)`")
    check_seal(path, tensors, metadata)
    try:
        about = json.loads(metadata["sparseworks_plan"])
        if about["format"] not in (5, _FORMAT):
            raise CheckpointError(
                f"{path}: a plan of format {about['format']}, this version reads 5 and {_FORMAT}: "
                "compile the model again"
            )
        tensors = thickened(tensors, dict(about.get("thin", {})))
        count = torch.get_num_threads() if threads is None else threads
        plan = _read(about, tensors, count, cache_bytes)
        return plan, about["error"], about["times"], Attributes.from_json(about["shown"])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: a damaged plan ({type(error).__name__}: {error})") from None
    except (NotImplementedError, ImportError) as error:
        raise CheckpointError(
            f"{path}: a type of the model's inputs or outputs is not known here ({error}); import "
            "the module that defines it first"
        ) from None


def _of_spec(spec: Any) -> Any:
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError:
        return spec  # pickle knows its type by its place


def _spec(held: Any) -> Any:
    """How arguments or outputs are nested; types of transformers are imported."""
    if not isinstance(held, str):
        return held
    try:
        return pytree.treespec_loads(held)
    except NotImplementedError:
        for name in re.findall(r'"(transformers\.[\w.]+)\.\w+"', held):
            importlib.import_module(name)
        return pytree.treespec_loads(held)


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
                "masks": part.masks, "biases": part.biases, "outputs": part.outputs}  # fmt: skip

    def _fields(self, thing: Any) -> dict[str, Any]:
        return {f.name: self._encoded(getattr(thing, f.name)) for f in fields(thing)}

    def _encoded(self, value: Any) -> Any:
        if isinstance(value, ir.Value):
            return {"value": self.values.setdefault(value, len(self.values))}
        if isinstance(value, ir.Heads | ir.Moved):
            return {type(value).__name__.lower(): self._fields(value)}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value)}
        if isinstance(value, (list, tuple)):
            return [self._encoded(v) for v in value]
        return int(value) if isinstance(value, IntEnum) else value


def _read(
    about: dict[str, Any], tensors: dict[str, Tensor], threads: int, cache_bytes: int
) -> Plan:
    in_spec, out_spec = map(_spec, about["specs"])
    signature = graph.Signature(
        _read_binding(about["binding"]), about["inputs"], decode(about["outputs"]),
        in_spec, out_spec, decode(about["accepts"]), about["guards"],
    )  # fmt: skip
    steps: list[Call | Part] = []
    for step in about["steps"]:
        if "call" in step:
            name, target, args, kwargs = step["call"]
            steps.append(Call(name, target, decode(args), decode(kwargs)))
        else:
            steps.append(_read_part(step["part"], tensors, threads))
    constants = {n: tensors[k] for n, k in about["constants"].items()}
    return Plan(signature, steps, constants, cache_bytes)


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
        made = ir.Heads if kind == "heads" else ir.Moved
        return made(**{k: decoded(v) for k, v in content.items()})

    ops = []
    for name, content in held["ops"]:
        given = {k: decoded(v) for k, v in content.items()}
        if "activation" in given:
            given["activation"] = ir.Activation(given["activation"])
        if "precision" in given:
            given["precision"] = ir.Precision(given["precision"])
        ops.append(_OPS[name](**given))
    return Part(held["kind"], ops, held["inputs"], held["masks"], held["outputs"], threads,
                held["biases"])  # fmt: skip
