"""A Hugging Face config that describes a slimmed model, so that plain from_pretrained loads it.

The config's own numbers are tried: those that held an old size, head counts, and ratios; a change
stays when a model built from the config (on the meta device, without memory) comes nearer to the
shapes wanted.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparseworks.weights.structured.attributes import HEADS
from sparseworks.weights.structured.backup import Change

__all__ = ["contradictions", "describe", "has_config"]

_HEAD_SIZE = re.compile(r"head_dim|head_size|d_kv|kv_channels")
Shapes = Mapping[str, tuple[int, ...]]


def has_config(model: nn.Module) -> bool:
    """Is this a Hugging Face model, built from a config?"""
    return hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "save_pretrained")


def describe(model: nn.Module, before: Shapes, after: Shapes) -> dict[str, Any] | None:
    """Config fields that turn the shapes `before` into `after`; None when no fields do.

    Args:
        model: a Hugging Face model with the shapes `before`, or sliced already.
        before: parameter shapes of a model built from `model.config` as it is.
        after: the shapes wanted.
    """
    config = copy.deepcopy(model.config)
    wrong = _distance(model, config, after)
    chosen: dict[str, Any] = {}
    ratios = {b / a for n in after for a, b in zip(before.get(n, ()), after[n]) if a != b}
    sizes = {(a, b) for n in after for a, b in zip(before.get(n, ()), after[n]) if a != b}
    sizes |= {(a // k, b // k) for a, b in sizes for k in (2, 3) if a % k == 0 and b % k == 0}
    while wrong:
        best: tuple[int, str, Any] | None = None
        for path, value in _candidates(config, sizes, ratios):
            if path in chosen:
                continue
            trial = copy.deepcopy(config)
            try:
                _put(trial, path, value)
            except Exception:  # configs that know their types refuse others, each in its own way
                continue
            left = _distance(model, trial, after)
            if left < wrong and (best is None or left < best[0]):
                best = (left, path, value)
        if best is None:
            return None
        wrong = best[0]
        _put(config, best[1], best[2])
        chosen[best[1]] = best[2]
    return chosen


def contradictions(model: nn.Module, changes: Sequence[Change]) -> list[str]:
    """Changed numbers of modules that a model built from the config would not have."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = type(model)(copy.deepcopy(model.config))
    last = {(c.module, c.attribute): c.after for c in changes}
    return [
        f"{path}.{name} is {value}"
        for (path, name), value in last.items()
        if getattr(built.get_submodule(path), name, value) != value
    ]


def _candidates(
    config: Any, sizes: set[tuple[int, int]], ratios: set[float]
) -> Iterator[tuple[str, Any]]:
    for path, value in _numbers(config):
        name = path.rpartition(".")[2]
        if _HEAD_SIZE.search(name):
            continue  # heads go whole, their size stays
        if name in HEADS or "head" in name:
            for ratio in ratios:
                new = _scaled(value, ratio)
                if new is not None:
                    yield path, new
        elif isinstance(value, float) or (isinstance(value, int) and "ratio" in name):
            if "ratio" in name:
                yield from ((path, value * r) for r in ratios)
        else:
            values = value if isinstance(value, list) else [value]
            table: dict[int, set[int]] = {}
            for a, b in sizes:
                table.setdefault(a, set()).add(b)
            if any(v in table for v in values):
                if isinstance(value, list):
                    yield path, [min(table.get(v, {v})) for v in values]
                else:
                    yield from ((path, b) for b in sorted(table[value]))
        if value is None and name in ("n_inner", "ffn_dim", "intermediate_size"):
            yield from ((path, b) for _, b in sorted(sizes))


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("vocab_size", "num_labels", "torch_dtype"):
            continue
        if isinstance(value, bool):
            continue
        if isinstance(value, (int, float)) or value is None:
            yield prefix + name, value
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            yield prefix + name, list(value)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _numbers(value, f"{prefix}{name}.")


def _scaled(value: Any, ratio: float) -> Any:
    values = value if isinstance(value, list) else [value]
    if not all(type(v) is int and v > 0 for v in values):
        return None
    new = [v * ratio for v in values]
    if any(abs(v - round(v)) > 1e-6 or round(v) < 1 for v in new):
        return None
    whole = [round(v) for v in new]
    return whole if isinstance(value, list) else whole[0]


def _put(config: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


def _distance(model: nn.Module, config: Any, after: Shapes) -> int:
    """Axes that differ from what is wanted; a config that builds nothing is far from it."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = type(model)(copy.deepcopy(config))
    except Exception:
        return 10**9
    found = {n: tuple(p.shape) for n, p in built.named_parameters()}
    if found.keys() != after.keys():
        return 10**8
    return sum(
        sum(a != b for a, b in zip(found[n], after[n])) + 100 * (len(found[n]) != len(after[n]))
        for n in after
    )
