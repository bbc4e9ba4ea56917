"""Training state in one file: everything a killed run needs to go on bit for bit.

A state is a tree of dicts, lists, tuples, numbers, strings and tensors (what `state_dict()` of
models, optimizers, schedulers, scalers and sparse runs return). Tensors become the tensors of a
safetensors file and the rest JSON in its header, so reading a state can never run code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.io.atomic import atomic_file
from sparseworks.io.sealed import check_seal, write_sealed

__all__ = ["load_state", "random_state", "restore_random", "save_state"]

_FORMAT = "sparseworks training state 1"
_FORMATS = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def save_state(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a state; the file that stood there is replaced in one move, or not at all.

    Raises:
        InvalidArgument: the tree holds something that is neither a plain value nor a tensor.
        CheckpointError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    header = {"format": _FORMAT, "tree": json.dumps(_plain(tree, tensors, ""))}
    with atomic_file(Path(path)) as temporary:
        write_sealed(tensors, temporary, header)


def load_state(path: str | os.PathLike[str]) -> Any:
    """Read a state back, tensors on the CPU with the memory layout they had.

    Raises:
        CheckpointError: missing, truncated, or not a training state.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as a training state ({error})") from None
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not a training state of this version of sparseworks")
    check_seal(path, tensors, header)
    try:
        return _tree(json.loads(header["tree"]), tensors)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the training state is damaged ({error!r})") from None


def random_state() -> dict[str, Any]:
    """The state of torch's own generators (dropout and initialisation draw from them)."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def restore_random(state: dict[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON of a tree: leaves as they are, everything else as [tag, content]."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # the number keeps names apart, the path is for people
        kept = value.detach()
        tensors[name] = kept.cpu().clone(memory_format=torch.contiguous_format)
        return ["tensor", name, _layout(kept)]
    if isinstance(value, dict):
        return ["dict", [[_plain(k, tensors, path), _plain(v, tensors, f"{path}.{k}")]
                         for k, v in value.items()]]  # fmt: skip
    if isinstance(value, (list, tuple)):
        tag = "list" if isinstance(value, list) else "tuple"
        return [tag, [_plain(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]]
    raise InvalidArgument(
        f"training state{path}: a {type(value).__name__} cannot be stored; only tensors, numbers, "
        "strings, lists and dicts can"
    )


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content, *rest = value
    if tag == "tensor":
        tensor = tensors[content]
        return tensor.contiguous(memory_format=_FORMATS[rest[0]]) if rest[0] else tensor
    if tag == "dict":
        return {_tree(k, tensors): _tree(v, tensors) for k, v in content}
    items = [_tree(v, tensors) for v in content]
    return items if tag == "list" else tuple(items)


def _layout(tensor: Tensor) -> str | None:
    # kernels may round differently over other strides, so a state that comes back keeps its own
    for name, memory_format in _FORMATS.items():
        fits = tensor.dim() == (4 if name == "channels_last" else 5)
        if fits and tensor.is_contiguous(memory_format=memory_format):
            return None if tensor.is_contiguous() else name
    return None
