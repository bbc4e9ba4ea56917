"""Gates on coupled groups: one number per group, multiplied into what reads the group.

Multiplying the input columns of every consumer by z_g is multiplying the activations of group g
before them (a head's output before the out-projection, a hidden unit after its gated product). A
layer norm over gated channels counts channel c with weight z_c,

    mean = sum_c z_c x_c / sum_c z_c,   var = sum_c z_c (x_c - mean)^2 / sum_c z_c,

so that gates of exactly 0 and 1 compute what the cut model computes, for residual streams too.
Gates live beside the weights (parametrizations and hooks, removed on leaving), so weights may train
together with them or stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparseworks.core.errors import ModelError
from sparseworks.models.coupling import Coupling, Family
from sparseworks.models.recurrence import is_weight
from sparseworks.training.parametrizing import unparametrize

__all__ = ["Consumer", "Gates", "consumers"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Consumer:
    """A weight that reads groups: input i is of group `index[i]`, or of none (-1)."""

    module: nn.Module
    attribute: str
    axis: int
    index: Tensor


def consumers(model: nn.Module, coupling: Coupling, family: Family) -> list[Consumer]:
    """The weights whose input channels are groups of a family.

    Raises:
        ModelError: something of the family is read by a module that is not known.
    """
    found = []
    place = {int(root): i for i, root in enumerate(family.roots)}
    for name, axis in family.axes:
        owner_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner_name)
        if axis == _input_axis(module, attribute):
            index = [place.get(int(r), -1) for r in coupling.axes[name, axis]]
            found.append(Consumer(module, attribute, axis, torch.tensor(index)))
    if not found:
        raise ModelError(
            f"{family.axes[0][0]}: no linear layer, recurrent layer or convolution reads these "
            "channels, so they cannot be gated; exclude= the layer"
        )
    return found


def _input_axis(module: nn.Module, attribute: str) -> int | None:
    if isinstance(module, nn.MultiheadAttention):
        return 1 if attribute.endswith("proj_weight") else None
    if is_weight(module, attribute):
        return 1
    if attribute != "weight":
        return None
    if isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D":
        return 0
    return 1 if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) else None


def _norms(model: nn.Module, coupling: Coupling, family: Family) -> list[tuple[nn.Module, Tensor]]:
    """Layer norms over the channels of a family, with the group of each channel."""
    place = {int(root): i for i, root in enumerate(family.roots)}
    found: list[tuple[nn.Module, Tensor]] = []
    for name, axis in family.axes:
        owner_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner_name)
        if attribute == "weight" and isinstance(module, nn.LayerNorm):
            labels = coupling.axes[name, axis]
            found.append((module, torch.tensor([place.get(int(r), -1) for r in labels])))
    if not family.exact and not found:
        raise ModelError(
            f"{family.axes[0][0]}: a statistic runs over these channels ({family.reason}) that is "
            "not a layer norm with scales; gate only exact families (streams=False)"
        )
    return found


class Gates:
    """Gates on families of groups; a context in which the model runs gated.

    Args:
        model: the model of `coupling`; ordinary again after the context.
        coupling: what `trace` found.
        families: whose groups are gated.

    Attributes:
        values: one tensor `[groups]` per family, 1 at first; set them before a forward pass (with
            a graph, to learn what they came from).
        weights: per family, how layer norms count its channels; None for `values`.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, families: Sequence[Family]) -> None:
        like = next(model.parameters())
        self.model = model
        self.families = tuple(families)
        self.values = [like.new_ones(len(f)) for f in families]
        self.weights: list[Tensor | None] = [None] * len(self.values)
        self._sites: dict[tuple[int, str], tuple[Consumer, dict[int, Tensor]]] = {}
        self._layers: dict[nn.Module, dict[int, Tensor]] = {}
        for i, family in enumerate(families):
            for site in consumers(model, coupling, family):
                key = (id(site.module), site.attribute)
                index = site.index.to(like.device)
                self._sites.setdefault(key, (site, {}))[1][i] = index
            for module, labels in _norms(model, coupling, family):
                self._layers.setdefault(module, {})[i] = labels.to(like.device)
        self._handles: list[Any] = []
        self._orders: dict[nn.Module, list[str]] = {}

    def __enter__(self) -> Gates:
        modules = {site.module for site, _ in self._sites.values()}
        self._orders = {module: list(module._parameters) for module in modules}
        for site, indices in self._sites.values():
            scale = _Scale(self, site.axis, indices)
            parametrize.register_parametrization(site.module, site.attribute, scale)
        for module, indices in self._layers.items():
            self._handles.append(module.register_forward_hook(self._weighted(indices)))
        return self

    def __exit__(self, *_: object) -> None:
        for site, _indices in self._sites.values():
            unparametrize(site.module, site.attribute, self._orders[site.module])
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def fuse(self) -> None:
        """Multiply the values into the consumers for good (outside the context)."""
        for site, indices in self._sites.values():
            getattr(site.module, site.attribute).mul_(self._along(site, indices))

    def _along(self, site: Consumer, indices: dict[int, Tensor]) -> Tensor:
        weight = getattr(site.module, site.attribute)
        shape = [-1 if d == site.axis else 1 for d in range(weight.ndim)]
        return _gather(self.values, indices).view(shape).to(weight.dtype)

    def _weighted(self, indices: dict[int, Tensor]) -> Any:
        def run(module: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            values = [v if w is None else w for v, w in zip(self.values, self.weights)]
            z = _gather(values, indices)
            x = inputs[0]
            z = z / z.sum().clamp_min(1e-12)
            centred = x - (x * z).sum(-1, keepdim=True)
            var = (centred.square() * z).sum(-1, keepdim=True)
            normal = centred * (var + module.eps).rsqrt()
            return normal * module.weight + (0 if module.bias is None else module.bias)

        return run


class _Scale(nn.Module):
    """weight -> weight * z along its input axis."""

    def __init__(self, gates: Gates, axis: int, indices: dict[int, Tensor]) -> None:
        super().__init__()
        self.gates, self.axis, self.indices = gates, axis, indices

    def forward(self, weight: Tensor) -> Tensor:
        shape = [-1 if d == self.axis else 1 for d in range(weight.ndim)]
        return weight * _gather(self.gates.values, self.indices).view(shape).to(weight.dtype)


def _gather(values: list[Tensor], indices: dict[int, Tensor]) -> Tensor:
    """The gate of every channel; 1 where no family gates it."""
    total: Tensor | None = None
    for i, index in indices.items():
        chosen = torch.where(index >= 0, values[i][index.clamp_min(0)], 1.0)
        total = chosen if total is None else total * chosen
    assert total is not None
    return total
