"""The numbers that modules keep beside their parameters, after those changed shape.

Known modules are set from their new parameters, and numbers that told a size when the model was
traced from what became of that size. Beside those, any module (attention, a gated MLP, an expert
bank) may hold widths and head counts of the parameters below it: head counts shrink with the
parameters of whole heads, widths where exactly one changed axis had that size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparseworks.models.coupling.numbers import Attribute
from sparseworks.models.recurrence import RECURRENT, gates_of
from sparseworks.weights.structured.backup import Backup, Change

__all__ = ["HEADS", "update"]

HEADS = {
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "heads",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_heads",
}
_WIDTH = re.compile(
    r"size|dim|width|features|channels|inner|hidden|embed|filters|planes|ffn|d_model|d_ff"
)
_NEVER = re.compile(
    r"kernel|window|patch|image|head_dim|head_size|key_value_proj|max_|vocab|chunk|pad|_idx|_id$"
    r"|stride|num_experts|seq|block_size"
)
_INNER = re.compile(r"all_head|split|inner|inter|ffn|mlp")
_PROJECTIONS = re.compile(r"(^|[._])(q|k|v|query|key|value|qkv|c_attn|q_proj|to_q|in_proj)([._]|$)")


def update(
    model: nn.Module,
    before: Mapping[str, tuple[int, ...]],
    told: Mapping[Attribute, int],
    backup: Backup,
) -> list[Change]:
    """Set every size in every module; returns what changed.

    Args:
        before: shapes of parameters and buffers before the cut.
        told: numbers that told sizes when the model was traced, with what they become.
    """
    changes: list[Change] = []

    def put(module: nn.Module, path: str, name: str, value: Any) -> None:
        old = getattr(module, name)
        if old != value:
            backup.set(module, name, value)
            changes.append(Change(path, name, old, value))

    traced = _traced(model, told)
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        known = _known(module, lambda n, dot=dot: before.get(dot + n))
        exact = {**traced.get(path, {}), **known}
        guessed = {} if known else _remembered(module, dot, before)
        for name, value in {**guessed, **exact}.items():
            put(module, path, name, value)
    return changes


def _traced(model: nn.Module, told: Mapping[Attribute, int]) -> dict[str, dict[str, Any]]:
    """module -> attribute -> value, tuples and lists put together of their entries."""
    found: dict[str, dict[str, Any]] = {}
    for attribute, value in told.items():
        fields = found.setdefault(attribute.module, {})
        if attribute.index is None:
            fields[attribute.name] = value
            continue
        whole = fields.get(attribute.name)
        if whole is None:
            whole = getattr(model.get_submodule(attribute.module), attribute.name)
        entries = list(whole)
        entries[attribute.index] = value
        fields[attribute.name] = type(whole)(entries)
    return found


def _known(module: nn.Module, before: Any) -> dict[str, Any]:
    """Sizes of the modules that torch and transformers define."""
    weight = getattr(module, "weight", None)
    if isinstance(module, RECURRENT):
        return _recurrent(module)
    if isinstance(module, nn.Linear):
        return {"out_features": weight.shape[0], "in_features": weight.shape[1]}  # type: ignore[union-attr]
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        old = before("weight") or tuple(weight.shape)  # type: ignore[union-attr]
        groups = module.groups
        if groups > 1:
            groups = groups * weight.shape[0] // old[0]  # type: ignore[union-attr]
        return {
            "groups": groups,
            "in_channels": weight.shape[0],  # type: ignore[union-attr]
            "out_channels": weight.shape[1] * groups,  # type: ignore[union-attr]
        }
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        old = before("weight") or tuple(weight.shape)  # type: ignore[union-attr]
        groups = module.groups
        if groups > 1 and old[1] == 1:
            groups = groups * weight.shape[0] // old[0]  # type: ignore[union-attr]
        return {
            "groups": groups,
            "out_channels": weight.shape[0],  # type: ignore[union-attr]
            "in_channels": weight.shape[1] * groups,  # type: ignore[union-attr]
        }
    if isinstance(module, nn.modules.batchnorm._NormBase):
        found = weight if weight is not None else module.running_mean
        return {"num_features": module.num_features if found is None else found.shape[0]}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {
            "normalized_shape": tuple(weight.shape)
            if weight is not None
            else (module.normalized_shape)
        }
    if isinstance(module, nn.GroupNorm) and weight is not None:
        old = before("weight") or tuple(weight.shape)
        groups = module.num_groups
        if groups > 1:
            groups = groups * weight.shape[0] // old[0]
        return {"num_channels": weight.shape[0], "num_groups": groups}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}  # type: ignore[union-attr]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        known = {"nf": weight.shape[1]}  # type: ignore[union-attr]
        return {**known, "nx": weight.shape[0]} if hasattr(module, "nx") else known  # type: ignore[union-attr]
    return {}


def _recurrent(module: nn.Module) -> dict[str, Any]:
    first = "_l0" if isinstance(module, nn.RNNBase) else ""
    w_ih, w_hh, w_hr = (getattr(module, f"weight_{k}{first}", None) for k in ("ih", "hh", "hr"))
    known = {"input_size": w_ih.shape[1], "hidden_size": w_hh.shape[0] // gates_of(module)}  # type: ignore[union-attr]
    return known if w_hr is None else {**known, "proj_size": w_hr.shape[0]}


def _remembered(
    module: nn.Module, dot: str, before: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Widths and head counts that a composite module remembers of what is below it."""
    changed: dict[int, set[int]] = {}
    inner: dict[int, set[int]] = {}
    stream: dict[int, set[int]] = {}
    same: set[int] = set()
    whole: set[int] = set()
    heads: set[tuple[int, int]] = set()
    for name, tensor in _near(module):
        old = before.get(dot + name)
        if old is None:
            continue
        for axis, (a, b) in enumerate(zip(old, tensor.shape)):
            outputs = axis == (1 if type(_owner(module, name)).__name__ == "Conv1D" else 0)
            outputs |= len(old) == 1
            projection = bool(_PROJECTIONS.search(name))
            if a == b:
                same.add(a)
                if projection and outputs:
                    whole |= {a, *(a // n for n in (2, 3) if a % n == 0)}
                continue
            tables = [changed]
            if projection:
                tables.append(inner if outputs else stream)
                if outputs:
                    heads.add((a, b))
            for table in tables:
                table.setdefault(a, set()).add(b)
                for parts in (2, 3) if outputs else ():  # packed projections and gates
                    if a % parts == 0 and b % parts == 0:
                        table.setdefault(a // parts, set()).add(b // parts)
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, bool) or not isinstance(value, int) or _NEVER.search(name):
            continue
        if name in HEADS:
            if heads:
                a, b = next(iter(heads))
                found[name] = value * b // a
        elif _WIDTH.search(name) or _INNER.search(name):
            if _INNER.search(name) and value in whole:
                continue
            own = inner if _INNER.search(name) else stream
            new = own.get(value) or changed.get(value, set())
            if len(new) == 1 and (value not in same or own.get(value) or _INNER.search(name)):
                found[name] = next(iter(new))
    return found


def _near(module: nn.Module) -> list[tuple[str, Any]]:
    """Parameters of a module, its children and theirs where those hold one layer only."""
    found = [(n, p) for n, p in module._parameters.items() if p is not None]
    for name, child in module.named_children():
        found += [(f"{name}.{n}", p) for n, p in child._parameters.items() if p is not None]
    return found


def _owner(module: nn.Module, name: str) -> nn.Module:
    path = name.rpartition(".")[0]
    return module.get_submodule(path) if path else module
