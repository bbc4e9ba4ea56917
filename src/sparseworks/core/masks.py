"""Masks are part of a model: a checked, bit-packed record of which weights are kept.

A zero is not the same as a masked weight: a regrown weight starts at 0 and is kept. So the record
lives beside the weights, travels with `copy.deepcopy`, and is what `save`, `"fixed"` fine-tuning
and later methods start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError

__all__ = ["MaskEntry", "Masks", "attach", "masks", "pack_bits", "unpack_bits"]

_ATTRIBUTE = "_sparseworks_masks"
_MAGIC = 0x0102040810204080  # gathers the low bits of 8 bytes into the top byte
_SLICE = 1 << 24


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 of ceil(n / 8) bytes: bit i of byte j is element 8 j + i of the flat bool mask."""
    flat = mask.reshape(-1).cpu()
    packed = torch.empty((flat.numel() + 7) // 8, dtype=torch.uint8)
    for start in range(0, flat.numel(), _SLICE):
        part = flat[start : start + _SLICE]
        if pad := -part.numel() % 8:
            part = torch.cat([part, part.new_zeros(pad)])
        words = part.contiguous().view(torch.int64) * _MAGIC
        packed[start // 8 : start // 8 + words.numel()] = (words >> 56).to(torch.uint8)
    return packed


def _byte_table() -> Tensor:
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64).view(-1)


def unpack_bits(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of this shape from its packed bytes (the inverse of `pack_bits`).

    Raises:
        InvalidArgument: the number of bytes does not fit the shape.
    """
    count = math.prod(shape)
    if packed.numel() != (count + 7) // 8 or packed.dtype != torch.uint8:
        raise InvalidArgument(
            f"a mask of shape {list(shape)} takes {(count + 7) // 8} bytes, not {packed.numel()}"
        )
    table = _byte_table()
    mask = torch.empty(packed.numel() * 8, dtype=torch.bool)
    for start in range(0, packed.numel(), _SLICE // 8):
        part = table[packed[start : start + _SLICE // 8].int()]
        mask[start * 8 : start * 8 + part.numel() * 8] = part.view(torch.bool)
    return mask[:count].view(tuple(shape))


@dataclass(frozen=True)
class MaskEntry:
    """The mask of one parameter."""

    packed: Tensor
    shape: tuple[int, ...]
    kept: int
    pattern: str = "unstructured"

    @classmethod
    def of(cls, mask: Tensor, pattern: str = "unstructured") -> MaskEntry:
        if mask.dtype != torch.bool:
            raise InvalidArgument(f"a mask is boolean, not {mask.dtype}")
        return cls(pack_bits(mask), tuple(mask.shape), int(torch.count_nonzero(mask)), str(pattern))

    @property
    def mask(self) -> Tensor:
        """The bool mask on the CPU, True = kept."""
        return unpack_bits(self.packed, self.shape)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.kept / max(1, math.prod(self.shape))


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask of the parameter's shape, stored as bits.

    Reading `masks[name]` unpacks; `entry(name)` gives the stored form and its pattern.
    """

    def __init__(self, entries: Mapping[str, MaskEntry] | None = None, method: str = "") -> None:
        self._entries = dict(entries or {})
        self.method = method

    @classmethod
    def of(
        cls, masks: Mapping[str, Tensor], method: str = "", pattern: str = "unstructured"
    ) -> Masks:
        return cls({n: MaskEntry.of(m, pattern) for n, m in masks.items()}, method)

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, sparsity {self.sparsity():.4f}, method {self.method!r})"

    def entry(self, name: str) -> MaskEntry:
        return self._entries[name]

    def with_mask(self, name: str, mask: Tensor, pattern: str = "unstructured") -> Masks:
        """A new record in which `name` has this mask."""
        return Masks({**self._entries, name: MaskEntry.of(mask, pattern)}, self.method)

    def merged(self, other: Masks) -> Masks:
        """A new record in which the entries of `other` replace those of the same name."""
        return Masks({**self._entries, **other._entries}, other.method or self.method)

    def sparsity(self, name: str | None = None) -> float:
        """Fraction of masked weights of one tensor, or of all of them."""
        if name is not None:
            return self._entries[name].sparsity
        total = sum(math.prod(e.shape) for e in self._entries.values())
        return 1.0 - sum(e.kept for e in self._entries.values()) / max(1, total)

    def check(self, model: nn.Module) -> None:
        """Raise unless every mask belongs to a parameter of this model of the same shape.

        Raises:
            ModelError: a parameter is missing or has another shape.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, entry in self._entries.items():
            if name not in parameters:
                raise ModelError(f"the mask record names {name!r}, which the model does not have")
            if tuple(parameters[name].shape) != entry.shape:
                raise ModelError(
                    f"{name}: the mask has shape {list(entry.shape)}, "
                    f"the parameter {list(parameters[name].shape)}"
                )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set every masked weight to exactly 0."""
        self.check(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self:
            weight = parameters[name]
            weight.masked_fill_(~self[name].to(weight.device), 0.0)

    def violations(self, model: nn.Module) -> dict[str, int]:
        """How many masked weights of each tensor are not 0 (tensors with none are left out)."""
        self.check(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {}
        for name in self:
            weight = parameters[name].detach()
            broken = int((weight[~self[name].to(weight.device)] != 0).sum())
            if broken:
                found[name] = broken
        return found

    def obeyed_by(
        self, model: nn.Module, read: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> Masks:
        """The entries whose masked weights are all 0 in this model, of the parameters it has.

        Args:
            read: the values of a parameter, for those that are stored in parts.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        fitting = {
            n: e for n, e in self._entries.items()
            if n in parameters and tuple(parameters[n].shape) == e.shape
        }  # fmt: skip
        obeyed = {}
        for name, entry in fitting.items():
            weight = read(parameters[name]).detach()
            if not bool((weight[~entry.mask.to(weight.device)] != 0).any()):
                obeyed[name] = entry
        return Masks(obeyed, self.method)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and strings, for checkpoints."""
        return {
            "method": self.method,
            "masks": {
                n: {"packed": e.packed, "shape": list(e.shape), "pattern": e.pattern}
                for n, e in self._entries.items()
            },
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Masks:
        entries = {}
        for name, item in state["masks"].items():
            mask = unpack_bits(item["packed"], tuple(item["shape"]))
            entries[name] = MaskEntry(
                item["packed"], tuple(item["shape"]), int(mask.sum()), item["pattern"]
            )
        return cls(entries, state.get("method", ""))


def masks(model: nn.Module) -> Masks | None:
    """The mask record of a model, or None when it has none."""
    return getattr(model, _ATTRIBUTE, None)


def attach(model: nn.Module, record: Masks | None) -> None:
    """Put a checked mask record on a model; None takes it off."""
    if record is None:
        if hasattr(model, _ATTRIBUTE):
            delattr(model, _ATTRIBUTE)
        return
    record.check(model)
    setattr(model, _ATTRIBUTE, record)
