"""The tensors of a model that a checkpoint holds: parameters and persistent buffers, each once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.core.masks import MaskEntry, Masks, attach, masks
from sparseworks.models.quantized import Grids, Quantized, attach_grids, grids

__all__ = ["ModelTensors", "gather", "integers_by_tensor", "masks_by_tensor", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers, whose prefixes are no names.

    A mask record of the wrapper is passed to a module that has none.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        prefix = "_orig_mod."
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner, prefix = model.module, "module."
        if not isinstance(inner, nn.Module):
            return model
        record = masks(model)
        if record is not None and masks(inner) is None:
            entries = {n.removeprefix(prefix): record.entry(n) for n in record}
            attach(inner, Masks(entries, record.method))
        integers = grids(model)
        if integers is not None and grids(inner) is None:
            attach_grids(inner, Grids({n.removeprefix(prefix): q for n, q in integers.items()}))
        model = inner


@dataclass(frozen=True)
class ModelTensors:
    """Args:
    tensors: name -> tensor, in the order of the state dict, each tensor under its first name.
    ties: every other name -> the first name of the same tensor.
    """

    tensors: dict[str, Tensor]
    ties: dict[str, str]

    def first(self, name: str) -> str:
        return self.ties.get(name, name)


def gather(model: nn.Module, allow_meta: bool = False) -> ModelTensors:
    """The live tensors of a model (no copies); what shares its memory with another is a tie.

    Raises:
        ModelError: a tensor that cannot be saved or filled as it is (DTensor, quantized, on the
            meta device, not a tensor at all); names it.
    """
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if reason := _unfit(tensor, allow_meta):
            raise ModelError(f"{name}: {reason}")
        key = _identity(tensor)
        if key in seen:
            ties[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor
    return ModelTensors(tensors, ties)


def _identity(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _unfit(tensor: object, allow_meta: bool) -> str:
    if not isinstance(tensor, Tensor):
        return f"the state dict holds a {type(tensor).__name__}, not a tensor; it cannot be stored"
    if hasattr(tensor, "full_tensor") and hasattr(tensor, "device_mesh"):
        return (
            "a DTensor, of which this process holds a part; gather the whole model first "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict, full_state_dict=True)"
        )
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "not initialised yet (a lazy module); run the model once first"
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        return f"the tensor is {kind}; only strided tensors can be stored"
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"a {type(tensor).__name__} tensor subclass; convert it to a plain tensor first"
    if tensor.is_meta and not allow_meta:
        return "on the meta device: it has no values"
    return ""


def masks_by_tensor(
    model: nn.Module, found: ModelTensors
) -> tuple[dict[str, tuple[MaskEntry, tuple[str, ...]]], str]:
    """First name of a tensor -> its mask and the names the record has for it; and the method.

    Raises:
        ModelError: the record does not fit the model, or gives one tensor two masks.
    """
    record = masks(model)
    if record is None:
        return {}, ""
    record.check(model)
    entries: dict[str, tuple[MaskEntry, tuple[str, ...]]] = {}
    for name in record:
        entry, first = record.entry(name), found.first(name)
        if first not in found.tensors:
            raise ModelError(f"{name}: has a mask, but the model's state dict leaves it out")
        if first in entries:
            other, names = entries[first]
            if other.pattern != entry.pattern or not torch.equal(other.packed, entry.packed):
                raise ModelError(f"{name} and {names[0]} are one tensor, but their masks differ")
            entries[first] = other, (*names, name)
        else:
            entries[first] = entry, (name,)
    return entries, record.method


def integers_by_tensor(model: nn.Module, found: ModelTensors) -> dict[str, Quantized]:
    """First name of a tensor -> the integers that the model's record has for it."""
    record = grids(model) or Grids()
    return {found.first(n): q for n, q in record.items() if found.first(n) in found.tensors}
