"""`sparseworks.load`: fill a model from a checkpoint, after everything has been checked."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import Masks, attach, masks
from sparseworks.core.types import Progress
from sparseworks.io.checkpoint import Checkpoint
from sparseworks.io.gather import ModelTensors, gather, unwrap
from sparseworks.io.opening import open_checkpoint
from sparseworks.models.quantized import attach_grids

__all__ = ["fill", "load"]


@torch.no_grad()
def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    infer_masks: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Fill a model with the weights, buffers and mask record of a checkpoint.

    The file is read twice: the first time every header, hash, name, shape and dtype is checked,
    and only then does the model change. No second copy of it is held. The model's own mask record
    is replaced by the checkpoint's (by none, when that has none).

    Args:
        path: a file or folder written by `save`, a safetensors file, a Hugging Face folder
            (sharded too), or a compressed-tensors folder of format "sparse-bitmask".
        model: with exactly the tensors of the checkpoint; parameters on the meta device are
            created on the CPU.
        infer_masks: for checkpoints without a mask record: take the zeros of the prunable weights
            as masked (see `sparseworks.io.infer_masks`).
        progress: called with (tensors done, tensors in all, name); both passes count.

    Returns:
        The model.

    Raises:
        CheckpointError: damaged, or of another model; names the tensor, and the model is as it was.
    """
    inner = unwrap(model)
    with open_checkpoint(path) as checkpoint:
        fill(inner, checkpoint, progress)
    if inner is not model:
        for own in ("_sparseworks_masks", "_sparseworks_grids"):
            vars(model).pop(own, None)  # the wrapper's own records are of before
    if infer_masks and masks(inner) is None:
        from sparseworks.io.zeros import infer_masks as infer

        attach(inner, infer(inner))
    return model


def fill(model: nn.Module, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
    """Check a checkpoint against a model, then copy."""
    found = gather(model, allow_meta=True)
    plan = match(checkpoint, found, _ignored(checkpoint, model))
    total = len(checkpoint.tensors) + len(plan)
    for i, name in enumerate(checkpoint.tensors):
        if progress is not None:
            progress(i, total, f"checking {name}")
        checkpoint.verify(name)
    checkpoint.finish_verify()
    _check_duplicates(checkpoint, plan)
    record = checkpoint.masks()
    if record is not None:
        _check_masks(checkpoint, model, record)
    try:
        for i, (target, source) in enumerate(plan.items()):
            if progress is not None:
                progress(total - len(plan) + i, total, f"loading {target}")
            _copy(model, found, target, checkpoint, source[0])
    except BaseException as error:
        attach(model, None)
        attach_grids(model, None)
        error.add_note("The model is filled in part and has no mask record; load it again.")
        raise
    attach(model, record)
    attach_grids(model, checkpoint.grids())
    if progress is not None:
        progress(total, total, "done")


def _ignored(checkpoint: Checkpoint, model: nn.Module) -> set[str]:
    """Tensors of others' checkpoints that the model makes for itself, or says it does not need."""
    if checkpoint.kind == "sparseworks":
        return set()
    persistent = model.state_dict(keep_vars=True).keys()
    made = {name for name, _ in model.named_buffers()} - persistent
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return made | {n for n in checkpoint.tensors if any(re.search(p, n) for p in patterns)}


def match(
    checkpoint: Checkpoint, found: ModelTensors, ignored: Collection[str] = ()
) -> dict[str, list[str]]:
    """Tensor of the model -> names in the checkpoint that hold it (more than one: all equal).

    Args:
        ignored: names in the checkpoint that the model need not have.

    Raises:
        CheckpointError: a tensor is missing, too many, or of another shape or dtype.
    """
    plan: dict[str, list[str]] = {}
    where = checkpoint.path
    for name in [*checkpoint.tensors, *checkpoint.ties]:
        first = found.first(name)
        if first not in found.tensors and name in ignored:
            continue
        if first not in found.tensors:
            raise CheckpointError(
                f"{where}: tensor {name!r} is not in the model; this checkpoint is of another model"
            )
        source = checkpoint.ties.get(name, name)
        stored, tensor = checkpoint.tensors[source], found.tensors[first]
        if stored.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(stored.shape)}, "
                f"the model's {list(tensor.shape)}"
            )
        if stored.dtype != tensor.dtype:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {stored.dtype}, the model's {tensor.dtype}; "
                "convert the model first (model.to(dtype))"
            )
        sources = plan.setdefault(first, [])
        if source not in sources:
            sources.append(source)
    for name in found.tensors:
        if name not in plan:
            raise CheckpointError(f"{where}: tensor {name!r} of the model is missing")
    return plan


def _check_duplicates(checkpoint: Checkpoint, plan: dict[str, list[str]]) -> None:
    """Two stored tensors for one of the model must be the same, bit for bit."""
    for target, (first, *others) in plan.items():
        for other in others:
            pairs: Iterator[tuple[tuple[int, Tensor], tuple[int, Tensor]]] = zip(
                checkpoint.slices(first), checkpoint.slices(other)
            )
            if not all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for (_, a), (_, b) in pairs
            ):
                raise CheckpointError(
                    f"{checkpoint.path}: tensors {first!r} and {other!r} differ, but in the model "
                    f"they are one ({target!r})"
                )


def _check_masks(checkpoint: Checkpoint, model: nn.Module, record: Masks) -> None:
    try:
        record.check(model)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: its masks do not fit the model: {error}"
        ) from None


def _copy(
    model: nn.Module, found: ModelTensors, target: str, checkpoint: Checkpoint, source: str
) -> None:
    """Fill one tensor of the model in place; a meta tensor is replaced wherever it is used."""
    tensor = found.tensors[target]
    if tensor.is_meta:
        _replace(model, tensor, checkpoint.read(source))
    elif tensor.is_contiguous():
        flat = tensor.detach().view(-1)
        for start, values in checkpoint.slices(source):
            flat[start : start + values.numel()].copy_(values)
    else:
        tensor.detach().copy_(checkpoint.read(source))


def _replace(model: nn.Module, old: Tensor, values: Tensor) -> None:
    new = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is old:
                    table[name] = new  # type: ignore[assignment]
