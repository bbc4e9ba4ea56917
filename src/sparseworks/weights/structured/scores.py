"""Importance of a group: what its slices weigh, or what the loss would say without them.

Every score is a sum over all slices of a group g of an elementwise importance, `score[g]` =
(sum over slices of sum of e(w))^p, as the paper of each says. Structured methods are these scores;
`slim` cuts the groups that score least.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Batch, Loss, call, default_loss, split
from sparseworks.models.coupling import Coupling
from sparseworks.models.recurrence import RECURRENT
from sparseworks.models.tap import EvidenceTap, calibration_mode
from sparseworks.models.views import View, view_of

__all__ = ["ActivationEnergy", "BatchNormScale", "Fisher", "GroupNorm", "RandomGroups", "Taylor"]

Scores = NDArray[np.float64]
_ROOM = "weights/structured"


def gather(coupling: Coupling, importance: dict[str, Tensor]) -> Scores:
    """Sum elementwise importances over the slices of every group, `[groups]`."""
    scores = np.zeros(coupling.count)
    for (name, axis), labels in coupling.axes.items():
        if name in importance:
            value = importance[name].detach().double()
            others = [d for d in range(value.ndim) if d != axis]
            sums = (value.sum(others) if others else value).cpu().numpy()
            np.add.at(scores, labels, sums)
    return scores


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim >= 2}


def _batches(data: Iterable[Batch] | None, name: str) -> list[Batch]:
    batches = list(data) if data is not None else []
    if not batches:
        raise DataError(f"{name} scores groups by gradients or activations: give data=")
    return batches


@dataclass(frozen=True)
class GroupNorm:
    """||W_g||_2 over all coupled weights of a group, over the mean of its family.

    Source: Li et al. 2017, Pruning Filters for Efficient ConvNets (norms of filters), summed over
    the group as in Fang et al. 2023, DepGraph: Towards Any Structural Pruning.

    Args:
        p: of the norm.
        root: False ranks by ||W_g||_p^p, which spreads more within a family: layers are cut more
            evenly.
    """

    p: float = 2.0
    root: bool = True

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-norm",
        title="Pruning Filters for Efficient ConvNets; DepGraph: Towards Any Structural Pruning",
        authors="Li et al.; Fang et al.",
        year=2023,
        room=_ROOM,
        kind="structured",
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="none",
        summary="cut the coupled groups with the smallest norm",
    )
    normalise: ClassVar[bool] = True

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        powers = {n: w.detach().abs().pow(self.p) for n, w in _weights(model).items()}
        scores: Scores = gather(coupling, powers)
        if self.root:
            scores **= 1 / self.p
        return scores


@dataclass(frozen=True)
class RandomGroups:
    """Uniform random scores: the baseline every criterion must beat."""

    seed: int = 0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-random",
        title="Random channel pruning (baseline)",
        authors="-",
        year=2017,
        room=_ROOM,
        kind="structured",
        pattern="coupled groups",
        budget="flops, params or latency",
        summary="cut groups at random",
    )
    normalise: ClassVar[bool] = True

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        return np.random.default_rng(self.seed).random(coupling.count)


@dataclass(frozen=True)
class BatchNormScale:
    """sum |gamma| over the batch-norm scales of a group, over the mean of its family.

    Source: Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-bn",
        title="Learning Efficient Convolutional Networks through Network Slimming",
        authors="Liu et al.",
        year=2017,
        room=_ROOM,
        kind="structured",
        pattern="coupled groups",
        budget="flops, params or latency",
        summary="cut the channels with the smallest batch-norm scales",
    )
    normalise: ClassVar[bool] = True

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        scales = {
            f"{n}.weight" if n else "weight": m.weight.detach().abs()
            for n, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
        }
        if not scales:
            raise ModelError(f"{type(model).__name__} has no batch norm with scales to rank by")
        return gather(coupling, scales)


class _Gradients:
    """Sums a function of weights and gradients over batches."""

    power: ClassVar[float]

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        batches = _batches(data, type(self).__name__)
        loss = loss or default_loss
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not named:
            raise InvalidArgument("every parameter is frozen, so there are no gradients to score")
        training = {m: m.training for m in model.modules()}
        model.eval()
        total = np.zeros(coupling.count)
        try:
            for batch in batches:
                value = loss(model, batch)
                grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
                total += self._one(coupling, named, dict(zip(named, grads)))
        finally:
            for module, was in training.items():
                module.training = was
        return total / len(batches)

    def _one(
        self, coupling: Coupling, named: dict[str, nn.Parameter], grads: dict[str, Tensor | None]
    ) -> Scores:
        raise NotImplementedError


