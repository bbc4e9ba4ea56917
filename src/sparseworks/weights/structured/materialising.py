"""Layers whose weight is a function of their parameters become plain layers of that weight.

A standardised or normalised weight w(v) couples all its inputs: cutting one changes what the others
weigh. As a plain layer with weight w(v), its value now, it computes the same and can be cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparseworks.core.masks import masks
from sparseworks.models.calls import Batch, call
from sparseworks.models.coupling import Function
from sparseworks.models.hooks import with_torch_masks
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.cutting import owners

__all__ = ["materialise", "plain_layer", "replace_layer"]

_KINDS: tuple[type[Any], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_OPERATIONS = {kind.__name__.lower().replace("convt", "conv_t") for kind in _KINDS}
_TOLERANCE = 1e-5


@torch.no_grad()
def materialise(
    model: nn.Module, example: Batch, functions: Iterable[Function], backup: Backup
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Replace every layer of `functions` that a plain one equals, by that one.

    Args:
        functions: of the coupling of this model.
        backup: what is replaced is added here.

    Returns:
        paths of the layers replaced, and for the others why they stay.
    """
    made: dict[str, nn.Module] = {}
    whole: list[str] = []
    functions = list(functions)
    with evaluating(model):
        seen = _inputs(model, example, [f.module for f in functions])
        for function in functions:
            path = function.module
            why, layer = _obstacle(model, path), None
            if not why:
                layer = _equal(model.get_submodule(path), *seen[path])
                why = "no plain layer computes the same"
            if layer is None:
                whole.append(f"left whole: {function}; {why}")
                continue
            made[path] = layer
    for path, layer in made.items():
        replace_layer(model, path, layer.train(model.get_submodule(path).training), backup)
    return tuple(made), tuple(whole)


def plain_layer(module: nn.Module) -> Any:
    """An uninitialised layer of torch with the sizes of `module`; None for other kinds."""
    m: Any = module
    kind = next((k for k in _KINDS if isinstance(module, k)), None)
    if kind is None:
        return None
    bias = m.bias is not None
    if kind is nn.Linear:
        sizes: dict[str, Any] = {"in_features": m.in_features, "out_features": m.out_features}
    else:
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
        sizes = {name: getattr(m, name) for name in names.split()}
        if m.transposed:
            sizes["output_padding"] = m.output_padding
    first = next(module.parameters())
    build: Any = nn.utils.skip_init
    return build(kind, **sizes, bias=bias, device=first.device, dtype=first.dtype)


def replace_layer(model: nn.Module, path: str, layer: nn.Module, backup: Backup) -> None:
    """Put `layer` in the place of the module at `path`, wherever the model uses that module."""
    old = model.get_submodule(path)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                backup.set(parent, name, layer)


def _obstacle(model: nn.Module, path: str) -> str:
    """Why a layer cannot be replaced; empty if it can."""
    module = model.get_submodule(path)
    if not path or not isinstance(module, _KINDS):
        return "it is no Linear or convolution of torch"
    own = {id(p) for p in module.parameters()}
    below = {id(m) for m in module.modules()}
    if any(id(t) in own and id(m) not in below for m, _, _, _, t in owners(model)):
        return "other layers share its parameters"
    record = with_torch_masks(model, masks(model))
    if record is not None and any(name.startswith(f"{path}.") for name in record):
        return "it has masks"
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    ]
    if any(not type(h).__module__.startswith("torch.nn.utils.") for h in hooks):
        return "it has hooks"
    return ""


def _inputs(
    model: nn.Module, example: Batch, paths: Iterable[str]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Arguments and result of the last call of each module."""
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:

            def after(m: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                seen[path] = args, kwargs, output

            module = model.get_submodule(path)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        call(model, example)
    return seen


def _equal(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A plain layer that makes the same of these arguments; None if there is none."""
    with _Operands() as operands:
        module(*args, **kwargs)
    layer = plain_layer(module)
    if len(operands.found) != 1 or layer is None or not isinstance(output, Tensor):
        return None
    weight, bias = operands.found[0]
    if weight.shape != layer.weight.shape or (bias is None) != (layer.bias is None):
        return None
    learns = any(p.requires_grad for p in module.parameters())
    layer.weight = nn.Parameter(weight.detach().clone(), learns)
    if bias is not None:
        kept = isinstance(bias, nn.Parameter)
        layer.bias = bias if kept else nn.Parameter(bias.detach().clone(), learns)
    try:
        found = layer(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return None
    if found.shape != output.shape:
        return None
    scale = float(output.abs().max()) + 1e-12
    return layer if float((found - output).abs().max()) <= _TOLERANCE * scale else None


class _Operands(TorchFunctionMode):
    """The weights and biases that linear layers and convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(zip(("input", "weight", "bias"), args)) | (kwargs or {})
        if getattr(func, "__name__", "") in _OPERATIONS:
            self.found.append((given["weight"], given.get("bias")))
        return func(*args, **(kwargs or {}))
