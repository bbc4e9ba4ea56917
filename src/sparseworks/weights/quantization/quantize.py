"""`sparseworks.quantize`: weights of a trained model as integers.

    sw.quantize(model, "rounding", bits=4, group=32)
    sw.quantize(model, "gqsa", bits=4, group=16, sparsity=0.5, data=batches)
    sw.save(model, "model.safetensors")              # the integers, as they are
    sw.compile_decoder(model, dtype="int4")          # packed from the same integers

Parameters stay ordinary ones that hold scale * (code - zero); the integers lie beside them
(`sw.grids(model)`), and count as long as the parameters hold these numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core import registry
from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.types import Progress
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.hooks import duplicate
from sparseworks.models.quantized import Grids, attach_grids, grids
from sparseworks.models.views import View, find_prunable
from sparseworks.weights.quantization.method import (
    Quantization,
    QuantizedTensor,
    QuantizeResult,
    Work,
)
from sparseworks.weights.structured.backup import Snapshot

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    method: str | Quantization = "rounding",
    *,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    copy: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizeResult:
    """Turn the weights of a trained model into integers in groups.

    Args:
        model: changed in place, unless `copy`.
        method: registered name of kind "quantization", or an object.
        data: calibration batches, for methods that need them.
        loss: `(model, batch) -> scalar` for methods that train; cross-entropy when None.
        include: name patterns of the only weights to quantize.
        exclude: name patterns of weights to leave as they are.
        seed: for methods that draw at random.
        copy: quantize a copy; the model given stays as it is.
        progress: called with (done, total, what).
        options: fields of the method (bits, group, ...).

    Returns:
        What was done per tensor; printable.

    Raises:
        InvalidArgument: an option cannot be used; nothing was changed.
        ModelError: nothing to quantize, or weights that are not finite; nothing was changed.
        DataError: calibration data is missing or empty; nothing was changed.
    """
    began = time.perf_counter()
    chosen: Quantization = registry.build(method, ("quantization",), **options)
    batches = _batches(chosen, data)
    found = find_prunable(model, include, exclude)
    for view in found:
        if not bool(torch.isfinite(view.parameter).all()):
            raise ModelError(f"{view.name} holds NaN or Inf; repair the weights first")
        if not view.parameter.is_floating_point():
            raise ModelError(f"{view.name} is {view.parameter.dtype} already; exclude it")
    target = duplicate(model) if copy else model
    views = [v.within(target) for v in found] if copy else list(found)
    before = {v.name: v.parameter.detach().clone() for v in views}
    work = Work(target, views, batches, loss, seed, progress, found.reasons())
    snapshot = Snapshot(target)
    try:
        chosen.run(work)
        record = Grids({**(grids(target) or {}), **work.entries}).held_by(target)
        told = tuple(_told(work, v, before[v.name]) for v in views if v.name in work.entries)
        attach_grids(target, record)
    except BaseException:
        snapshot.restore()
        raise
    return QuantizeResult(
        chosen.info.name, {**registry.options_of(chosen), "seed": seed}, told, work.skipped,
        Grids(work.entries), target, time.perf_counter() - began, tuple(work.warnings),
        work.figures,
    )  # fmt: skip


def _batches(method: Quantization, data: Iterable[Batch] | None) -> list[Batch] | None:
    if data is None:
        if "data" in method.info.needs:
            raise InvalidArgument(f"{method.info.name} needs calibration batches: give `data=`")
        return None
    batches: list[Batch] = [data] if isinstance(data, (Tensor, Mapping)) else list(data)
    if not batches:
        raise DataError("the calibration data is empty: at least one batch is needed")
    return batches


@torch.no_grad()
def _told(work: Work, view: View, before: Tensor) -> QuantizedTensor:
    entry, record = work.entries[view.name], masks(work.model)
    kept = entry.mask()
    pattern = "dense" if entry.live is None else f"block1x{entry.group}"
    if record is not None and view.name in record:
        kept, pattern = kept & record[view.name], record.entry(view.name).pattern
    energy = float(before.float().square().sum())
    lost = float((before.float() - view.parameter.float()).square().sum())
    return QuantizedTensor(
        view.name, tuple(before.shape), entry.bits, entry.group, int(kept.sum()), kept.numel(),
        entry.nbytes, lost / energy if energy else 0.0, pattern, work.notes.get(view.name, ""),
    )  # fmt: skip
