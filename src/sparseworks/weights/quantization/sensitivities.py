"""How sensitive the layers of a model are: the three measures of CPTQuant (see `cptquant`).

A layer is a group of weights with one input and one output: a block, or the module of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, ModelError
from sparseworks.core.patterns import count_dropped
from sparseworks.core.selection import keep_top
from sparseworks.models.blocks import first_tensor, replace_first
from sparseworks.models.calibration import replay
from sparseworks.models.calls import Batch, Loss
from sparseworks.models.modes import hooked
from sparseworks.models.tap import calibration_mode
from sparseworks.models.views import View
from sparseworks.weights.quantization.prefixes import PrefixLosses

__all__ = ["canonical_correlation", "correlation", "pruning", "taylor"]

Layers = Mapping[str, Sequence[View]]


@torch.no_grad()
def pruning(
    model: nn.Module,
    layers: Layers,
    batches: Sequence[Batch],
    loss: Loss,
    sparsities: Sequence[float],
) -> dict[str, float]:
    """Mean rise of the loss when the smallest |w| of each tensor of one layer alone are 0."""
    found = {}
    blocks = _blocks(model, layers)
    place = {n: i for i, (name, _) in enumerate(blocks) for n in layers if _within(n, name)}
    with calibration_mode(model):
        losses = PrefixLosses(model, batches, loss, [b for _, b in blocks])
        for name in sorted(layers, key=lambda n: place.get(n, 0)):
            losses.skip(place.get(name, 0))
            views = layers[name]
            dense = [v.parameter.detach().clone() for v in views]
            rises = []
            try:
                for sparsity in sparsities:
                    for view, weight in zip(views, dense, strict=True):
                        keep = weight.numel() - count_dropped(weight.numel(), sparsity)
                        view.parameter.copy_(weight * keep_top(weight.float().abs(), keep))
                    rises.append(losses.mean() - losses.dense)
            finally:
                for view, weight in zip(views, dense, strict=True):
                    view.parameter.copy_(weight)
            found[name] = sum(rises) / len(rises)
    return {name: found[name] for name in layers}


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _blocks(model: nn.Module, layers: Layers) -> list[tuple[str, nn.Module]]:
    """The children of the list of modules most of whose children hold layers."""
    best: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            inside = [(f"{name}.{k}" if name else k, c) for k, c in module.named_children()]
            held = [p for p in inside if any(_within(n, p[0]) for n in layers)]
            if len(held) > len(best):
                best = held
    return best


def taylor(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], loss: Loss
) -> dict[str, float]:
    """Mean over the batches of ||dL/dx|| ||x|| / sqrt(n), x the input of each module, n numbers.

    For noise in x of relative size e this is 1 / e times the root mean square of
    |L(x + noise) - L(x)|, to first order.
    """
    sums = dict.fromkeys(names, 0.0)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in names}

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = first_tensor(args)
            x = first_tensor(kwargs) if x is None else x
            if x is None:
                return None
            nudge = torch.zeros_like(x, requires_grad=True)
            seen[name].append((x.detach(), nudge))
            return replace_first(args, kwargs, x + nudge)

        return before

    handles = (
        model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names
    )
    with hooked(handles), calibration_mode(model):
        for batch in batches:
            for pairs in seen.values():
                pairs.clear()
            with torch.enable_grad():
                value = loss(model, batch)
            flat = [(n, x, d) for n, pairs in seen.items() for x, d in pairs]
            if not flat:
                raise ModelError("the calibration data uses none of the layers")
            gradients = torch.autograd.grad(value, [d for _, _, d in flat], allow_unused=True)
            for (name, x, _), gradient in zip(flat, gradients, strict=True):
                if gradient is not None:
                    size = float(gradient.double().norm() * x.double().norm())
                    sums[name] += size / x.numel() ** 0.5 / len(batches)
    return sums


def correlation(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], damping: float = 1e-4
) -> dict[str, float]:
    """1 - the mean canonical correlation between input and output of each block.

    Args:
        names: of blocks that take and return hidden states `[..., width]`.
        batches: padded tokens are left out.
        damping: of both covariances, relative to the mean of their diagonals.

    Raises:
        DataError: there are no more tokens than numbers in a hidden state, which would correlate
            perfectly whatever they are.
        ModelError: a block was not used, or returns no tensor.
    """
    inputs: dict[str, list[Tensor]] = {n: [] for n in names}
    outputs: dict[str, list[Tensor]] = {n: [] for n in names}
    padding: list[Tensor | None] = [None]

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = first_tensor(args)
            pair = (first_tensor(kwargs) if given is None else given, first_tensor(output))
            for store, value in zip((inputs, outputs), pair, strict=True):
                if value is None:
                    raise ModelError(f"{name} takes or returns no tensor")
                rows = value.detach().double().reshape(-1, value.shape[-1])
                mask = padding[0]
                if mask is not None and mask.numel() == rows.shape[0]:
                    rows = rows[mask.flatten().to(rows.device)]
                store[name].append(rows)

        return after

    handles = (
        model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names
    )
    replay(model, batches, handles, padding)
    found = {}
    for name in names:
        if not inputs[name]:
            raise ModelError(f"{name}: the calibration data did not use it")
        x, y = torch.cat(inputs.pop(name)), torch.cat(outputs.pop(name))
        if x.shape[0] <= max(x.shape[1], y.shape[1]):
            raise DataError(
                f"{name}: {x.shape[0]} tokens for {x.shape[1]} numbers of a hidden state; "
                "canonical correlations need more tokens: give more calibration data"
            )
        found[name] = 1.0 - canonical_correlation(x, y, damping)
    return found


def canonical_correlation(x: Tensor, y: Tensor, damping: float) -> float:
    """Mean singular value of C_xx^-1/2 C_xy C_yy^-1/2, of rows x and y `[n, d]` in fp64."""
    x, y = x - x.mean(0), y - y.mean(0)
    left = torch.linalg.solve_triangular(_factor(x, damping), x.T @ y / len(x), upper=False)
    both = torch.linalg.solve_triangular(_factor(y, damping), left.T, upper=False)
    return float(torch.linalg.svdvals(both).mean())


def _factor(x: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of the damped covariance; it whitens as C^-1/2 does."""
    covariance = x.T @ x / len(x)
    covariance.diagonal().add_(damping * covariance.diagonal().mean().clamp_min(1e-30))
    factor: Tensor = torch.linalg.cholesky(covariance)
    return factor