@dataclass(frozen=True)
class Taylor(_Gradients):
    """mean over batches of (sum over the group's slices of g w)^2: the loss without the group.

    Source: Molchanov et al. 2019, Importance Estimation for Neural Network Pruning.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-taylor",
        title="Importance Estimation for Neural Network Pruning",
        authors="Molchanov et al.",
        year=2019,
        room=_ROOM,
        kind="structured",
        needs=("data", "loss"),
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="one forward and backward pass over the data",
        summary="cut the groups whose removal changes the loss least, to first order",
    )
    normalise: ClassVar[bool] = False

    def _one(
        self, coupling: Coupling, named: dict[str, nn.Parameter], grads: dict[str, Tensor | None]
    ) -> Scores:
        first = {n: named[n].detach() * g for n, g in grads.items() if g is not None}
        scores: Scores = gather(coupling, first) ** 2
        return scores


@dataclass(frozen=True)
class Fisher(_Gradients):
    """mean over batches of sum g^2 w^2: the diagonal of the (empirical Fisher) Hessian.

    Source: Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning;
    LeCun et al. 1990, Optimal Brain Damage.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-fisher",
        title="Faster gaze prediction with dense networks and Fisher pruning",
        authors="Theis et al.",
        year=2018,
        room=_ROOM,
        kind="structured",
        needs=("data", "loss"),
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="one forward and backward pass over the data",
        summary="cut the groups with the smallest diagonal second-order term",
    )
    normalise: ClassVar[bool] = False

    def _one(
        self, coupling: Coupling, named: dict[str, nn.Parameter], grads: dict[str, Tensor | None]
    ) -> Scores:
        return gather(
            coupling,
            {n: (named[n].detach() * g).square() for n, g in grads.items() if g is not None},
        )


@dataclass(frozen=True)
class ActivationEnergy:
    """sum over consumers of E[x_c^2] ||W[:, c]||^2: the energy a channel sends on.

    Source: Hu et al. 2016, Network Trimming (activations); the weighting is that of Wanda (Sun et
    al. 2024) over whole columns.
    """

    info: ClassVar[MethodInfo] = MethodInfo(
        name="group-energy",
        title="Network Trimming: A Data-Driven Neuron Pruning Approach",
        authors="Hu et al.",
        year=2016,
        room=_ROOM,
        kind="structured",
        needs=("data",),
        pattern="coupled groups",
        budget="flops, params or latency",
        cost="one forward pass over the data",
        summary="cut the channels that send the least energy to the next layers",
    )
    normalise: ClassVar[bool] = True

    def score(
        self, model: nn.Module, coupling: Coupling, data: Iterable[Batch] | None, loss: Loss | None
    ) -> Scores:
        moments = input_moments(model, _batches(data, type(self).__name__))
        importance = {}
        for name, (_, square) in moments.items():
            weight = dict(model.named_parameters())[name].detach().double()
            columns = weight.square().sum([d for d in range(weight.ndim) if d != 1])
            importance[name] = (square * columns).expand(1, -1)
        scores = np.zeros(coupling.count)
        for name, value in importance.items():
            if (labels := coupling.axes.get((name, 1))) is not None:
                np.add.at(scores, labels, value[0].cpu().numpy())
        return scores


def input_moments(model: nn.Module, batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and mean square per input channel of the weights that `watch_inputs` sees, by name."""
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        new = [x.sum(0), x.square().sum(0), torch.tensor(float(len(x)))]
        old = sums.get(name)
        sums[name] = new if old is None else [a + b for a, b in zip(old, new)]

    watch_inputs(model, batches, see)
    return {n: (a / c, b / c) for n, (a, b, c) in sums.items()}


def watch_inputs(
    model: nn.Module,
    batches: Iterable[Batch],
    see: Callable[[str, Tensor], None],
    names: Container[str] | None = None,
) -> None:
    """Run the model; `see(name, x)` gets the input `[positions, channels]` (fp64) of the weight of
    every plain Linear and ungrouped convolution, and of every recurrent layer (what is multiplied
    with its hidden states too), or of those in `names`."""
    recurrent: list[View] = []

    def hook(name: str, channel: int):  # type: ignore[no-untyped-def]
        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().movedim(channel, -1)
            see(name, x.reshape(-1, x.shape[-1]))

        return before

    handles = []
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, RECURRENT):
            found = [view_of(module, a, dot + a) for a in module._parameters]
            recurrent += [v for v in found if v and (names is None or v.name in names)]
        name = dot + "weight"
        if names is not None and name not in names:
            continue
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(hook(name, -1)))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            rank = module.weight.ndim
            handles.append(module.register_forward_pre_hook(hook(name, 1 - rank)))
    tap = EvidenceTap(recurrent, lambda view, x, _: see(view.name, x.detach().double()))
    try:
        with calibration_mode(model), tap if recurrent else nullcontext():
            for batch in batches:
                inputs, _ = split(batch)
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
