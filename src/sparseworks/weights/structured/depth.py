"""Whole blocks: where the budget asks for more than widths can give, the depth shrinks.

A block is a child of a ModuleList or Sequential of several alike, and may go when the model runs
without it, its outputs as large as before (residual blocks whose input has its output's shape). Of
those goes the one whose absence changes the output f least,

    ||f(x) - f_without(x)|| / ||f(x)||  on the example,

and a Hugging Face config is told: the number of layers, lists with an entry per layer, the places
that attention modules keep for caches.

Source: the criterion is leave-one-out, as in Men et al. 2024, ShortGPT: Layers in Large Language
Models are More Redundant Than You Expect (there by the similarity of a block's input and output).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, SparseworksError
from sparseworks.core.masks import masks
from sparseworks.models.calls import Batch
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.checking import output_of
from sparseworks.weights.structured.configs import has_config

__all__ = ["blocks", "drop", "drop_least", "renamed"]

_PLACES = ("layer_idx", "layer_id", "layer_index")


def blocks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """(container, index) of every child that has siblings of its class and layers of its own."""
    for name, module in model.named_modules():
        if name and type(module) in (nn.ModuleList, nn.Sequential):
            kinds = [type(c) for c in module]
            for i, child in enumerate(module):
                composite = any(True for _ in child.children())
                weighty = any(True for _ in child.parameters())
                if composite and weighty and kinds.count(type(child)) > 1:
                    yield name, i


def drop(model: nn.Module, container: str, index: int, backup: Backup) -> dict[str, Any]:
    """Take one block out in place; returns the config fields that changed.

    Raises:
        InvalidArgument: the model has no such block, or its config cannot tell a depth without it.
    """
    if (container, index) not in set(blocks(model)):
        raise InvalidArgument(f"{type(model).__name__} has no block {container}.{index}")
    parent_name, _, attribute = container.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, attribute)
    rest = [c for i, c in enumerate(old) if i != index]
    new = nn.ModuleList(rest) if isinstance(old, nn.ModuleList) else nn.Sequential(*rest)
    backup.set(parent, attribute, new.train(old.training))
    for place, child in enumerate(rest):
        if place >= index:
            for module in child.modules():
                for name in _PLACES:
                    if getattr(module, name, None) == place + 1:
                        backup.set(module, name, place)
    if not has_config(model):
        return {}
    fields = _fields(model, container, len(rest) + 1, index)
    if fields is None:
        raise InvalidArgument(
            f"no config of {type(model).__name__} describes it without {container}.{index}"
        )
    for path, value in fields.items():
        backup.set(*_place(model.config, path), value)
    return fields


def drop_least(model: nn.Module, example: Batch, backup: Backup) -> tuple[str, int, dict[str, Any]]:
    """Take out the block that the output misses least.

    Returns:
        its container, its index, and the config fields that changed.

    Raises:
        InvalidArgument: no block may go.
    """
    if masks(model) is not None:
        raise InvalidArgument("the model has a mask record, which names its blocks: slim first")
    best: tuple[float, str, int] | None = None
    with evaluating(model):
        whole = output_of(model, example)
        for container, index in blocks(model):
            trial = Backup()
            try:
                drop(model, container, index, trial)
                found = output_of(model, example)
                if found.shape == whole.shape:
                    loss = float((found - whole).norm() / whole.norm().clamp_min(1e-30))
                    if best is None or loss < best[0]:
                        best = loss, container, index
            except (RuntimeError, ValueError, IndexError, TypeError, SparseworksError):
                continue  # the model does not run without this one
            finally:
                trial.restore()
    if best is None:
        raise InvalidArgument(f"{type(model).__name__} has no block that may go")
    return best[1], best[2], drop(model, best[1], best[2], backup)


def renamed(name: str, container: str, index: int) -> str | None:
    """A dotted name after a block has gone; None when it was inside of it."""
    prefix = f"{container}."
    if not name.startswith(prefix):
        return name
    place, dot, rest = name[len(prefix) :].partition(".")
    if not place.isdigit() or int(place) < index:
        return name
    return None if int(place) == index else f"{prefix}{int(place) - 1}{dot}{rest}"


def _fields(model: nn.Module, container: str, depth: int, index: int) -> dict[str, Any] | None:
    """Config fields that build what the model is now; None when no field does."""
    wanted = {n for n, _ in model.named_parameters()}
    before = _built(model, copy.deepcopy(model.config))
    if before is None:
        return None
    for path, number in _numbers(model.config, depth):
        fields = {**_lists(model.config, depth, index), path: number}
        trial = copy.deepcopy(model.config)
        for name, value in fields.items():
            setattr(*_place(trial, name), value)
        built = _built(model, trial)
        if built is None or {n for n, _ in built.named_parameters()} != wanted:
            continue
        old = [c for i, c in enumerate(before.get_submodule(container)) if i != index]
        new = list(built.get_submodule(container))
        if all(_settings(a) == _settings(b) for a, b in zip(old, new, strict=True)):
            return fields
    return None


def _built(model: nn.Module, config: Any) -> Any:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return type(model)(config)
    except Exception:
        return None


def _settings(block: nn.Module) -> list[tuple[str, str, Any]]:
    """What is not a weight in a block: a window's shift, say, that follows its place."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (path, name, value)
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in _PLACES
    ]


def _place(config: Any, path: str) -> tuple[Any, str]:
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return config, name


def _numbers(config: Any, depth: int, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields that hold the depth, each with one less; of lists of depths, one entry."""
    for name, value in vars(config).items():
        if type(value) is int and value == depth:
            yield prefix + name, depth - 1
        elif isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            for i, v in enumerate(value):
                if v == depth:
                    yield prefix + name, [*value[:i], depth - 1, *value[i + 1 :]]
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _numbers(value, depth, f"{prefix}{name}.")


def _lists(config: Any, depth: int, index: int, prefix: str = "") -> dict[str, Any]:
    """Lists with an entry per layer, without the entry of the one that goes."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth and all(type(v) is str for v in value):
            found[prefix + name] = [v for i, v in enumerate(value) if i != index]
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            found.update(_lists(value, depth, index, f"{prefix}{name}."))
    return found
