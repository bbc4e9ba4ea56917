"""Cutting must equal zeroing, tried on the example before a model is changed.

Where it does not, the error names the first layer that computes something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, call
from sparseworks.models.coupling import Coupling
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.cutting import cut, kept_indices, zero
from sparseworks.weights.structured.planning import Keep

__all__ = ["check", "output_of"]

_TOLERANCE = 2e-3


@torch.no_grad()
def check(model: nn.Module, example: Batch, coupling: Coupling, keep: Keep) -> None:
    """Cutting must equal zeroing (where no statistic runs over what is cut), and must run.

    The model is as it was afterwards, whatever happens.

    Raises:
        ModelError: the cut model does not run, or computes something else; with the layer.
    """
    exact = all(f.exact or bool(keep[f.roots].all()) for f in coupling.families)
    with evaluating(model):
        with _zeroed(model, coupling, keep):
            expected = output_of(model, example)
        path: list[str] = []
        try:
            with _cut(model, coupling, keep), _running(model, path):
                found = output_of(model, example)
        except ModelError:
            raise
        except Exception as error:
            where = f" at {path[-1] or 'its own forward'}" if path else ""
            raise ModelError(
                f"{type(model).__name__} does not run with its new shapes{where} ({error}); a "
                "size may be written into that code, or held where it is not found: exclude= the "
                "layers it belongs to"
            ) from error
        if exact and (off := _difference(found, expected)) > _TOLERANCE:
            layer = _first_difference(model, example, coupling, keep)
            raise ModelError(
                f"{type(model).__name__}: the cut model differs from the zeroed one by {off:.1e}"
                f"{f', first in the output of {layer}' if layer else ''}; exclude= what is cut "
                "there, and please report this architecture"
            )


def output_of(model: nn.Module, example: Batch) -> Tensor:
    """The logits, or the first tensor that the model returns, fp32."""
    output = call(model, example)
    found = getattr(output, "logits", None)
    tensor = found if isinstance(found, Tensor) else first_tensor(output)
    if tensor is None:
        raise ModelError(f"no tensor in the output of {type(model).__name__}")
    return tensor.detach().float()


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest value; infinite where either is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    scale = float(expected.abs().max()) + 1e-12
    off = float((found - expected).abs().max()) / scale
    return off if off == off else float("inf")


def _first_difference(model: nn.Module, example: Batch, coupling: Coupling, keep: Keep) -> str:
    """The first layer with parameters whose kept outputs differ; empty if none can be named."""
    kept = kept_indices(coupling, keep)
    with _zeroed(model, coupling, keep):
        expected = _outputs(model, example)
    with _cut(model, coupling, keep):
        found = _outputs(model, example)
    for name, whole in expected.items():
        part = found.get(name)
        if part is None or part.ndim != whole.ndim:
            continue
        stays = kept.get(f"{name}.weight", {}).values()
        for dim, (a, b) in enumerate(zip(whole.shape, part.shape)):
            index = next((i for i in stays if len(i) == b), None)
            if a != b and index is not None and index.max() < a:
                whole = whole.index_select(dim, torch.as_tensor(index, device=whole.device))
        if whole.shape == part.shape and _difference(part, whole) > _TOLERANCE:
            return name
    return ""


def _outputs(model: nn.Module, example: Batch) -> dict[str, Tensor]:
    """The outputs of all layers with parameters of their own, in the order they came."""
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if name and any(True for _ in module.parameters(recurse=False)):

                def after(m: Any, inputs: Any, output: Any, name: str = name) -> None:
                    if (tensor := first_tensor(output)) is not None:
                        seen.setdefault(name, tensor.detach().float().clone())

                stack.callback(module.register_forward_hook(after).remove)
        call(model, example)
    return seen


@contextlib.contextmanager
def _running(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keeps the names of the modules that are running, the innermost last."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():

            def before(m: Any, inputs: Any, name: str = name) -> None:
                path.append(name)

            def after(m: Any, inputs: Any, output: Any) -> None:
                path.pop()

            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


@contextlib.contextmanager
def _zeroed(model: nn.Module, coupling: Coupling, keep: Keep) -> Iterator[None]:
    saved = zero(model, coupling, keep)
    try:
        yield
    finally:
        for parameter, value in saved:
            parameter.copy_(value)


@contextlib.contextmanager
def _cut(model: nn.Module, coupling: Coupling, keep: Keep) -> Iterator[None]:
    backup = Backup()
    try:
        cut(model, coupling, keep, backup)
        yield
    finally:
        backup.restore()
