"""What a compiled model shows of the model it was made from: its config and other attributes.

The weights and modules of the model are gone; its class and the values that it held are kept.
Methods and properties run on the compiled model, so that a method that only calls the model works.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparseworks.core.errors import CheckpointError, MissingDependency
from sparseworks.core.masks import Masks
from sparseworks.engine.steps import decode, encode

__all__ = ["Attributes"]

_MISSING = object()
_OWN = frozenset((*vars(nn.Module()), "forward"))


class Attributes:
    """Attributes of a model.

    Args:
        name: of its class.
        values: what it held, but for tensors and modules.
        parts: names of its tensors and modules.
        dtype: of its weights.
        kind: its class, or the name of one of transformers; None where there is none.
    """

    def __init__(
        self,
        name: str = "model",
        values: Mapping[str, Any] = types.MappingProxyType({}),
        parts: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        kind: type | str | None = None,
    ) -> None:
        self.name, self.values, self.parts = name, dict(values), tuple(parts)
        self.dtype, self.kind = dtype, kind

    @classmethod
    def of(cls, model: nn.Module) -> Attributes:
        values = {k: v for k, v in vars(model).items() if k not in _OWN and _apart(v)}
        parts = (*model._modules, *model._parameters, *model._buffers)
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        return cls(type(model).__name__, values, parts, next(floats, torch.float32), type(model))

    def get(self, owner: nn.Module, name: str) -> Any:
        """An attribute, as `owner` shows it.

        Raises:
            AttributeError: the model has none of this name, or it is a part that is gone.
        """
        found = self.values.get(name, _MISSING)
        if isinstance(found, _Config):
            found = self.values[name] = found.made()
        if found is _MISSING and self.kind is not None:
            if isinstance(self.kind, str):
                self.kind = _of_transformers(self.kind, "PreTrainedModel")
            found = inspect.getattr_static(self.kind, name, _MISSING)
            if found is not _MISSING and hasattr(type(found), "__get__"):
                return found.__get__(owner, self.kind)
        if found is not _MISSING:
            return found
        if name in self.parts:
            raise AttributeError(
                f"{name!r} is a part of the {self.name}, and a compiled model has no parts: ask "
                "the model it was made from"
            )
        raise AttributeError(f"neither a compiled model nor {self.name} has an attribute {name!r}")

    def __deepcopy__(self, memo: Any) -> Attributes:
        values = copy.deepcopy(self.values, memo)
        return Attributes(self.name, values, self.parts, self.dtype, self.kind)

    def __getstate__(self) -> dict[str, Any]:
        """What another process can read: a class that is found by its name, values that pickle."""
        values = {k: v for k, v in self.values.items() if _pickles(v)}
        kind = self.kind if _pickles(self.kind) else None
        return {**vars(self), "values": values, "kind": kind}

    def to_json(self) -> dict[str, Any]:
        """What a file can hold: plain values, and the config and class of transformers by name."""
        made: dict[str, Any] = {
            "name": self.name, "values": {}, "parts": self.parts, "dtype": encode(self.dtype),
        }  # fmt: skip
        for key, value in self.values.items():
            if isinstance(value, _Config):
                made["config"] = [value.name, value.fields]
            elif hasattr(value, "to_json_string") and key == "config":
                fields = json.loads(value.to_json_string(use_diff=False))
                made["config"] = [type(value).__name__, fields]
            else:
                with contextlib.suppress(CheckpointError, TypeError, ValueError):
                    made["values"][key] = json.loads(json.dumps(encode(value)))
        if isinstance(self.kind, str) or (self.kind and _belongs_to_transformers(self.kind)):
            made["class"] = self.name
        return made

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Attributes:
        """The inverse; classes are looked up in transformers alone, when they are asked for."""
        values = {k: decode(v) for k, v in made["values"].items()}
        if "config" in made:
            values["config"] = _Config(*made["config"])
        return cls(made["name"], values, made["parts"], decode(made["dtype"]), made.get("class"))


class _Config:
    """A config of transformers as a file holds it."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name, self.fields = name, fields

    def made(self) -> Any:
        kind = _of_transformers(self.name, "PreTrainedConfig")
        return kind.from_dict(dict(self.fields))


def _of_transformers(name: str, base: str) -> Any:
    """A class of transformers by its name, or the base of its kind where it has none."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency(
            f"{name} is a class of transformers: pip install 'sparseworks[hf]'"
        ) from error
    root = getattr(transformers, base)
    found = getattr(transformers, name, root)
    return found if isinstance(found, type) and issubclass(found, root) else root


def _belongs_to_transformers(kind: Any) -> bool:
    library = sys.modules.get("transformers")
    return library is not None and getattr(library, kind.__name__, None) is kind


def _apart(value: Any) -> bool:
    """Whether a value is none of the model's tensors, modules and masks, and holds none of them."""
    held = (getattr(value, "__self__", None), *pytree.tree_leaves(value))
    return not any(isinstance(v, Tensor | nn.Module | Masks) for v in held)


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a class raises that cannot be pickled
        return False
    return True
