"""Permute coupled channels of a model in place, and make sure that its function stays.

A permutation of the outputs of a layer, its bias and its norm, with the same on the inputs of every
layer that reads them, leaves the function as it is:

    V f(W x + b) = (V P^T) f(P W x + P b)    for every elementwise f.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.models.blocks import first_tensor
from sparseworks.models.calls import Batch, call, split
from sparseworks.models.coupling import Coupling, Family

__all__ = ["Permutation", "permutable", "permute", "places_of"]

Places = Mapping[tuple[str, int], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Permutation:
    """One order for all channels that are coupled.

    Args:
        places: (tensor name, axis) -> the indices of each channel there, `[channels, m]`.
        order: channel `order[j]` goes to the place of channel j.
    """

    places: Places
    order: NDArray[np.int64]

    def inverse(self) -> Permutation:
        return Permutation(self.places, np.argsort(self.order))

    def index(self, key: tuple[str, int], length: int) -> NDArray[np.int64]:
        """What every entry of an axis is taken from, `[length]`."""
        places = self.places[key]
        index = np.arange(length)
        index[places.ravel()] = places[self.order].ravel()
        return index


def places_of(coupling: Coupling, family: Family) -> Places:
    """Where every channel of a family is, the channels in the order of their numbers."""
    found = {}
    for key in family.axes:
        labels = coupling.axes[key]
        inside = np.flatnonzero(np.isin(labels, family.roots))
        by_channel = inside[np.argsort(labels[inside], kind="stable")]
        found[key] = by_channel.reshape(len(family), -1)
    return found


@torch.no_grad()
def permute(model: nn.Module, permutations: Iterable[Permutation]) -> None:
    """Apply permutations in place, one after the other; tied tensors are moved once."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for permutation in permutations:
        for name, axis in permutation.places:
            tensor = named[name]
            index = permutation.index((name, axis), tensor.shape[axis])
            tensor.copy_(tensor.index_select(axis, torch.from_numpy(index).to(tensor.device)))


def permutable(
    model: nn.Module, example: Batch, permutations: Sequence[Permutation]
) -> list[Permutation]:
    """Those of the permutations that leave the outputs of the model as they are.

    Couplings say what must be cut together, which leaves open whether two channels do the same:
    halves of a layer that go different ways look alike. So outputs are compared, in fp64 where the
    model runs in it; noise is added to an image or other single tensor, so that constant ones tell
    something too.

    Raises:
        ModelError: the model does not give the same output twice.
    """
    if not permutations:
        return []
    probe = copy.deepcopy(model).eval()
    inputs = _noisy(split(example)[0])
    try:
        before, tolerance = _output(probe.double(), _double(inputs)), 1e-9
        inputs = _double(inputs)
    except RuntimeError:  # a dtype written into the forward pass
        probe = copy.deepcopy(model).eval()
        before, tolerance = _output(probe, inputs), 1e-3
    scale = float(before.abs().max()) + 1e-12

    def same() -> bool:
        change = float((_output(probe, inputs) - before).abs().max())
        return change <= tolerance * scale

    permute(probe, permutations)
    if same():
        return list(permutations)
    permute(probe, [p.inverse() for p in reversed(permutations)])
    if not same():
        raise ModelError(
            f"{type(model).__name__} does not give the same output twice in evaluation mode, so a "
            "permutation cannot be checked"
        )
    kept = []
    for permutation in permutations:
        permute(probe, [permutation])
        if same():
            kept.append(permutation)
        permute(probe, [permutation.inverse()])
    return kept


@torch.no_grad()
def _output(model: nn.Module, inputs: Any) -> Tensor:
    output = call(model, inputs)
    found = getattr(output, "logits", None)
    tensor = found if isinstance(found, Tensor) else first_tensor(output)
    if tensor is None:
        raise ModelError(f"no tensor in the output of {type(model).__name__}")
    return tensor.double()


def _double(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    return {k: _double(v) for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs


def _noisy(inputs: Any) -> Any:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return inputs
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    return inputs + noise.to(inputs)
