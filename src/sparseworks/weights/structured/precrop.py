"""PreCropping: at initialisation only the density of every layer matters, so crop its channels.

1. Densities p_l of the layers for a density d: those of any method that prunes at initialisation
   (SynFlow, SNIP, GraSP: only the shares of the masks are used), or of "expected", the maximum of
   the expected synaptic flow of a chain,
       max sum_l log p_l  with  sum_l n_l p_l <= d sum_l n_l, p_l <= 1   =>   p_l = min(1, c / n_l).
2. Shares r_f of the widths f: a layer between widths of shares r and r' has density r r', so
       min sum_l n_l (sum over widths f of l of log r_f - log p_l)^2,  r_f <= 1,
   with inputs, outputs and, by default, residual streams at 1. A width whose layers have no other
   one (the inner width of a basic block) takes r_f = sum_l n_l p_l / sum_l n_l instead, which keeps
   as many parameters as the densities do.
3. One factor t on all shares meets the budget: width m_f keeps its first channels j with
   j - 1/2 <= t r_f m_f, which are the groups of highest score m_f r_f / (j - 1/2). Which channels
   stay does not matter, they are random; the small dense network is then trained as usual.

Source: Cai, Hua, Chen, Suh, De Sa, Zhang 2022, Structured Pruning is All You Need for Pruning CNNs
at Initialization. The paper gives no formula for step 2; the least squares are ours.

In our quick setting (claim 186: ResNet-8 on digits, 10 % of the parameters, 12 seeds) a crop is
0.6 points above uniform widths (0.0 to 1.1), 0.3 below the SynFlow mask, and 0.3 below uniform
widths of equal operations (-0.7 to 0.1). A training step of ResNet-20 at 30 % takes 0.83 of the
dense one's time: the residual streams stay whole.
Widths in multiples of 8 (`round_to=8`) save another tenth of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.masks import masks
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Arguments, Batch, Example, Loss
from sparseworks.models.coupling import Coupling, Family
from sparseworks.models.views import find_prunable
from sparseworks.weights.structured.base import GroupScore, Scores
from sparseworks.weights.structured.result import SlimResult

__all__ = ["PreCrop", "crop", "expected_densities", "layer_densities", "width_shares"]

_WHOLE = 1e9  # the score of groups that go only when nothing else is left


def expected_densities(sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """p_l = min(1, c / n_l), with c such that sum n_l p_l = d sum n_l."""
    goal, left = density * sum(sizes.values()), sorted(sizes.values())
    whole = 0
    while left and (goal - whole) / len(left) >= left[0]:
        whole += left.pop(0)
    c = (goal - whole) / len(left) if left else math.inf
    return {name: min(1.0, c / n) for name, n in sizes.items()}


def layer_densities(
    model: nn.Module,
    density: float,
    method: str,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """Share of every prunable weight that a method keeps; the model stays as it is.

    Args:
        model: at initialisation.
        density: d, over all prunable weights, in (0, 1).
        method: "expected", "uniform", or the name of a one-shot method ("synflow", "snip", ...).
        data: what the method needs; for SynFlow one batch that shows the shape.
        loss: `(model, batch) -> scalar` for methods with gradients.
    """
    if not 0 < density < 1:
        raise InvalidArgument(f"density={density} lies between 0 and 1")
    sizes = {v.name: v.parameter.numel() for v in find_prunable(model)}
    if method == "expected":
        return expected_densities(sizes, density)
    if method == "uniform":
        return dict.fromkeys(sizes, density)
    from sparseworks.weights.oneshot.prune import prune

    found = prune(model, method, sparsity=1 - density, data=data, loss=loss, copy=True)
    record = masks(found.model)
    assert record is not None
    return {n: float(record[n].float().mean()) if n in record else 1.0 for n in sizes}


def width_shares(
    densities: Mapping[str, float],
    sizes: Mapping[str, int],
    widths: Mapping[str, tuple[int, ...]],
    count: int,
) -> Scores:
    """Shares r of `count` widths in (0, 1], `[count]`, from layer densities.

    Args:
        densities: layer -> p_l.
        sizes: layer -> n_l.
        widths: layer -> the widths that it lies between (a width twice where both are one).
    """
    layers = [n for n in densities if widths.get(n)]
    a = np.zeros((len(layers), count))
    for i, name in enumerate(layers):
        for width in widths[name]:
            a[i, width] += 1
    n = np.array([float(sizes[name]) for name in layers])
    goal = np.log([max(densities[name], 1e-6) for name in layers])
    x = np.zeros(count)
    for _ in range(500):  # coordinate descent: convex, with one bound per coordinate
        before = x.copy()
        for f in np.flatnonzero(a.any(0)):
            residual = goal - a @ x + a[:, f] * x[f]
            x[f] = min(0.0, float((n * a[:, f]) @ residual / ((n * a[:, f]) @ a[:, f])))
        if np.abs(x - before).max() < 1e-10:
            break
    shares: Scores = np.exp(x)
    alone = a.sum(1) == 1
    for f in np.flatnonzero(a.any(0)):
        own = a[:, f] > 0
        if alone[own].all():
            shares[f] = (n * np.exp(goal))[own].sum() / n[own].sum()
    return shares


@dataclass(frozen=True)
class PreCrop(GroupScore):
    """Scores under which `slim` cuts widths to the densities of a method at initialisation.

    Args:
        density: d that the densities are taken at; about the share of parameters to keep.
        densities: "synflow", "expected", "uniform", or another one-shot method.
        streams: crop residual streams too.
    """

    density: float = 0.3
    densities: str = "synflow"
    streams: bool = False

    info: ClassVar[MethodInfo] = MethodInfo(
        name="precrop",
        title="Structured Pruning is All You Need for Pruning CNNs at Initialization",
        authors="Cai et al.",
        year=2022,
        room="weights/structured",
        kind="structured",
        card="186",
        needs=("data",),
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="one pruning at initialisation, whose masks only count",
        summary="crop an untrained model's channels to the layer densities of SynFlow or others",
    )
    normalise: ClassVar[None] = None

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        densities = layer_densities(model, self.density, self.densities, data, loss)
        parameters = dict(model.named_parameters())
        free = [
            f for f in coupling.families if len(f) > 1 and (self.streams or not is_stream(model, f))
        ]
        if not free:
            raise ModelError(f"{type(model).__name__}: only residual streams here; streams=True")
        widths = {
            name: tuple(i for i, f in enumerate(free) for n, _ in f.axes if n == name)
            for name in densities
        }
        sizes = {name: parameters[name].numel() for name in densities}
        shares = width_shares(densities, sizes, widths, len(free))
        scores = np.full(coupling.count, _WHOLE)
        for family, share in zip(free, shares):
            place = np.arange(1, len(family) + 1)
            scores[family.roots] = len(family) * share / (place - 0.5)
        return scores


def is_stream(model: nn.Module, family: Family) -> bool:
    """Several layers write the width and several read it: a residual stream."""
    writers, readers = 0, 0
    parameters = dict(model.named_parameters())
    for name, axis in family.axes:
        if name in parameters and parameters[name].ndim > 1:
            owner = model.get_submodule(name.rpartition(".")[0])
            output = 1 if type(owner).__name__ == "Conv1D" else 0
            writers, readers = writers + (axis == output), readers + (axis != output)
    return writers > 1 and readers > 1


def crop(
    model: nn.Module,
    example: Example,
    *,
    params: float | None = None,
    flops: float | None = None,
    densities: str = "synflow",
    streams: bool = False,
    data: Iterable[Batch] | None = None,
    **options: Any,
) -> SlimResult:
    """Crop an untrained model and give its weights the variance of their new fan-in.

    `sw.slim` with the method "precrop"; weights and biases are then multiplied by
    sqrt(fan-in before / after), so that initialisations that go by the fan-in are those of the
    small model.

    Args:
        model: at initialisation, changed in place unless `copy=True`.
        example: as `slim` takes it.
        params: share of the parameters to keep; or
        flops: share of the floating-point operations to keep.
        densities: see `PreCrop`.
        streams: crop residual streams too.
        data: for densities that need more than the shape; the example when None.
        options: further options of `slim`.
    """
    from sparseworks.weights.structured.slimming import slim

    share = params if params is not None else flops
    if share is None or not 0 < share < 1:
        raise InvalidArgument("give params= or flops=, the share to keep, between 0 and 1")
    given = Arguments.of(example).named(model)
    result = slim(
        model, given, params=params, flops=flops, method=PreCrop(share, densities, streams),
        data=[given.batch()] if data is None else data, **{"fold": "none", "floor": 0.0, **options},
    )  # fmt: skip
    _rescale(result)
    return result


@torch.no_grad()
def _rescale(result: SlimResult) -> None:
    cropped: nn.Module = result.model
    for name, (before, after) in result.shapes.items():
        owner = cropped.get_submodule(name.rpartition(".")[0])
        if len(after) > 1 and name.endswith(".weight") and type(owner).__name__ != "Conv1D":
            ratio = math.sqrt(math.prod(before[1:]) / math.prod(after[1:]))
            owner.weight.mul_(ratio)  # type: ignore[operator]
            if isinstance(getattr(owner, "bias", None), torch.Tensor):
                owner.bias.mul_(ratio)  # type: ignore[operator]
